import itertools
import json
import pickle
import signal
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, chisquare
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from synthbrain import SynthBrainDataset, SynthBrainSampler
from synthbrain.errors import UsageError
from synthbrain.sampler import epoch_order
from synthbrain.testing import TinyGenerator, tiny_manifest

SIZES = st.integers(1, 300)
WORLDS = st.integers(1, 9)
SEEDS = st.integers(0, 2**64 - 1)
EPOCHS = st.integers(0, 2**40)


def ranks(n, world, state=None, epoch=None, **options):
    """The samplers of all ranks."""
    made = [SynthBrainSampler(n, rank=rank, world_size=world, **options) for rank in range(world)]
    for sampler in made:
        if state is not None:
            sampler.load_state_dict(state)
        if epoch is not None:
            sampler.set_epoch(epoch)
    return made


def together(samplers):
    """The sequence all ranks go through, step by step; they must get as many."""
    return [row for step in zip(*samplers, strict=True) for row in step]


def take(samplers, count):
    """The first rows each rank draws."""
    return [
        row
        for step in zip(*(itertools.islice(iter(s), count) for s in samplers), strict=True)
        for row in step
    ]


def numbers(n):
    return TensorDataset(torch.arange(n))


def rows_of(batches):
    return [row for (batch,) in batches for row in batch.tolist()]


# The order


def philox(key, counter):
    """Philox4x64-10 as its paper has it: four numbers for each value of the counter."""
    mask = 2**64 - 1
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        low, high = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
        c = [(high >> 64) ^ c[1] ^ k0, high & mask, (low >> 64) ^ c[3] ^ k1, low & mask]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return c


