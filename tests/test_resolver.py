import logging
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from synthbrain import claims
from synthbrain.errors import (
    DamagedShardError,
    GeneratorError,
    ManifestError,
    MissingVolumeError,
    SourceError,
    StoreError,
    StoreFullError,
)
from synthbrain.generators import identity
from synthbrain.header import Geometry
from synthbrain.manifest import Manifest
from synthbrain.plan import Plan
from synthbrain.quantise import quantise
from synthbrain.resolver import ReadOnlyStoreWarning, Resolver
from synthbrain.rows import make_table
from synthbrain.sources.base import Cost
from synthbrain.testing import TINY, TinyGenerator, tiny_manifest


def expected(manifest):
    """What the tiny generator makes of every row, as stored."""
    volumes = TinyGenerator(manifest.header.geometry.shape).sample(manifest.table)[:, 0].numpy()
    return [quantise(volume, manifest.header.geometry) for volume in volumes]


def flip(path, position=20):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def fill(resolver):
    return sorted(resolver.fill(resolver.plan()))


class ListSource:
    """Gives some volumes of a list."""

    def __init__(self, name, volumes, made_by="published", seconds=1.0, fails_after=None):
        self.name, self.volumes, self.made_by = name, volumes, made_by
        self.seconds, self.fails_after = seconds, fails_after
        self.asked = []

    def holds(self, ids):
        return np.array([id in self.volumes for id in ids], dtype=bool)

    def cost(self, ids):
        return Cost(bytes=100 * len(ids), seconds=self.seconds * len(ids))

    def fetch(self, ids, geometry):
        for count, id in enumerate(ids):
            if count == self.fails_after:
                raise SourceError("the line went dead")
            self.asked.append(id)
            yield id, self.volumes[id]


@pytest.fixture
def manifest():
    return tiny_manifest(10)


@pytest.fixture
def generator(recorder):
    return recorder()


@pytest.fixture
def resolver(manifest, generator, tmp_path):
    return Resolver(manifest, tmp_path / "store", generator)


@pytest.fixture
def published():
    """Six rows: the even ones published, the odd ones recipes."""
    tiny = tiny_manifest(6)
    columns = {name: tiny.table[name].to_numpy() for name in tiny.table.columns}
    columns["origin"] = np.array(["published", "recipe"] * 3, dtype=object)
    columns["seed"] = pd.array([pd.NA, 1] * 3, dtype="Int64")
    return Manifest.create(tiny.header, make_table(columns, tiny.table.index))


def black(manifest):
    return {id: np.zeros(TINY.shape, np.uint8) for id in manifest.table.index}


# Plan


def test_a_plan_only_looks(resolver, generator):
    plan = resolver.plan()
    assert plan.sample.tolist() == list(range(10))
    assert plan.missing == 10
    assert generator.batches == []
    assert not resolver.folder.exists()


def test_a_plan_counts_what_is_stored_fetched_sampled_and_unavailable(published, tmp_path):
    ids = published.table.index
    source = ListSource("shelf", {ids[0]: black(published)[ids[0]]})
    resolver = Resolver(published, tmp_path, TinyGenerator(), sources=[source])
    list(resolver.fill(resolver.plan([1])))
    plan = resolver.plan()
    assert plan.stored.tolist() == [1]
    assert {name: rows.tolist() for name, rows in plan.fetch.items()} == {"shelf": [0]}
    assert plan.sample.tolist() == [3, 5]
    assert plan.unavailable.tolist() == [2, 4]
    assert plan.missing == 3
    text = str(plan)
    for part in ("1 stored", "1 to fetch from shelf", "2 to sample", "2 not available", "free"):
        assert part in text


@pytest.mark.parametrize(("seconds", "words"), [(5, "5 s"), (600, "10 min"), (9000, "2.5 h")])
def test_a_plan_tells_time_and_room_in_human_units(seconds, words):
    none = np.zeros(0, np.int64)
    plan = Plan(none, {}, np.arange(3), none, 2_500_000, 0, seconds, 3_000_000_000_000)
    assert words in str(plan)
    assert "2.5 MB of 3 TB free disk" in str(plan)


# Making


def test_filling_stores_exactly_what_the_generator_makes(resolver, manifest, generator):
    assert fill(resolver) == list(range(10))
    assert [len(batch) for batch in generator.batches] == [4, 4, 2]
    for index, volume in enumerate(expected(manifest)):
        assert np.array_equal(resolver.recipes.read(index), volume)
    assert fill(resolver) == []
    assert len(generator.made) == 10
    assert not list(resolver.recipes.root.glob("*/*.claim"))


