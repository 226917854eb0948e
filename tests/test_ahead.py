import logging
import math
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampled import Noise
from torch.utils.data import DataLoader

from synthbrain import SynthBrainDataset, SynthBrainSampler
from synthbrain.ahead import LookAhead
from synthbrain.errors import GeneratorError, SourceError, SynthBrainError
from synthbrain.generators import identity
from synthbrain.mixing import mix
from synthbrain.sources.base import Cost
from synthbrain.sources.folder import FolderSource
from synthbrain.testing import TinyGenerator, tiny_manifest


class Shelf:
    """Rows that are there or not; having some takes a moment."""

    def __init__(self, missing, batch=3, fails_at=None):
        self.absent, self.batch, self.fails_at = set(missing), batch, fails_at
        self.had, self.useful, self.lock = [], True, threading.Lock()

    def missing(self, rows):
        return np.array([row in self.absent for row in rows.tolist()], dtype=bool)

    def prepare(self, rows):
        with self.lock:
            if self.fails_at is not None and self.fails_at in rows:
                raise SynthBrainError("no luck today")
            self.had.append(rows.tolist())
            self.absent -= set(rows.tolist())
        return self.useful

    @property
    def rows(self):
        return [row for rows in self.had for row in rows]


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def order_of(size):
    return np.random.default_rng(size).permutation(size)


@settings(max_examples=40)
@given(st.data(), st.integers(1, 300), st.integers(1, 200), st.integers(1, 9))
def test_all_that_is_missing_is_had_once_in_order_and_never_too_early(data, size, ahead, batch):
    order = order_of(size)
    missing = data.draw(st.sets(st.integers(0, size - 1)))
    shelf = Shelf(missing, batch)
    look = LookAhead(shelf, order, ahead)
    asked = data.draw(st.integers(0, size))
    look.asked(asked)
    within = [row for row in order[: asked + ahead].tolist() if row in missing]
    until(lambda: len(shelf.rows) == len(within))
    look.asked(size)
    look.join()
    assert sorted(shelf.rows) == sorted(missing)
    assert set(shelf.rows[: len(within)]) == set(within)
    assert all(len(rows) <= batch for rows in shelf.had)
    # The first few, and the ends of the two windows.
    assert sum(len(rows) < batch for rows in shelf.had) <= math.ceil(math.log2(batch)) + 2


def test_rows_are_had_in_the_order_they_are_asked_for_and_few_at_first():
    shelf = Shelf(range(100), batch=4)
    order = order_of(100)
    look = LookAhead(shelf, order, 1000)
    look.asked(1)
    look.join()
    places = {row: place for place, row in enumerate(order.tolist())}
    starts = sorted(places[rows[0]] for rows in shelf.had)
    assert starts == [0, 1, *range(3, 100, 4)]
    assert all(np.ptp([places[row] for row in rows]) == len(rows) - 1 for rows in shelf.had)
    assert [places[row] for row in shelf.had[0]] in ([0], [1, 2])  # two are at work at a time


def test_it_stops_when_told_and_when_nothing_can_be_kept():
    shelf = Shelf(range(100))
    look = LookAhead(shelf, order_of(100), 10)
    look.asked(0)
    until(lambda: len(shelf.rows) == 10)
    look.stop()
    look.asked(100)
    look.join(20)
    assert len(shelf.rows) == 10
    full = Shelf(range(100))
    full.useful = False
    look = LookAhead(full, order_of(100), 100)
    look.asked(0)
    look.join(20)
    assert len(full.had) <= 2


def test_what_goes_wrong_is_logged_once_and_left_to_those_who_ask(caplog):
    shelf = Shelf(range(30), fails_at=7)
    look = LookAhead(shelf, np.arange(30), 30)
    with caplog.at_level(logging.WARNING, "synthbrain"):
        look.asked(0)
        look.join(20)
    assert [record.getMessage() for record in caplog.records] == [
        "volumes are no longer made ahead in this epoch: no luck today"
    ]
    assert 7 not in shelf.rows


# With a dataset


@pytest.fixture
def named(tmp_path, monkeypatch):
    """Datasets whose generator is given by name and tells a file what it made."""
    monkeypatch.setenv("NOISE_LOG", str(tmp_path / "log"))

    def make(manifest, **options):
        given = {"generator": "sampled:logged", "store": tmp_path / "store"}
        return SynthBrainDataset(manifest, **given | options)

    return make


def seeds_made(tmp_path):
    log = tmp_path / "log"
    return sorted(map(int, log.read_text().split())) if log.exists() else []


def test_missing_rows_are_stored_before_anybody_asks(named, tmp_path):
    ds = named(tiny_manifest(20))
    rows = iter(SynthBrainSampler(ds, ahead=9))
    first = next(rows)
    until(lambda: len(ds.missing()) == 10)
    assert ds._ids[first] not in ds.missing()
    rows.close()
    time.sleep(0.05)
    assert len(seeds_made(tmp_path)) == 10
    assert not [one for one in threading.enumerate() if one.name == "synthbrain-ahead"]


