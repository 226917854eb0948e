import hashlib
import itertools
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pandas as pd
import pytest
from faulty import FaultyServer
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import ObjectStore
from torch.utils.data import DataLoader
from watching import bytes_of_shards

from synthbrain import SynthBrainDataset, claims
from synthbrain.errors import MissingVolumeError, UsageError
from synthbrain.header import PacksSource
from synthbrain.manifest import Manifest
from synthbrain.publish.pack import write_pack
from synthbrain.resolver import Resolver
from synthbrain.sources.packs import PackVolumes, read_directory
from synthbrain.sources.url import FileBytes
from synthbrain.store import BLOCK
from synthbrain.stream import SynthBrainStream, stream_order
from synthbrain.stream.order import RUN, runs_of
from synthbrain.testing import TinyGenerator, tiny_manifest

PLACES = [*range(20), *range(1000, 1018), *range(2000, 2012)]
"""50 volumes in three packs, five whole runs and a part of one."""

MADE_BY = "tiny-01234567"
SEEDS = st.integers(0, 2**64 - 1)
EPOCHS = st.integers(0, 2**40)
RUNS = st.lists(st.integers(0, 12), min_size=1, max_size=200).map(np.array)


class Published:
    """Fifty volumes: their manifest, with hashes, the store they come from, and their packs."""

    def __init__(self, folder):
        whole = tiny_manifest(3000)
        cohort = whole.select(ids=whole.table.index[PLACES])
        self.resolver = Resolver(cohort, folder / "store", TinyGenerator())
        list(self.resolver.fill(self.resolver.plan()))
        self.folder = folder / "set"
        for block in range(3):
            path = self.folder / "packs" / f"block-{block:04d}.zarr.zip"
            write_pack(self.resolver.recipes, block, path)
        shards = [self.resolver.path(i).read_bytes() for i in range(len(cohort))]
        self.size = max(map(len, shards))
        sha256 = pd.Series(
            [hashlib.sha256(shard).hexdigest() for shard in shards],
            index=cohort.table.index, dtype="str",
        )  # fmt: skip
        header = cohort.header.model_copy(update={"content_digest": None})
        self.manifest = Manifest(header, cohort.table, cohort.positions, sha256)
        self.files = {
            f"set/packs/{path.name}": path.read_bytes()
            for path in (self.folder / "packs").iterdir()
        }

    def volume(self, row):
        return self.resolver.recipes.read(self.manifest.positions[row])


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    return Published(tmp_path_factory.mktemp("published"))


@pytest.fixture
def stream(published):
    """Builds a stream of the published volumes."""

    def make(manifest=published.manifest, **options):
        return SynthBrainStream(manifest, **{"sources": [published.folder]} | options)

    return make


def rows_of(loader):
    return [int(id[4:]) for batch in loader for id in batch["id"]]


def in_order(stream, epoch=0):
    """Numbers in the root of an epoch's rows."""
    runs = runs_of(stream.manifest.positions)
    return [PLACES[row] for row in stream_order(runs, stream.seed, epoch, stream.window)]


def joined(threads, seconds=20):
    for thread in threads:
        thread.join(seconds)


def looking_ahead():
    return [thread for thread in threading.enumerate() if thread.name == "synthbrain-ahead"]


# The order


@given(runs=RUNS, seed=SEEDS, epoch=EPOCHS, window=st.integers(1, 300))
def test_the_order_is_a_permutation_that_keeps_runs_within_a_window(runs, seed, epoch, window):
    order = stream_order(runs, seed, epoch, window)
    assert sorted(order.tolist()) == list(range(len(runs)))
    place = np.argsort(order)
    for run in np.unique(runs):
        places = place[runs == run]
        assert np.ptp(places) <= 2 * window + np.bincount(runs).max()