def test_volumes_of_a_list_are_made_in_one_call_and_come_in_order(resolver, manifest, generator):
    generator.batch_size = 16
    found = resolver.volumes([7, 2, 7, 5])
    for index, volume in zip([7, 2, 7, 5], found, strict=True):
        assert np.array_equal(volume, expected(manifest)[index])
    assert [sorted(batch) for batch in generator.batches] == [
        manifest.table.index[[2, 5, 7]].tolist()
    ]
    found[0][:] = 0
    assert found[2].any(), "the same row asked for twice shares its memory"


def test_patches_of_missing_rows_are_boxes_of_their_volumes(resolver, manifest, generator):
    found = resolver.patches([3, 1], [(0, 0, 0), (4, 5, 6)], (4, 4, 4))
    assert np.array_equal(found[0], expected(manifest)[3][:4, :4, :4])
    assert np.array_equal(found[1], expected(manifest)[1][4:8, 5:9, 6:10])
    assert len(generator.batches) == 1
    again = resolver.patches([3, 1], [(0, 0, 0), (4, 5, 6)], (4, 4, 4))
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
    assert len(generator.batches) == 1


def test_without_a_generator_missing_rows_raise_and_say_what_to_do(manifest, tmp_path):
    resolver = Resolver(manifest, tmp_path)
    with pytest.raises(MissingVolumeError, match="synthbrain fill") as refused:
        resolver.volumes([0])
    assert "tiny000000" in str(refused.value)
    with pytest.raises(MissingVolumeError):
        fill(resolver)


def test_claims_are_given_up_when_the_generator_fails(resolver, monkeypatch):
    def fail(rows):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(resolver.generator, "sample", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        fill(resolver)
    assert not list(resolver.folder.rglob("*.claim"))
    monkeypatch.undo()
    assert fill(resolver) == list(range(10))


def test_a_row_somebody_else_is_making_is_waited_for(resolver, manifest, generator):
    import threading

    shard = resolver.path(4)
    assert claims.claim(shard)

    def finish():
        resolver.recipes.write(4, np.zeros(TINY.shape, np.uint8))
        claims.release(shard)

    timer = threading.Timer(0.3, finish)
    timer.start()
    volumes = dict(resolver.execute(resolver.plan()))
    timer.join()
    assert sorted(volumes) == list(range(10))
    assert not volumes[4].any()
    assert manifest.table.index[4] not in generator.made


def test_a_row_whose_maker_gives_up_is_made_here(resolver, manifest, generator):
    import threading

    assert claims.claim(resolver.path(4))
    timer = threading.Timer(0.2, claims.release, [resolver.path(4)])
    timer.start()
    assert fill(resolver) == list(range(10))
    timer.join()
    assert generator.made.count(manifest.table.index[4]) == 1


def test_old_leftovers_are_swept_by_a_fill(resolver):
    import os

    shard = resolver.path(0)
    shard.parent.mkdir(parents=True)
    leftover = shard.with_name(".c.0.0.0.0.host.1.ab.partial")
    leftover.write_bytes(b"half")
    os.utime(leftover, (0, 0))
    fill(resolver)
    assert not leftover.exists()


# Wrong generators


class Wrong(TinyGenerator):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def sample(self, rows):
        return self.change(super().sample(rows))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x[:, 0], "shape (4, 16, 24, 16) for 4 rows, expected (4, 1, 16, 24, 16)"),
        (lambda x: x[:-1], "shape (3, 1, 16, 24, 16) for 4 rows"),
        (lambda x: x[..., :-1], "expected (4, 1, 16, 24, 16)"),
        (lambda x: x.squeeze()[0], "expected (4, 1, 16, 24, 16)"),
        (lambda x: x * float("nan"), "must be finite"),
        (lambda x: x / 0, "must be finite"),
        (lambda x: x * 2, "must lie in [0, 1]"),
        (lambda x: x - 1, "must lie in [0, 1]"),
    ],
)
def test_a_wrong_volume_is_refused_and_not_kept(manifest, tmp_path, change, says):
    resolver = Resolver(manifest, tmp_path, Wrong(change))
    with pytest.raises(GeneratorError) as refused:
        fill(resolver)
    assert says in str(refused.value)
    assert "tiny-01234567" in str(refused.value)
    assert resolver.recipes.positions() == []
    assert not list(tmp_path.rglob("*.claim"))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.double(),
        lambda x: x.bfloat16(),
        lambda x: x.requires_grad_(),
        lambda x: x + 5e-4,
    ],
    ids=["float64", "bfloat16", "gradients", "rounding"],
)
def test_other_float_types_gradients_and_rounding_are_taken(manifest, tmp_path, change):
    resolver = Resolver(manifest, tmp_path, Wrong(change))
    assert fill(resolver) == list(range(10))
    error = np.abs(resolver.recipes.read(0).astype(int) - expected(manifest)[0])
    assert error.max() <= 1