@settings(max_examples=40)
@given(n=SIZES, seed=SEEDS, epoch=EPOCHS)
@example(n=7, seed=2**63 + 1, epoch=2**63 - 1)
def test_the_order_sorts_rows_by_numbers_of_philox(n, seed, epoch):
    stream = int.from_bytes(b"order", "big")
    blocks = (philox((seed, epoch), (1 + i, 0, 0, stream)) for i in range(-(-n // 4)))
    drawn = [number for block in blocks for number in block][:n]
    assert epoch_order(n, seed, epoch).tolist() == sorted(range(n), key=drawn.__getitem__)


def test_the_order_is_the_same_for_ever():
    assert epoch_order(12, 0, 0).tolist() == [2, 3, 5, 7, 0, 6, 1, 4, 9, 10, 8, 11]
    assert epoch_order(12, 0, 1).tolist() == [3, 7, 2, 9, 6, 4, 10, 8, 5, 0, 11, 1]
    assert epoch_order(12, 1, 0).tolist() == [0, 4, 1, 2, 3, 5, 9, 11, 6, 7, 10, 8]


def test_a_shared_order_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(5, 0, 0)[0] = 1


@pytest.mark.parametrize("n", [2, 3, 7, 16])
def test_every_row_is_as_likely_at_every_position(n):
    epochs = 3000
    orders = np.stack([epoch_order(n, 5, epoch) for epoch in range(epochs)])
    seen = np.stack([np.bincount(orders[:, position], minlength=n) for position in range(n)])
    distance = ((seen - epochs / n) ** 2 / (epochs / n)).sum()
    # Rows and columns of the table add up, which leaves (n - 1)² free numbers.
    assert 1e-4 < chi2.sf(distance * (n - 1) / n, (n - 1) ** 2) < 1 - 1e-4


@pytest.mark.parametrize("keys", ["epochs", "seeds"])
def test_every_permutation_is_as_likely(keys):
    pairs = ((3, i) if keys == "epochs" else (i, 3) for i in range(6000))
    seen = np.unique([epoch_order(4, *pair) for pair in pairs], axis=0, return_counts=True)[1]
    assert len(seen) == 24
    assert chisquare(seen).pvalue > 1e-4


def test_epochs_and_seeds_have_nothing_in_common():
    n, places = 500, [(s, e) for s in range(6) for e in range(6)]
    orders = np.stack([epoch_order(n, *place) for place in places])
    pairs = list(itertools.combinations(range(len(orders)), 2))
    # Two random orders agree at one position, and keep one neighbour, on average.
    same = [int((orders[i] == orders[j]).sum()) for i, j in pairs]
    assert np.mean(same) == pytest.approx(1, abs=0.2)
    assert max(same) < 10
    links = [set(zip(order[:-1].tolist(), order[1:].tolist(), strict=True)) for order in orders]
    kept = [len(links[i] & links[j]) for i, j in pairs]
    assert np.mean(kept) == pytest.approx(1, abs=0.2)
    assert max(kept) < 10
    correlations = np.corrcoef(orders)[np.triu_indices(len(orders), 1)]
    assert np.abs(correlations).max() < 5 / np.sqrt(n)


def test_a_hundred_thousand_rows():
    samplers = ranks(100_000, 3, seed=1, epoch=2)
    rows = np.array(together(samplers))
    assert len(rows) == 100_002
    assert np.array_equal(np.sort(rows[:100_000]), np.arange(100_000))
    assert np.array_equal(rows[100_000:], rows[:2])
    assert len(pickle.dumps(samplers[0])) < 1000


# Ranks


@given(n=SIZES, world=WORLDS, seed=SEEDS, epoch=EPOCHS)
def test_ranks_share_every_row_once_and_then_the_beginning_again(n, world, seed, epoch):
    samplers = ranks(n, world, seed=seed, epoch=epoch)
    assert {len(s) for s in samplers} == {-(-n // world)}
    rows = together(samplers)
    order = epoch_order(n, seed, epoch).tolist()
    assert sorted(rows[:n]) == list(range(n))
    assert rows == list(itertools.islice(itertools.cycle(order), world * -(-n // world)))
    assert all(len(s) == len(list(s)) for s in samplers)
    assert all(type(row) is int for row in rows)


@given(n=SIZES, world=WORLDS, seed=SEEDS, epoch=EPOCHS)
def test_with_drop_last_the_last_rows_are_left_out(n, world, seed, epoch):
    if n < world:
        with pytest.raises(UsageError, match="do not go round"):
            ranks(n, world, drop_last=True)
        return
    samplers = ranks(n, world, seed=seed, epoch=epoch, drop_last=True)
    assert {len(s) for s in samplers} == {n // world}
    assert together(samplers) == epoch_order(n, seed, epoch)[: n // world * world].tolist()


@given(n=SIZES, world=WORLDS, drop_last=st.booleans(), epoch=EPOCHS)
def test_unshuffled_rows_are_split_as_torch_splits_them(n, world, drop_last, epoch):
    if drop_last and n < world:
        return
    samplers = ranks(n, world, shuffle=False, drop_last=drop_last, epoch=epoch)
    for rank, sampler in enumerate(samplers):
        peer = DistributedSampler(range(n), world, rank, shuffle=False, drop_last=drop_last)
        assert len(sampler) == len(peer)
        assert list(sampler) == list(peer)


def test_ranks_are_those_of_torch_distributed(python, tmp_path):
    printed = python(
        """
        import os, sys
        import torch.distributed as dist
        from synthbrain import SynthBrainSampler

        rank = 0 if os.fork() else 1
        dist.init_process_group("gloo", f"file://{sys.argv[1]}", rank=rank, world_size=2)
        found = [None, None]
        dist.all_gather_object(found, list(SynthBrainSampler(11, seed=4)))
        if rank == 0:
            os.wait()
            print(found)
        os._exit(0) if rank else None
        """,
        tmp_path / "meeting",
    )
    assert json.loads(printed) == [list(s) for s in ranks(11, 2, seed=4)]


# Going on


@given(
    n=SIZES, world=WORLDS, other=WORLDS, seed=SEEDS, epoch=EPOCHS, drop_last=st.booleans(),
    data=st.data(),
)  # fmt: skip
def test_another_number_of_ranks_goes_on_with_exactly_what_remains(
    n, world, other, seed, epoch, drop_last, data
):
    if drop_last and n < max(world, other):
        return
    first = ranks(n, world, seed=seed, epoch=epoch, drop_last=drop_last)
    step = data.draw(st.integers(0, len(first[0]) - 1), label="step")
    before = take(first, step)
    states = [s.state_dict() for s in first]
    assert all(state == states[0] for state in states)
    assert states[0]["position"] == len(before) == step * world

    second = ranks(n, other, state=json.loads(json.dumps(states[0])), drop_last=drop_last)
    order, left = epoch_order(n, seed, epoch).tolist(), n - len(before)
    if drop_last and left < other:
        assert {(s.epoch, s.position) for s in second} == {(epoch + 1, 0)}
        return
    rows = together(second)
    assert len(rows) % other == 0
    if drop_last:
        assert rows == order[len(before) :][: left // other * other]
    else:
        assert rows[:left] == order[len(before) :]
        assert rows[left:] == list(itertools.islice(itertools.cycle(order), len(rows) - left))
        assert set(before) | set(rows) == set(range(n))
    # From then on epochs are whole again, as those of a run that never stopped.
    assert {(s.epoch, s.position) for s in second} == {(epoch + 1, 0)}
    assert together(second) == together(
        ranks(n, other, seed=seed, epoch=epoch + 1, drop_last=drop_last)
    )


@given(n=SIZES, stops=st.lists(st.tuples(WORLDS, st.integers(0, 30)), max_size=6), seed=SEEDS)
def test_many_stops_with_other_numbers_of_ranks_lose_and_repeat_nothing(n, stops, seed):
    state, rows = SynthBrainSampler(n, seed=seed).state_dict(), []
    for world, count in stops:
        samplers = ranks(n, world, state=state)
        rows += take(samplers, min(count, (n - state["position"] - 1) // world))
        state = samplers[0].state_dict()
    assert rows + list(ranks(n, 1, state=state)[0]) == epoch_order(n, seed, 0).tolist()


@given(n=SIZES, world=WORLDS, batch=st.integers(1, 20), ahead=st.integers(0, 50), data=st.data())
def test_what_was_drawn_ahead_does_not_count(n, world, batch, ahead, data):
    samplers = ranks(n, world)
    batches = -(-len(samplers[0]) // batch)
    step = data.draw(st.integers(0, batches), label="step")
    for rank, sampler in enumerate(samplers):
        drawn = iter(sampler)
        trained = list(itertools.islice(drawn, batch * step))
        list(itertools.islice(drawn, ahead))
        state = sampler.state_dict(consumed=batch * step)
        if step == batches:
            assert (state["epoch"], state["position"]) == (1, 0)
        else:
            assert (state["epoch"], state["position"]) == (0, world * len(trained))
        plain = SynthBrainSampler(n, rank=rank, world_size=world)
        list(itertools.islice(iter(plain), batch * step))
        assert state == plain.state_dict()


def test_consumed_is_counted_from_where_the_loop_began():
    sampler = SynthBrainSampler(100)
    sampler.load_state_dict(sampler.state_dict(consumed=40))
    assert sampler.state_dict(consumed=0)["position"] == 40
    assert next(iter(sampler)) == epoch_order(100, 0, 0)[40]
    assert sampler.state_dict(consumed=8)["position"] == 48
    assert sampler.state_dict(consumed=60) | {"rows_digest": ""} == {
        "rows_digest": "", "seed": 0, "epoch": 1, "position": 0
    }  # fmt: skip


def test_a_loaded_position_is_used_once_and_only_in_its_epoch():
    sampler = SynthBrainSampler(10, seed=3)
    state = {"rows_digest": "", "seed": 3, "epoch": 2, "position": 7}
    order = epoch_order(10, 3, 2).tolist()

    sampler.load_state_dict(state)
    sampler.set_epoch(2)
    iter(sampler)  # as loaders do, and throw it away
    assert len(sampler) == 10
    assert sampler.state_dict() == state
    assert list(sampler) == order[7:]
    sampler.set_epoch(2)
    assert list(sampler) == order

    sampler.load_state_dict(state)
    sampler.set_epoch(3)
    assert list(sampler) == epoch_order(10, 3, 3).tolist()


def test_epochs_follow_one_another():
    sampler = SynthBrainSampler(10)
    for epoch in (0, 1, 2, 7, 8):
        if epoch == 7:
            sampler.set_epoch(7)
        assert list(sampler) == epoch_order(10, 0, epoch).tolist()
        # The loop that trains may still be in it.
        assert sampler.state_dict(consumed=9) == sampler.state_dict() | {
            "epoch": epoch, "position": 9
        }  # fmt: skip
    sampler.set_epoch(9)
    assert sampler.state_dict(consumed=0) == sampler.state_dict()


def test_a_loop_broken_off_starts_again():
    sampler, order = SynthBrainSampler(10), epoch_order(10, 0, 0).tolist()
    assert take([sampler], 4) == order[:4]
    assert sampler.state_dict()["position"] == 4
    drawn = iter(sampler)  # stateful loaders ask for the state before they draw
    assert sampler.state_dict()["position"] == 0
    assert list(drawn) == order


def test_the_seed_goes_with_the_state():
    sampler = SynthBrainSampler(50, seed=1)
    sampler.load_state_dict(SynthBrainSampler(50, seed=2).state_dict())
    assert list(sampler) == list(SynthBrainSampler(50, seed=2))


def test_a_pickled_copy_goes_on_where_it_was():
    sampler = SynthBrainSampler(30, seed=5, rank=1, world_size=2)
    take([sampler], 6)
    twin = pickle.loads(pickle.dumps(sampler))
    assert twin.state_dict() == sampler.state_dict()
    assert list(twin) == list(sampler)


# Looking ahead


@given(n=SIZES, world=WORLDS, seed=SEEDS, drop_last=st.booleans(), data=st.data())
def test_upcoming_rows_are_those_that_come(n, world, seed, drop_last, data):
    if drop_last and n < world:
        return
    for sampler in ranks(n, world, seed=seed, drop_last=drop_last, epoch=4):
        step = data.draw(st.integers(0, len(sampler)), label="step")
        count = data.draw(st.integers(0, 400), label="count")
        drawn = iter(sampler)
        list(itertools.islice(drawn, step))
        before = sampler.state_dict()
        ahead = sampler.upcoming(sampler.position, count)
        assert ahead.dtype == np.int64
        assert sampler.state_dict() == before
        assert ahead.tolist() == list(itertools.islice(drawn, count))


# Loaders


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_loaders_with_other_workers_and_ranks_go_on_with_what_remains(start):
    n, batch, steps = 101, 4, 3
    seen = []
    samplers = ranks(n, 2, seed=6, epoch=1)
    for sampler in samplers:
        loader = DataLoader(
            numbers(n), batch, sampler=sampler, num_workers=1, prefetch_factor=4,
            multiprocessing_context=start,
        )  # fmt: skip
        assert len(loader) == 13
        batches = iter(loader)
        seen += rows_of(itertools.islice(batches, steps))
        assert sampler.position > 2 * batch * steps  # workers draw ahead
    states = [sampler.state_dict(consumed=batch * steps) for sampler in samplers]
    assert states[0] == states[1]
    for sampler in ranks(n, 3, state=states[0]):
        seen += rows_of(DataLoader(numbers(n), 5, sampler=sampler))
    assert len(seen) == 24 + 78  # 77 remain, and do not go round among three
    assert sorted(set(seen)) == list(range(n))


@pytest.mark.parametrize("options", [{}, {"num_workers": 2, "persistent_workers": True}])
@pytest.mark.parametrize("batch_size", [None, 7])
def test_loaders_run_through_epochs_and_start_at_a_loaded_position(options, batch_size):
    n = 40
    sampler = SynthBrainSampler(n, seed=2)
    sampler.load_state_dict({"rows_digest": "", "seed": 2, "epoch": 3, "position": 33})
    loader = DataLoader(numbers(n), batch_size, sampler=sampler, **options)
    for epoch in range(sampler.epoch, 6):
        sampler.set_epoch(epoch)
        rows = [int(x) for (batch,) in loader for x in batch.reshape(-1)]
        assert rows == epoch_order(n, 2, epoch).tolist()[33 if epoch == 3 else 0 :]


def test_the_rows_of_a_dataset_are_known_by_their_digest(tmp_path):
    ds = SynthBrainDataset(tiny_manifest(12), generator=TinyGenerator(), store=tmp_path)
    sampler = SynthBrainSampler(ds, seed=1)
    state = sampler.state_dict(consumed=8)
    assert state == {
        "rows_digest": ds.manifest.header.rows_digest, "seed": 1, "epoch": 0, "position": 8
    }  # fmt: skip
    sampler.load_state_dict(state)
    ids = [id for batch in ds.loader(batch_size=3, sampler=sampler) for id in batch["id"]]
    assert ids == ds.table.index[epoch_order(12, 1, 0)[8:]].tolist()

    fewer = SynthBrainDataset(ds.manifest.select(limit=11), generator=None, sources=[])
    with pytest.raises(UsageError, match=r"is of rows \w{12}, and the sampler's are \w{12};"):
        SynthBrainSampler(fewer).load_state_dict(state)
    with pytest.raises(UsageError, match="the sampler's are without a digest"):
        SynthBrainSampler(12).load_state_dict(state)
    SynthBrainSampler(12, rows_digest=state["rows_digest"]).load_state_dict(state)


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    script = """
        import json, os, signal, sys
        import torch
        from torch.utils.data import DataLoader, TensorDataset
        from synthbrain import SynthBrainSampler

        sampler, rows = SynthBrainSampler(60, seed=8), []
        loader = DataLoader(TensorDataset(torch.arange(60)), 4, sampler=sampler, num_workers=2)
        for step, (batch,) in enumerate(loader, start=1):
            if step == 6:
                os.kill(os.getpid(), signal.SIGKILL)
            rows += batch.tolist()
            state = sampler.state_dict(consumed=4 * step)
            with open(sys.argv[1], "w") as checkpoint:
                json.dump({"rows": rows, "sampler": state}, checkpoint)
        """
    checkpoint = tmp_path / "checkpoint.json"
    command = [sys.executable, "-c", textwrap.dedent(script), str(checkpoint)]
    assert subprocess.run(command, timeout=100, check=False).returncode == -signal.SIGKILL
    saved = json.loads(checkpoint.read_text())
    assert len(saved["rows"]) == 20
    rest = together(ranks(60, 4, state=saved["sampler"]))
    assert saved["rows"] + rest == epoch_order(60, 8, 0).tolist()


# torchdata


@pytest.fixture
def stateful():
    """Builds torchdata's loader over 61 rows, and its sampler."""
    module = pytest.importorskip("torchdata.stateful_dataloader")

    def make(workers=0, rank=0, world=1, batch_size=4, **options):
        sampler = SynthBrainSampler(61, seed=9, rank=rank, world_size=world)
        with warnings.catch_warnings(action="ignore"):  # of what torch deprecates
            loader = module.StatefulDataLoader(
                numbers(61), batch_size, sampler=sampler, num_workers=workers, **options
            )
        return loader, sampler

    return make


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("steps", [0, 1, 5, 15])
def test_torchdata_counts_batches_and_not_what_its_workers_draw_ahead(stateful, workers, steps):
    loader, sampler = stateful(workers)
    sampler.set_epoch(3)
    order = epoch_order(61, 9, 3).tolist()
    batches = iter(loader)
    assert rows_of(itertools.islice(batches, steps)) == order[: 4 * steps]
    state = pickle.loads(pickle.dumps(loader.state_dict()))
    assert rows_of(batches) == order[4 * steps :]

    again, other = stateful(workers)
    again.load_state_dict(state)
    assert rows_of(again) == order[4 * steps :]
    assert other.epoch == 4
    assert rows_of(again) == epoch_order(61, 9, 4).tolist()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("told", [False, True])
def test_torchdata_goes_on_after_a_whole_epoch(stateful, workers, drop_last, told):
    loader, sampler = stateful(workers, drop_last=drop_last)
    sampler.set_epoch(3)
    size = 60 if drop_last else 61
    assert len(rows_of(loader)) == size
    again, other = stateful(workers, drop_last=drop_last)
    again.load_state_dict(loader.state_dict())
    if told:
        other.set_epoch(4)
    assert rows_of(again) == epoch_order(61, 9, 4).tolist()[:size]
    assert rows_of(loader) == epoch_order(61, 9, 4).tolist()[:size]


@pytest.mark.parametrize("workers", [0, 1])
def test_torchdata_goes_on_with_another_number_of_ranks(stateful, workers):
    seen, states = [], []
    for rank in range(2):
        loader, _ = stateful(workers, rank, 2)
        seen += rows_of(itertools.islice(iter(loader), 3))
        states.append(loader.state_dict())
    for rank in range(3):
        loader, _ = stateful(workers, rank, 3, batch_size=5)
        loader.load_state_dict(states[rank % 2])
        seen += rows_of(loader)
    assert len(seen) == 24 + 39  # 37 remain, and do not go round among three
    assert set(seen) == set(range(61))


@pytest.mark.parametrize("workers", [0, 2])
def test_torchdata_that_saves_now_and_then(stateful, workers):
    options = {"snapshot_every_n_steps": 3} if workers else {}
    loader, _ = stateful(workers, **options)
    batches = iter(loader)
    seen = rows_of(itertools.islice(batches, 5))
    again, _ = stateful(workers, **options)
    again.load_state_dict(loader.state_dict())
    assert seen + rows_of(again) == epoch_order(61, 9, 0).tolist()


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": 0}, "the number of rows must be a whole number from 1, found 0"),
        ({"dataset": []}, "the number of rows must be a whole number from 1, found 0"),
        ({"dataset": -1}, "the number of rows must be .* from 1, found -1"),
        ({"dataset": 1.5}, "the number of rows must be .* from 1, found 1.5"),
        ({"seed": -1}, "seed must be a whole number from 0 to 1844.*, found -1"),
        ({"seed": 2**64}, "seed must be a whole number from"),
        ({"rank": 1}, "rank and world_size must come together, found 1 and None"),
        ({"world_size": 2}, "must come together, found None and 2"),
        ({"rank": 2, "world_size": 2}, "rank must be a whole number from 0 to 1, found 2"),
        ({"rank": 0, "world_size": 0}, "world_size must be a whole number from 1, found 0"),
    ],
)
def test_arguments_that_make_no_sense(options, message):
    with pytest.raises(UsageError, match=message):
        SynthBrainSampler(**({"dataset": 10} | options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": -1}, "epoch of a state must be"),
        ({"epoch": "one"}, "epoch of a state must be .*, found 'one'"),
        ({"position": 10}, "position of a state must be a whole number from 0 to 9, found 10"),
        ({"seed": 2**64}, "seed of a state must be"),
        ({"rows_digest": "a" * 64}, "this state is of rows aaaaaaaaaaaa, and the sampler's"),
    ],
)
def test_states_that_cannot_be_gone_on_from_change_nothing(change, message):
    sampler = SynthBrainSampler(10, seed=1)
    before = sampler.state_dict(consumed=3)
    sampler.load_state_dict(before)
    with pytest.raises(UsageError, match=message):
        sampler.load_state_dict(before | change)
    with pytest.raises(UsageError, match="found one without epoch, position"):
        sampler.load_state_dict({"rows_digest": "", "seed": 1})
    assert sampler.state_dict() == before


def test_numbers_below_zero():
    sampler = SynthBrainSampler(10)
    for call in (
        lambda: sampler.set_epoch(-1),
        lambda: sampler.upcoming(-1, 1),
        lambda: sampler.upcoming(0, -1),
        lambda: sampler.state_dict(consumed=-1),
    ):
        with pytest.raises(UsageError, match="must be a whole number"):
            call()


def test_it_says_what_it_is():
    sampler = SynthBrainSampler(100_000, rank=1, world_size=4)
    take([sampler], 3)
    assert repr(sampler) == (
        "<SynthBrainSampler of 100,000 rows: epoch 0, position 12, rank 1 of 4>"
    )