@settings(max_examples=30)
@given(runs=RUNS, seed=SEEDS, epoch=EPOCHS, window=st.integers(1, 300))
def test_the_order_is_that_of_its_definition(runs, seed, epoch, window):
    bits = np.random.Philox(
        key=seed + (epoch << 64), counter=int.from_bytes(b"stream", "big") << 192
    )
    names = sorted(set(runs.tolist()))
    numbers = dict(zip(names, bits.random_raw(len(names)).tolist(), strict=True))
    start, begun = {}, 0
    for name in sorted(names, key=numbers.get):
        start[name] = begun
        begun += runs.tolist().count(name)
    parts = [int(number) // 2**11 / 2**53 for number in bits.random_raw(len(runs))]
    keys = [start[run] + part * window for run, part in zip(runs.tolist(), parts, strict=True)]
    assert (
        stream_order(runs, seed, epoch, window).tolist() == np.argsort(keys, kind="stable").tolist()
    )


def test_a_window_of_one_row_keeps_runs_together():
    runs = np.repeat(np.arange(30), 10)
    order = runs[stream_order(runs, 3, 1, window=1)]
    assert np.flatnonzero(np.diff(order)).tolist() == list(range(9, 299, 10))
    assert len(set(order[::10])) == 30
    assert not np.array_equal(order[::10], runs[stream_order(runs, 3, 2, window=1)][::10])


def test_the_order_does_not_change_from_release_to_release():
    order = stream_order(runs_of(np.arange(2000)), seed=7, epoch=3, window=256)
    digest = hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()
    assert digest == "83d4577f957c35304e3b98a4b9a5eed9c904e0446fca3a934cee69bb07e20d5b"


def test_runs_stay_within_packs():
    assert BLOCK % RUN == 0
    assert runs_of(np.array([0, RUN - 1, RUN, BLOCK - 1, BLOCK])).tolist() == [0, 0, 1, 99, 100]


# Samples


def test_samples_are_those_of_a_dataset_with_a_store(stream, published):
    options = {"patch_size": 8, "seed": 3, "units": "natural", "limit": 12}
    here = SynthBrainDataset(
        published.manifest, generator=None, made_by=MADE_BY, sources=[],
        store=published.resolver.folder, **options,
    )  # fmt: skip
    there = stream(**options)
    for ds in (here, there):
        ds.set_epoch(2)
    for one, other in zip(here.__getitems__(range(12)), there.__getitems__(range(12)), strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert np.array_equal(value, other[key]), key
            assert type(value) is type(other[key])


def test_an_epoch_has_every_row_once_in_the_streams_order(stream, published):
    ds = stream(dtype="uint8", seed=5)
    loader = ds.loader(batch_size=8)
    for epoch in range(2):
        order = in_order(ds, epoch)
        assert rows_of(loader) == order
        assert sorted(order) == PLACES
    for sample in loader:
        for id, image in zip(sample["id"], sample["image"], strict=True):
            row = PLACES.index(int(id[4:]))
            assert np.array_equal(image[0].numpy(), published.volume(row))
        break
    assert rows_of(ds.loader(batch_size=8, shuffle=False)) == PLACES
    assert sorted(rows_of(DataLoader(ds, batch_size=8, shuffle=True))) == PLACES


@pytest.mark.parametrize(
    "start", ["fork", *(pytest.param(s, marks=pytest.mark.slow) for s in ("spawn", "forkserver"))]
)
def test_it_works_in_workers_however_they_start(stream, start):
    ds = stream(cache_limit=200_000)
    ds[0]
    loader = ds.loader(
        batch_size=5, num_workers=1, persistent_workers=True, multiprocessing_context=start
    )
    assert rows_of(loader) == in_order(ds)
    assert rows_of(loader) == in_order(ds, 1)


def test_a_generator_makes_what_no_source_has(published, tmp_path, recorder):
    generator = recorder()
    generator.name = "tiny"
    wider = tiny_manifest(3000)
    rows = wider.select(ids=wider.table.index[[*PLACES[:30], *range(20, 30)]])
    packs = PackVolumes(published.manifest, str(published.folder))
    ds = SynthBrainStream(rows, sources=[packs], generator=generator, dtype="uint8")
    for sample in ds.loader(batch_size=8):
        assert set(sample["made_by"]) == {MADE_BY}
    assert sorted(generator.made) == [f"tiny{n:06d}" for n in range(20, 30)]


# Where volumes come from


def test_by_default_packs_are_those_of_the_header_or_beside_the_manifest(
    published, stream, tmp_path
):
    source = PacksSource(kind="packs", url=f"file://{published.folder}", made_by=MADE_BY)
    header = published.manifest.header.model_copy(update={"sources": {"disk": source}})
    named = Manifest(header, published.manifest.table, published.manifest.positions)
    assert SynthBrainStream(named)[0]["made_by"] == MADE_BY

    beside = tmp_path / "beside"
    Manifest(published.manifest.header, named.table, named.positions).save(beside)
    (beside / "packs").symlink_to(published.folder / "packs")
    assert SynthBrainStream(beside)[1]["made_by"] == MADE_BY
    assert SynthBrainStream(beside / "manifest.json")[1]["made_by"] == MADE_BY
    files = {f"set/{path.name}": path.read_bytes() for path in beside.iterdir() if path.is_file()}
    with FaultyServer(files | published.files).running() as server:
        for address in (f"{server.url}/set", f"{server.url}/set/manifest.json"):
            found = SynthBrainStream(address, cache=tmp_path / address[-4:])
            assert found[2]["made_by"] == MADE_BY


@pytest.mark.slow
def test_packs_in_an_object_store_with_forked_workers(published, stream, monkeypatch):
    pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "a")
    with ObjectStore().running() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        for key, data in published.files.items():
            server.put("bucket", key, data)
        ds = stream(sources=["s3://bucket/set"])
        assert rows_of(ds.loader(batch_size=5, num_workers=2)) == in_order(ds)


def test_what_a_stream_cannot_do_is_said(stream, published, tmp_path):
    with pytest.raises(UsageError, match="nothing to stream tiny"):
        SynthBrainStream(published.manifest)
    with pytest.raises(UsageError, match="no store, found store='x'; name the folder of its cache"):
        stream(store="x")
    with pytest.raises(UsageError, match="a stream gives volumes, found representation='latent'"):
        stream(representation="latent")
    with pytest.raises(UsageError, match="sources must be a list"):
        stream(sources="hf://datasets/org/name")
    with pytest.raises(UsageError, match="fill a SynthBrainDataset"):
        stream().fill()
    for window in (0, 1.5, "many"):
        with pytest.raises(UsageError, match="window must be a whole number of rows from 1"):
            stream(window=window)
    with pytest.raises(UsageError, match="cache_limit must be 1 bytes or more"):
        stream(cache_limit="a lot")


# Fetching


@pytest.fixture
def server(published):
    with FaultyServer(dict(published.files)).running() as running:
        running.packs = f"{running.url}/set"
        yield running


def test_a_run_is_one_request(stream, server):
    ds = stream(sources=[server.packs], window=8)
    supply = ds.supply()
    assert supply.missing(np.arange(10)).all()
    assert supply.prepare(np.array([3]))
    asked = len(server.log)
    assert not supply.missing(np.arange(10)).any()
    assert supply.missing(np.arange(10, 50)).all()
    assert supply.prepare(np.array([15]))
    assert len(server.log) == asked + 1
    assert len(ds.missing()) == 30


def test_what_is_here_is_not_fetched_again(stream, server):
    ds = stream(sources=[server.packs])
    loader = ds.loader(batch_size=8)
    assert rows_of(loader) == in_order(ds)
    joined(looking_ahead())
    asked = len(server.log)
    assert rows_of(loader) == in_order(ds, 1)
    assert len(server.log) == asked


def test_a_small_cache_is_filled_row_by_row_and_says_so(stream, server, caplog):
    ds = stream(sources=[server.packs], cache_limit=60_000)
    supply = ds.supply()
    assert "every volume takes a request of its own" in caplog.text
    supply.prepare(np.array([3]))
    assert len(ds.missing()) == 49


def test_ranks_on_several_machines_fetch_only_their_own(stream, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    ds = stream()
    ds.supply().prepare(np.array([3]))
    assert len(ds.missing()) == 49


def test_a_volume_on_its_way_is_waited_for(stream, server):
    ds, other = stream(sources=[server.packs]), stream()
    ds[40]
    asked = len(server.log)
    run = ds.resolver.run_path(3)
    claims.claim(run)
    got = []
    with claims.held([run]):
        asking = threading.Thread(target=lambda: got.append(ds[3]))
        asking.start()
        asking.join(0.3)
        assert asking.is_alive()
        other.resolver.fetch(np.array([3]))
        asking.join(20)
        assert got[0]["id"] == "tiny000003"
        assert len(server.log) == asked
        asking = threading.Thread(target=lambda: got.append(ds[4]))
        asking.start()
    asking.join(20)  # whoever was fetching gave up: fetched by who asks
    assert got[1]["id"] == "tiny000004"


def test_flipped_bytes_are_never_served(stream, published, server, caplog):
    pack = published.folder / "packs" / "block-0001.zarr.zip"
    extent = read_directory(FileBytes(pack))["c.5.0.0.0"]
    flipped = bytearray(pack.read_bytes())
    flipped[extent.offset + 200] ^= 16
    server.files["set/packs/block-0001.zarr.zip"] = bytes(flipped)
    ds = stream(sources=[server.packs], dtype="uint8")
    with pytest.raises(MissingVolumeError, match="'tiny001005' first, could not be fetched"):
        rows_of(ds.loader(batch_size=1))
    with pytest.raises(MissingVolumeError):
        ds[PLACES.index(1005)]
    assert "gave a bad volume of tiny001005" in caplog.text
    joined(looking_ahead())
    assert "tiny001005" in ds.missing()
    mirrored = stream(sources=[server.packs, published.folder], dtype="uint8")
    row = PLACES.index(1005)
    assert np.array_equal(mirrored[row]["image"][0].numpy(), published.volume(row))


def test_flipped_bytes_in_the_cache_are_fetched_again(stream, published, caplog):
    ds = stream(dtype="uint8")
    ds[3]
    path = ds.resolver.path(3)
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    assert np.array_equal(ds[3]["image"][0].numpy(), published.volume(3))
    assert "is damaged" in caplog.text


def test_a_server_that_fails_now_and_then_is_asked_again(stream, server, caplog):
    ds = stream(sources=[server.packs])
    server.faults += [None, None, 503, "break", None, 429, "break"]
    with caplog.at_level(logging.WARNING, "synthbrain"):
        assert rows_of(ds.loader(batch_size=8)) == in_order(ds)
    assert caplog.text == ""


# The cache


def test_volumes_that_no_source_has_are_never_deleted(published, stream, tmp_path):
    wider = tiny_manifest(3000)
    mine = wider.select(ids=wider.table.index[100:104])
    kept = Resolver(mine, tmp_path / "cache", TinyGenerator())
    list(kept.fill(kept.plan()))
    limit = 10 * published.size
    ds = stream(cache=tmp_path / "cache", cache_limit=limit)
    assert rows_of(ds.loader(batch_size=8)) == in_order(ds)
    joined(looking_ahead())
    assert kept.stored().all()
    assert kept.recipes.positions()[4:] != []
    assert ds.resolver.cache.used() <= limit


def test_selections_of_a_set_make_room_for_one_another(published, tmp_path):
    rows = published.manifest
    header = rows.header.model_copy(update={"sources": {}})
    saved = Manifest(header, rows.table, rows.positions, rows.sha256)
    options = {
        "sources": [published.folder], "cache": tmp_path, "cache_limit": 10 * published.size
    }  # fmt: skip
    for selection in ({"ids": rows.table.index[:25]}, {"ids": rows.table.index[25:]}):
        ds = SynthBrainStream(saved, **options, **selection)
        rows_of(ds.loader(batch_size=5))
        joined(looking_ahead())
        assert len(ds.missing()) < 25 - 5


CONSUMER = """
    import json, sys
    from pathlib import Path
    import numpy as np
    from synthbrain.manifest import Manifest
    from synthbrain.stream import SynthBrainStream

    folder, url, cache, limit, seed, volumes = sys.argv[1:]
    expected = np.load(volumes)
    stream = SynthBrainStream(
        Manifest.open(folder), sources=[url], cache=cache, cache_limit=int(limit), dtype="uint8",
        seed=int(seed), window=8,
    )
    loader = stream.loader(batch_size=5)
    epoch = 0
    while epoch < 2 or seed == "0":  # the first goes on until it is killed
        epoch += 1
        for batch in loader:
            for id, image in zip(batch["id"], batch["image"]):
                row = stream.manifest.table.index.get_loc(id)
                assert np.array_equal(image[0].numpy(), expected[row]), id
            print("batch", flush=True)
"""


def test_three_processes_share_a_cache_and_one_is_killed(published, server, tmp_path):
    manifest = Manifest(
        published.manifest.header, published.manifest.table, published.manifest.positions
    )
    manifest.save(tmp_path / "rows")
    np.save(tmp_path / "volumes.npy", [published.volume(row) for row in range(50)])
    cache, limit = tmp_path / "cache", 20 * published.size
    command = [sys.executable, "-c", textwrap.dedent(CONSUMER), tmp_path / "rows", server.packs]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [
        subprocess.Popen(
            [*command, cache, str(limit), str(seed), tmp_path / "volumes.npy"], **pipes
        )
        for seed in range(3)
    ]
    try:
        assert running[0].stdout.readline() == "batch\n"
        most = 0
        while running[1].poll() is None or running[2].poll() is None:
            most = max(most, bytes_of_shards(cache))
            if most > limit // 2 and running[0].poll() is None:
                running[0].send_signal(signal.SIGKILL)
        assert running[0].wait() == -signal.SIGKILL
        for process in running[1:]:
            assert process.returncode == 0, process.stderr.read()[-3000:]
    finally:
        for process in running:
            process.kill()
            process.communicate()
    assert limit // 2 < most <= limit

    ds = SynthBrainStream(manifest, sources=[server.packs], cache=cache, cache_limit=limit)
    rows_of(ds.loader(batch_size=5))
    joined(looking_ahead())
    assert bytes_of_shards(cache) <= limit
    left = {path.name for path in cache.rglob("*.room")} | {
        p.name for p in cache.rglob("*.partial")
    }
    assert all(f".{os.getpid()}." in name for name in left)


# Going on


@settings(max_examples=60)
@given(data=st.data(), before=st.integers(1, 5), after=st.integers(1, 5), seed=SEEDS)
def test_the_rest_is_the_same_in_any_world(stream, data, before, after, seed):
    ds = stream(window=16)
    world = [ds.sampler(seed=seed, rank=rank, world_size=before, ahead=0) for rank in range(before)]
    stop = data.draw(st.integers(0, len(world[0])))
    drawn = [list(itertools.islice(iter(each), stop)) for each in world]
    states = [each.state_dict(consumed=stop) for each in world]
    assert all(state == states[0] for state in states)
    state = json.loads(json.dumps(states[0]))
    others = [ds.sampler(rank=rank, world_size=after, ahead=0) for rank in range(after)]
    for each in others:
        each.load_state_dict(state)
    epoch, position = state["epoch"], state["position"]
    order = stream_order(runs_of(ds.manifest.positions), seed, epoch, 16).tolist()
    assert epoch == (stop == len(world[0]))
    if epoch == 0:
        together = [row for step in zip(*drawn, strict=True) for row in step]
        assert together == order[:position]
    rest = [row for step in zip(*others, strict=True) for row in step]
    assert rest[: 50 - position] == order[position:]
    assert rest[50 - position :] == (order * 2)[: len(rest) - (50 - position)]


RESUMED = """
    import json, sys
    from synthbrain.manifest import Manifest
    from synthbrain.stream import SynthBrainStream

    def main():
        for workers, ranks in ((0, 1), (2, 1), (3, 2)):
            parts = []
            for rank in range(ranks):
                stream = SynthBrainStream(Manifest.open(sys.argv[1]), sources=[sys.argv[2]],
                                          window=16, patch_size=4)
                sampler = stream.sampler(rank=rank, world_size=ranks)
                sampler.load_state_dict(json.loads(sys.argv[3]))
                loader = stream.loader(batch_size=1, sampler=sampler, num_workers=workers)
                parts.append([(b["id"][0], b["patch_start"][0].tolist()) for b in loader])
            print(json.dumps([one for step in zip(*parts) for one in step]))

    main()
"""


def test_a_run_goes_on_in_a_new_process(stream, published, python, tmp_path):
    rows = published.manifest
    Manifest(rows.header, rows.table, rows.positions).save(tmp_path / "rows")
    ds = stream(window=16, patch_size=4)
    sampler = ds.sampler(seed=11)
    sampler.set_epoch(6)
    batches = iter(ds.loader(batch_size=3, sampler=sampler, num_workers=2))
    for step in range(1, 5):
        next(batches)
        state = sampler.state_dict(consumed=3 * step)
    rest = [
        [id, start.tolist()]
        for batch in batches
        for id, start in zip(batch["id"], batch["patch_start"], strict=True)
    ]
    assert len(rest) == 50 - 12
    out = python(RESUMED, tmp_path / "rows", published.folder, json.dumps(state))
    for line in out.splitlines():
        assert json.loads(line)[:38] == rest


@pytest.mark.parametrize("workers", [0, 2])
def test_torchdata_counts_for_itself(stream, workers):
    module = pytest.importorskip("torchdata.stateful_dataloader")

    def opened():
        ds = stream(window=16, patch_size=4)
        sampler = ds.sampler()
        return module.StatefulDataLoader(ds, 4, sampler=sampler, num_workers=workers)

    loader = opened()
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    state = pickle.loads(pickle.dumps(loader.state_dict()))
    rest = [(b["id"], b["patch_start"].tolist()) for b in batches]
    again = opened()
    again.load_state_dict(state)
    assert [(b["id"], b["patch_start"].tolist()) for b in again] == rest


def test_order_and_patches_are_of_the_same_epoch(stream):
    ds = stream(patch_size=4)
    loader = ds.loader(batch_size=50, num_workers=1, persistent_workers=True)
    found = [next(iter(loader))]
    ds.set_epoch(9)
    found += [next(iter(loader)), next(iter(loader))]
    loader.sampler.set_epoch(4)
    found.append(next(iter(loader)))
    for epoch, batch in zip((0, 9, 10, 4), found, strict=True):
        order = stream_order(runs_of(ds.manifest.positions), 0, epoch)
        ds.set_epoch(epoch)
        samples = ds.__getitems__(order)
        assert batch["id"] == [sample["id"] for sample in samples]
        starts = np.stack([sample["patch_start"] for sample in samples])
        assert np.array_equal(batch["patch_start"].numpy(), starts)


def test_states_of_another_window_or_of_none_are_refused(stream):
    state = stream(window=16).sampler(ahead=0).state_dict()
    assert set(state) == {"rows_digest", "seed", "epoch", "position", "window"}
    with pytest.raises(UsageError, match="an order with window=16, and the stream's is 8"):
        stream(window=8).sampler(ahead=0).load_state_dict(state)
    with pytest.raises(UsageError, match="window=None"):
        stream().sampler(ahead=0).load_state_dict({})
    with pytest.raises(UsageError, match="this state is of rows"):
        stream(window=16, limit=20).sampler(ahead=0).load_state_dict(state)


def test_leaving_an_epoch_early_leaves_nobody_behind(stream):
    ds = stream()
    batches = iter(ds.loader(batch_size=2))
    next(batches)
    del batches
    until = time.monotonic() + 20
    while looking_ahead() and time.monotonic() < until:
        time.sleep(0.02)
    assert looking_ahead() == []