def test_a_generator_of_another_shape_is_refused(manifest, tmp_path):
    with pytest.raises(GeneratorError, match=r"\(8, 8, 8\).*holds \(16, 24, 16\)"):
        Resolver(manifest, tmp_path, TinyGenerator((8, 8, 8)))


def test_an_unconditional_generator_is_for_unconditional_manifests(manifest, tmp_path):
    generator = TinyGenerator()
    generator.honours = frozenset({"age"})
    with pytest.raises(GeneratorError, match="ignores brain_volume, sex, ventricular_volume"):
        Resolver(manifest, tmp_path, generator)
    header = manifest.header.model_copy(update={"conditional": False})
    assert Resolver(Manifest.create(header, manifest.table), tmp_path, generator)


def test_volumes_of_two_generators_never_mix(manifest, tmp_path):
    other = Wrong(lambda x: 1 - x)
    other.name, other.digest = "other", "f" * 16
    first, second = (Resolver(manifest, tmp_path, g) for g in (TinyGenerator(), other))
    a, b = first.volumes([0])[0], second.volumes([0])[0]
    assert not np.array_equal(a, b)
    assert first.path(0) != second.path(0)
    assert np.array_equal(first.volumes([0])[0], a)
    with pytest.raises(GeneratorError, match=r"other-ffffffff, tiny-01234567.*made_by="):
        Resolver(manifest, tmp_path)
    for resolver, volume in ((first, a), (second, b)):
        reader = Resolver(manifest, tmp_path, made_by=resolver.made_by)
        assert np.array_equal(reader.volumes([0])[0], volume)
    with pytest.raises(GeneratorError, match="pass generator=None"):
        Resolver(manifest, tmp_path, other, made_by=first.made_by)


def test_the_only_maker_is_found(manifest, tmp_path):
    fill(Resolver(manifest, tmp_path, TinyGenerator()))
    assert Resolver(manifest, tmp_path).made_by == identity(TinyGenerator())


def test_two_manifests_of_one_name_never_mix(tmp_path):
    one, two = (tiny_manifest(4, seed=seed) for seed in (0, 1))
    assert one.name == two.name
    fill(Resolver(one, tmp_path, TinyGenerator()))
    assert Resolver(two, tmp_path, TinyGenerator()).plan().missing == 4


# Sources


def test_published_rows_are_fetched_and_never_sampled(published, tmp_path, recorder):
    generator = recorder()
    resolver = Resolver(published, tmp_path, generator)
    with pytest.raises(MissingVolumeError, match=r"were published.*sources="):
        resolver.volumes([0, 1])
    assert generator.batches == []
    source = ListSource("shelf", black(published))
    resolver = Resolver(published, tmp_path, generator, sources=[source])
    assert fill(resolver) == list(range(6))
    assert source.asked == published.table.index[[0, 2, 4]].tolist()
    assert generator.made == published.table.index[[1, 3, 5]].tolist()
    assert [resolver.maker_of(i) for i in (0, 1)] == ["published", "tiny-01234567"]
    assert resolver.published.positions() == [0, 2, 4]
    assert resolver.recipes.positions() == [1, 3, 5]


def test_the_cheapest_source_is_asked_first(published, tmp_path):
    ids = published.table.index
    near = ListSource("near", {ids[0]: black(published)[ids[0]]}, seconds=0.1)
    far = ListSource("far", black(published), seconds=9.0)
    resolver = Resolver(published, tmp_path, TinyGenerator(), sources=[far, near])
    fill(resolver)
    assert near.asked == [ids[0]]
    assert far.asked == [ids[2], ids[4]]