@pytest.mark.parametrize("loader", [DataLoader, SynthBrainDataset.loader])
def test_any_loader_has_every_volume_made_once(named, tmp_path, loader):
    manifest = tiny_manifest(20)
    ds, expected = named(manifest), Noise().sample(manifest.table)
    seen = {}
    for batch in loader(ds, batch_size=3, sampler=SynthBrainSampler(ds, seed=2)):
        seen |= dict(zip(batch["id"], batch["image"], strict=True))
    assert seeds_made(tmp_path) == sorted(manifest.table["seed"])
    for row, id in enumerate(manifest.table.index):
        assert (seen[id] - expected[row]).abs().max() < 0.01


def test_a_store_that_is_full_of_volumes_is_looked_through_once_and_starts_nothing(
    named, home, monkeypatch
):
    ds = named(tiny_manifest(20))
    ds.fill(progress=False)
    looked = []
    stored = type(ds.resolver).stored
    monkeypatch.setattr(
        type(ds.resolver), "stored", lambda self, rows: looked.extend(rows) or stored(self, rows)
    )
    sampler = SynthBrainSampler(ds)
    for _ in range(2):
        for _ in sampler:
            pass
        until(lambda: not [t for t in threading.enumerate() if t.name == "synthbrain-ahead"])
    assert sorted(looked) == list(range(20))
    assert not (home / "sampling").exists()


def test_only_what_another_process_computes_or_a_source_gives_is_had_early(tmp_path, home):
    manifest = tiny_manifest(6)
    ds = SynthBrainDataset(manifest, generator=TinyGenerator(), store=tmp_path / "store")
    assert ds.supply() is None
    assert SynthBrainDataset(manifest, generator=None, store=tmp_path / "store").supply() is None
    (tmp_path / "given").mkdir()
    source = FolderSource(tmp_path / "given")
    ds = SynthBrainDataset(
        manifest, generator=TinyGenerator(), sources=[source], store=tmp_path / "store"
    )
    list(SynthBrainSampler(ds))
    until(lambda: not [t for t in threading.enumerate() if t.name == "synthbrain-ahead"])
    assert len(ds.missing()) == 6


class Threads(TinyGenerator):
    """Notes in which threads it computes."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def sample(self, rows):
        self.seen.add(threading.current_thread().name)
        return super().sample(rows)


class Broken:
    """Says that it has everything, and fails."""

    name = "broken"
    made_by = identity(TinyGenerator())

    def holds(self, ids):
        return np.ones(len(ids), dtype=bool)

    def cost(self, ids):
        return Cost(len(ids), 1.0)

    def fetch(self, ids, geometry):
        raise SourceError("no network")


def test_what_a_source_fails_to_give_is_made_where_it_is_asked_for_alone(tmp_path):
    generator = Threads()
    ds = SynthBrainDataset(
        tiny_manifest(30), generator=generator, sources=[Broken()], store=tmp_path / "store"
    )
    for row in SynthBrainSampler(ds):
        ds[row]
    until(lambda: not [t for t in threading.enumerate() if t.name == "synthbrain-ahead"])
    assert generator.seen == {"MainThread"}


def test_a_generator_that_fails_is_the_business_of_who_asks(named, caplog, tmp_path):
    ds = named(tiny_manifest(6), generator="sampled:Picky")
    seed = int(ds.manifest.table["seed"].iloc[3])
    ds.resolver.generator.shared.spec.sampling["refused"] = [seed]
    with caplog.at_level(logging.WARNING, "synthbrain"), pytest.raises(GeneratorError) as raised:
        for _ in DataLoader(ds, sampler=SynthBrainSampler(ds, shuffle=False)):
            pass
    assert "unlucky" in str(raised.value)
    assert len(ds.missing()) <= 6 - 3


def test_a_mix_looks_ahead_on_its_synthetic_side(named, tmp_path):
    real = SynthBrainDataset(
        tiny_manifest(10, seed=5), generator=TinyGenerator(), store=tmp_path / "real"
    )
    real.fill(progress=False)
    synthetic = named(tiny_manifest(20))
    mixed = mix(real, synthetic, ratio=0.5)
    rows = iter(SynthBrainSampler(mixed))
    next(rows)
    expected = mixed.table(0).query("origin == 'synthetic'")["row"]
    until(lambda: len(synthetic.missing()) == 20 - len(expected))
    stored = np.setdiff1d(synthetic._ids, synthetic.missing())
    assert set(stored) == set(synthetic._ids[expected.to_numpy()])
    rows.close()
    assert mix(real, real, ratio=0.5).supply() is None