def test_a_source_gives_only_volumes_of_its_own_maker(manifest, tmp_path, recorder):
    generator = recorder()
    source = ListSource("shelf", black(manifest), made_by="other-ffffffff")
    fill(Resolver(manifest, tmp_path / "a", generator, sources=[source]))
    assert source.asked == []
    source = ListSource("shelf", black(manifest), made_by=identity(generator))
    generator.batches.clear()
    fill(Resolver(manifest, tmp_path / "b", generator, sources=[source]))
    assert len(source.asked) == 10
    assert generator.made == []


def test_what_a_failing_source_leaves_is_sampled(manifest, tmp_path, recorder, caplog):
    generator = recorder()
    source = ListSource("shelf", black(manifest), identity(generator), fails_after=3)
    assert fill(Resolver(manifest, tmp_path, generator, sources=[source])) == list(range(10))
    assert sorted(generator.made) == manifest.table.index[3:].tolist()
    assert "the line went dead" in caplog.text


def test_a_lost_published_row_does_not_keep_recipes_from_being_made(published, tmp_path):
    source = ListSource("shelf", black(published), fails_after=1)
    resolver = Resolver(published, tmp_path, TinyGenerator(), sources=[source])
    with pytest.raises(MissingVolumeError, match="2 rows, 'tiny000002' first"):
        fill(resolver)
    assert resolver.stored().tolist() == [True, True, False, True, False, True]


# Damage


def test_a_damaged_row_is_made_again_logged_once_and_kept(resolver, manifest, generator, caplog):
    fill(resolver)
    generator.batches.clear()
    flip(resolver.path(3))
    damaged = resolver.path(3).read_bytes()
    with caplog.at_level(logging.WARNING, "synthbrain"):
        for _ in range(2):
            assert np.array_equal(resolver.volumes([3])[0], expected(manifest)[3])
    assert generator.made == [manifest.table.index[3]]
    assert resolver.path(3).with_name("c.3.0.0.0.bad").read_bytes() == damaged
    (record,) = caplog.records
    assert "tiny000003 is damaged" in record.message


def test_damage_is_healed_in_batches_and_patches_too(resolver, manifest, generator):
    fill(resolver)
    generator.batches.clear()
    flip(resolver.path(3))
    resolver.path(5).write_bytes(b"")
    found = resolver.volumes([2, 3, 5])
    assert all(
        np.array_equal(v, expected(manifest)[i]) for i, v in zip([2, 3, 5], found, strict=True)
    )
    assert len(generator.batches) == 1
    flip(resolver.path(3))
    (patch,) = resolver.patches([3], [(0, 0, 0)], (4, 4, 4))
    assert np.array_equal(patch, expected(manifest)[3][:4, :4, :4])
    assert all(damage is None for _, damage in resolver.recipes.verify())


def test_without_healing_damage_raises(manifest, tmp_path, generator):
    resolver = Resolver(manifest, tmp_path, generator, heal=False)
    fill(resolver)
    for break_it in (flip, lambda path: path.write_bytes(b"")):
        break_it(resolver.path(3))
        for act in (
            lambda: resolver.volumes([3]),
            lambda: resolver.volumes([2, 3]),
            lambda: resolver.patches([3], [(0, 0, 0)], (4, 4, 4)),
        ):
            with pytest.raises(DamagedShardError, match=str(resolver.path(3))):
                act()
    assert resolver.path(3).exists()
    assert len(generator.made) == 10


def test_damage_that_nothing_can_mend_raises(manifest, tmp_path):
    fill(Resolver(manifest, tmp_path, TinyGenerator()))
    reader = Resolver(manifest, tmp_path)
    flip(reader.path(3))
    with pytest.raises(MissingVolumeError):
        reader.volumes([3])


# Full and read-only disks


def test_too_little_room_is_said_before_anything_is_made(
    manifest, tmp_path, generator, monkeypatch
):
    free = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    resolver = Resolver(manifest, tmp_path, generator)
    with pytest.raises(StoreFullError, match=r"10 volumes need about .* has 100 B free") as refused:
        fill(resolver)
    assert "--store" in str(refused.value)
    assert generator.batches == []


def test_a_disk_that_fills_up_keeps_whole_volumes_and_filling_resumes(small_disk, recorder):
    manifest, generator = tiny_manifest(60), recorder()
    disk, remount = small_disk("300k")
    resolver = Resolver(manifest, disk, generator)
    with pytest.raises(StoreFullError, match="no room for another volume"):
        fill(resolver)
    kept = resolver.stored().sum()
    assert 5 < kept < 60
    assert sorted(resolver.recipes.positions()) == np.flatnonzero(resolver.stored()).tolist()
    assert all(damage is None for _, damage in resolver.recipes.verify())
    leftovers = [path.name for path in disk.rglob("*") if "partial" in path.name]
    assert leftovers + list(disk.rglob("*.claim")) == []
    remount("size=4m")
    generator.batches.clear()
    assert len(fill(resolver)) == 60 - kept
    assert len(generator.made) == 60 - kept
    for index, volume in enumerate(expected(manifest)):
        assert np.array_equal(resolver.recipes.read(index), volume)


def test_a_read_only_store_serves_what_it_has_and_makes_the_rest(small_disk, recorder):
    manifest, generator = tiny_manifest(8), recorder()
    disk, remount = small_disk("1m")
    list(Resolver(manifest, disk, generator).fill(Resolver(manifest, disk, generator).plan([0, 1])))
    remount("ro")
    resolver = Resolver(manifest, disk, generator)
    generator.batches.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(resolver.volumes([0, 1])) == 2
    with pytest.warns(ReadOnlyStoreWarning, match="served but not kept") as caught:
        found = resolver.volumes([1, 2, 3])
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolver.volumes([1, 2, 3])
    assert all(
        np.array_equal(volume, expected(manifest)[i]) for i, volume in enumerate(found, start=1)
    )
    assert [len(batch) for batch in generator.batches] == [2, 2]
    assert len(resolver.patches([4, 5], [(0, 0, 0)] * 2, (4, 4, 4))) == 2
    assert [len(batch) for batch in generator.batches] == [2, 2, 2]
    assert resolver.stored().sum() == 2
    fresh = Resolver(manifest, disk, generator)
    with (
        pytest.raises(StoreError, match="cannot be written to"),
        pytest.warns(ReadOnlyStoreWarning),
    ):
        fill(fresh)
    remount("rw")
    assert len(fill(fresh)) == 6


def test_a_folder_without_permission_is_a_read_only_store(tmp_path_factory, python):
    folder = tmp_path_factory.mktemp("shared")
    out = python(
        """
        import os, sys, tempfile, warnings
        from pathlib import Path
        from synthbrain.errors import StoreError
        from synthbrain.resolver import ReadOnlyStoreWarning, Resolver
        from synthbrain.testing import TinyGenerator, tiny_manifest

        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o755)
            manifest = tiny_manifest(6)
            resolver = Resolver(manifest, Path(folder) / "store", TinyGenerator())
            list(resolver.fill(resolver.plan([0])))
            for path in (Path(folder), *Path(folder).rglob("*")):
                path.chmod(path.stat().st_mode & ~0o222)
            child = os.fork()
            if child == 0:
                if os.geteuid() == 0:
                    os.setgid(65534), os.setuid(65534)
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    assert len(resolver.volumes([0, 1, 2])) == 3
                    assert len(resolver.volumes([3])) == 1
                print([w.category.__name__ for w in caught], flush=True)
                try:
                    warnings.simplefilter("ignore")
                    list(resolver.fill(resolver.plan()))
                except StoreError as error:
                    print(error, flush=True)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            assert resolver.stored().sum() == 1
            for path in (Path(folder), *Path(folder).rglob("*")):
                path.chmod(0o755)
        """
    )
    first, second = out.splitlines()
    assert first == "['ReadOnlyStoreWarning']"
    assert "cannot be written to" in second
    assert folder.exists()


# Many processes, and processes that die

FILL = """
    import os, random, signal, sys, time
    from pathlib import Path
    import numpy as np, torch
    from synthbrain import Manifest, claims
    from synthbrain.resolver import Resolver
    from synthbrain.quantise import quantise
    from synthbrain.testing import TinyGenerator

    torch.set_num_threads(1)  # so that forked children may use torch
    manifest = Manifest.open(sys.argv[1])
    folder = Path(sys.argv[2])
    geometry = manifest.header.geometry
    cooked = TinyGenerator(geometry.shape).sample(manifest.table)
    expected = [quantise(volume.numpy(), geometry) for volume in cooked[:, 0]]

    class Slow(TinyGenerator):
        def __init__(self, log, seconds):
            super().__init__(geometry.shape, batch_size=8)
            self.log, self.seconds = log, seconds

        def sample(self, rows):
            with open(self.log, "a") as log:
                log.writelines(id + "\\n" for id in rows.index)
            time.sleep(self.seconds * len(rows))
            return cooked[[manifest.table.index.get_loc(id) for id in rows.index]]

    def fill(store, log, seconds):
        resolver = Resolver(manifest, store, Slow(log, seconds))
        for index in resolver.fill(resolver.plan()):
            pass

    def start(*args):
        child = os.fork()
        if child == 0:
            try:
                fill(*args)
            except BaseException as error:
                print("child failed:", repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        return child

    def check(store):
        reader = Resolver(manifest, store, Slow(os.devnull, 0))
        assert [d for _, d in reader.recipes.verify() if d is not None] == []
        stored = reader.stored()
        for index in np.flatnonzero(stored):
            assert np.array_equal(reader.recipes.read(index), expected[index]), index
        return int(stored.sum())
"""

KILL = (
    FILL
    + """
    random.seed(int(sys.argv[3]))
    partial, begun = 0, time.monotonic()
    assert os.waitpid(start(folder / "whole", os.devnull, 0.0005), 0)[1] == 0
    whole = time.monotonic() - begun
    for number in range(20):
        store, log = folder / str(number), folder / f"{number}.log"
        child = start(store, log, 0.0005)
        time.sleep(random.uniform(0, whole))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kept = check(store)
        partial += 0 < kept < len(manifest)
        log.write_text("")
        begun = time.monotonic()
        child = start(store, log, 0)
        assert os.waitpid(child, 0)[1] == 0
        assert time.monotonic() - begun < 4, f"kill {number}: something blocked the next fill"
        remade = log.read_text().split()
        assert len(remade) == len(set(remade)) == len(manifest) - kept, (number, kept, remade)
        assert check(store) == len(manifest)
        for leftover in store.rglob("*.claim"):
            assert claims.is_stale(leftover.with_suffix("")), leftover
    print(partial)
"""
)


@pytest.fixture(params=["larger", pytest.param("tiny", marks=pytest.mark.slow)])
def saved(request, tmp_path, of_geometry):
    """Folder of a manifest of 40 recipes."""
    large = Geometry(shape=(64, 64, 64), chunks=(32, 32, 32))
    manifest = of_geometry(TINY if request.param == "tiny" else large, 40)
    return manifest.save(tmp_path / "many")


def test_a_fill_killed_at_any_moment_leaves_whole_volumes_and_blocks_nothing(
    saved, tmp_path, python
):
    cut_short = int(python(KILL, saved, tmp_path, 1))
    assert cut_short >= 3, "the kills landed before or after the work"


SHARE = (
    FILL
    + """
    count = int(sys.argv[3])
    children = [start(folder / "store", folder / f"{number}.log", 0.005) for number in range(count)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * count
    assert check(folder / "store") == len(manifest)
    assert not list((folder / "store").rglob("*.claim"))
    made = [(folder / f"{number}.log").read_text().split() for number in range(count)]
    print(*map(len, made))
    everything = sum(made, [])
    assert set(everything) == set(manifest.table.index)
    assert len(everything) < 1.1 * len(manifest), made
"""
)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_share_a_fill_and_make_hardly_anything_twice(tmp_path, python, count):
    saved = tiny_manifest(200).save(tmp_path / "many")
    made = list(map(int, python(SHARE, saved, tmp_path, count).split()))
    assert min(made) > 10, f"one process did almost nothing: {made}"


def test_full_size_volumes_go_through(tmp_path, of_geometry):
    manifest = of_geometry(Geometry(), 2)
    resolver = Resolver(manifest, tmp_path, TinyGenerator(Geometry().shape, batch_size=1))
    assert fill(resolver) == [0, 1]
    values = TinyGenerator(Geometry().shape).sample(manifest.table)
    stored = torch.from_numpy(resolver.volumes([1])[0])
    assert float((stored / 255 - values[1, 0]).abs().max()) <= 1 / 510 + 1e-6


def test_rows_that_have_yet_to_be_read_are_refused(manifest, tmp_path):
    header = manifest.header.model_copy(update={"rows_digest": None, "rows": 0})
    empty = Manifest(header, manifest.table.iloc[:0], manifest.positions[:0])
    with pytest.raises(ManifestError, match="lie in its archive"):
        Resolver(empty, tmp_path, TinyGenerator())
