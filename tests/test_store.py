import errno
import json
import os
import pickle
import threading
import time

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec, ZstdCodec

from synthbrain.errors import (
    DamagedShardError,
    GeometryError,
    MissingVolumeError,
    StoreError,
    StoreFullError,
)
from synthbrain.header import Geometry, LatentGeometry
from synthbrain.store import Store, stored_shape
from synthbrain.testing import TINY, check_store

HALF = TINY.model_copy(update={"dtype": "float16"})
FULL = Geometry()
LATENT = LatentGeometry()
GEOMETRIES = pytest.mark.parametrize(
    "geometry", [TINY, HALF, FULL, LATENT], ids=["tiny", "float16", "full size", "latent"]
)


def values(geometry=TINY, seed=0):
    draw = np.random.default_rng(seed)
    if geometry.dtype == "uint8":
        return draw.integers(0, 256, geometry.shape, dtype=np.uint8)
    return draw.random(geometry.shape).astype(geometry.dtype)


def inner_box(geometry):
    """Start and size of a box inside, astride chunks where there are several."""
    start = tuple(n // 5 for n in geometry.shape)
    return start, tuple(n - 2 * s for n, s in zip(geometry.shape, start, strict=True))


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "volumes", TINY)


@pytest.fixture
def by_zarr(tmp_path):
    """Writes volumes of a geometry with zarr-python into what becomes our store."""

    def write(geometry, volumes):
        store = Store(tmp_path / "foreign", geometry)
        array = zarr.create_array(
            store=str(store.block_path(0)),
            shape=(1000, *geometry.shape),
            shards=(1, *geometry.shape),
            chunks=(1, *geometry.chunks),
            dtype=geometry.dtype,
            compressors=[ZstdCodec(level=-1), Crc32cCodec()],
            chunk_key_encoding={"name": "default", "separator": "."},
            fill_value=0,
            zarr_format=3,
        )
        for slot, volume in volumes.items():
            array[slot] = volume
        return store

    return write


def test_the_contract_of_a_store(store):
    check_store(store)


@pytest.mark.parametrize("geometry", [HALF, FULL, LATENT], ids=["float16", "full size", "latent"])
def test_the_contract_of_a_store_of_another_geometry(tmp_path, geometry):
    check_store(Store(tmp_path, geometry))


# Presence


def test_nothing_is_created_by_looking(store):
    assert not store.has(0)
    assert store.stored([0, 1, 5000]).tolist() == [False] * 3
    assert store.positions() == []
    assert list(store.verify()) == []
    assert store.sweep() == 0
    assert not store.root.exists()


def test_a_missing_volume_raises_and_says_where_it_was_looked_for(store):
    store.write(0, values())
    for missing in (1, 2000):
        with pytest.raises(MissingVolumeError, match=f"volume {missing} is not in {store.root}"):
            store.read(missing)
        with pytest.raises(MissingVolumeError):
            store.read_patch(missing, (0, 0, 0), (1, 1, 1))


def test_blocks_hold_a_thousand_volumes_each(store):
    for position in (0, 999, 1000, 100_000):
        store.write(position, values(seed=position))
    blocks = sorted(path.name for path in store.root.iterdir())
    assert blocks == ["block-0000", "block-0001", "block-0100"]
    assert store.path(100_000).name == "c.0.0.0.0"
    assert store.positions() == [0, 999, 1000, 100_000]
    for position in (0, 999, 1000, 100_000):
        assert np.array_equal(store.read(position), values(seed=position))


def test_files_that_are_no_shards_are_passed_over(store):
    store.write(7, values())
    folder = store.block_path(0)
    for name in (
        "c.8.0.0.0.bad",
        "c.9.0.0.0.claim",
        "c.x.0.0.0",
        "c.3.0.0",
        "c.3.0.0.0.0",
        "README",
    ):
        (folder / name).write_text("hello")
    (store.root / "block-old").mkdir()
    (store.root / "block-1x2").mkdir()
    assert store.positions() == [7]
    assert [position for position, _ in store.verify()] == [7]
    assert store.stored([3, 7, 8, 9]).tolist() == [False, True, False, False]


@given(st.sets(st.integers(0, 2500), max_size=8), st.lists(st.integers(0, 2500), max_size=20))
def test_stored_is_has_for_many(tmp_path_factory, present, asked):
    store = Store(tmp_path_factory.mktemp("volumes"), TINY)
    for position in present:
        store.write(position, values())
    assert store.stored(asked).tolist() == [position in present for position in asked]
    assert [store.has(position) for position in asked] == store.stored(asked).tolist()


# Writing


def test_a_sound_volume_is_never_replaced(store):
    assert store.write(3, values(seed=1))
    before = store.path(3).stat()
    assert not store.write(3, values(seed=2))
    assert store.path(3).stat().st_mtime_ns == before.st_mtime_ns
    assert np.array_equal(store.read(3), values(seed=1))


@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_what_a_dead_writer_left_under_the_name_is_replaced(store, kept):
    store.write(3, values(seed=1))
    store.path(3).write_bytes(store.path(3).read_bytes()[:kept])
    assert store.write(3, values(seed=2))
    assert np.array_equal(store.read(3), values(seed=2))


def test_of_many_writers_of_one_volume_one_wins(store):
    barrier, wins = threading.Barrier(8), []

    def write(seed):
        barrier.wait()
        if store.write(3, values(seed=seed)):
            wins.append(seed)

    writers = [threading.Thread(target=write, args=(seed,)) for seed in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(wins) == 1
    assert np.array_equal(store.read(3), values(seed=wins[0]))
    assert sorted(os.listdir(store.block_path(0))) == ["c.3.0.0.0", "zarr.json"]


def test_files_are_readable_as_the_umask_says(store):
    before = os.umask(0o027)
    try:
        store.write(0, values())
    finally:
        os.umask(before)
    assert store.path(0).stat().st_mode & 0o777 == 0o640
    assert store.block_path(0).stat().st_mode & 0o777 == 0o750


def test_file_systems_without_hard_links_do(store, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "no hard links")

    monkeypatch.setattr(os, "link", refuse)
    check_store(store)


def test_a_store_deleted_under_a_running_process_is_begun_anew(store):
    import shutil

    store.write(0, values())
    shutil.rmtree(store.root)
    assert not store.has(0)
    store.path(0).parent.mkdir(parents=True)  # as a claim does
    store.write(0, values())
    assert np.array_equal(zarr.open_array(store.block_path(0), mode="r")[0], values())


def test_a_pickled_store_reads_the_same(store):
    store.write(5, values())
    assert np.array_equal(pickle.loads(pickle.dumps(store)).read(5), values())


def test_wrong_volumes_are_refused_and_leave_nothing(store):
    for wrong in (values().astype(np.float32), values()[:-1]):
        with pytest.raises(GeometryError):
            store.write(0, wrong)
    assert not store.root.exists()


# Damage


def test_verify_names_exactly_the_damaged(store):
    for position in range(12):
        store.write(position, values(seed=position))
    flip(store.path(2), 5)
    flip(store.path(5), -1)
    store.path(7).write_bytes(b"")
    store.path(9).write_bytes(store.path(9).read_bytes()[:-1])
    store.path(11).unlink()
    found = dict(store.verify())
    assert sorted(found) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    damaged = {position: damage for position, damage in found.items() if damage is not None}
    assert sorted(damaged) == [2, 5, 7, 9]
    assert damaged[2].path == store.path(2)
    assert "checksum" in damaged[2].problem
    assert [position for position, _ in store.verify([4, 11, 2])] == [4, 2]


def test_a_damaged_read_names_the_file(store):
    store.write(2, values())
    flip(store.path(2), 5)
    with pytest.raises(DamagedShardError, match=str(store.path(2))):
        store.read(2)
    with pytest.raises(DamagedShardError, match=str(store.path(2))):
        store.read_patch(2, (0, 0, 0), TINY.shape)


def test_damage_is_set_aside_and_kept(store):
    store.write(2, values())
    flip(store.path(2), 5)
    damaged = store.path(2).read_bytes()
    bad = store.quarantine(2)
    assert bad.name == "c.2.0.0.0.bad"
    assert bad.read_bytes() == damaged
    assert not store.has(2)
    assert store.write(2, values())
    assert store.quarantine(3).name == "c.3.0.0.0.bad"  # another process was first


def test_leftovers_are_swept_once_old(store):
    store.write(1, values())
    old, new = (store.path(n).with_name(f".c.{n}.0.0.0.host.1.ab.partial") for n in (2, 3))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    assert store.sweep() == 1
    assert new.exists()
    assert not old.exists()
    assert store.has(1)


def test_a_store_of_another_geometry_is_refused(store):
    store.write(0, values())
    for changes in ({"shape": (16, 24, 32)}, {"chunks": TINY.shape}, {"dtype": "float16"}):
        geometry = TINY.model_copy(update=changes)
        other = Store(store.root, geometry)
        for act in (
            lambda other=other: other.read(0),
            lambda other=other: list(other.verify()),
            lambda other=other, geometry=geometry: other.write(1, values(geometry)),
        ):
            with pytest.raises(GeometryError, match="use another store folder"):
                act()
    assert store.positions() == [0]
    with pytest.raises(GeometryError):
        Store(store.root, LATENT).read(0)


def test_the_shape_of_what_is_stored_is_read_from_the_first_sound_block(tmp_path):
    assert stored_shape(tmp_path) is None
    store = Store(tmp_path, LATENT)
    for position in (0, 1000):
        store.write(position, values(LATENT))
    assert stored_shape(tmp_path) == (3, 20, 28, 20)
    for text in ("{", "[]", '{"shape": 3}', "{}"):
        (store.block_path(0) / "zarr.json").write_text(text)
        assert stored_shape(tmp_path) == (3, 20, 28, 20)
    (store.block_path(1) / "zarr.json").unlink()
    assert stored_shape(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "\xff"])
def test_a_damaged_block_header_is_named_with_its_remedy(store, text):
    store.write(0, values())
    header = store.block_path(0) / "zarr.json"
    header.write_text(text, encoding="latin-1")
    fresh = Store(store.root, TINY)
    for act in (lambda: fresh.read(0), lambda: fresh.write(1, values())):
        with pytest.raises(StoreError, match="delete it to have it written anew") as refused:
            act()
        assert str(header) in str(refused.value)
    header.unlink()
    assert np.array_equal(fresh.read(0), values())
    assert fresh.write(1, values())


def test_a_folder_in_place_of_a_shard_is_told_in_the_stores_words(store):
    store.write(0, values())
    store.path(1).mkdir()
    assert not store.has(1)
    with pytest.raises(StoreError, match="cannot read"):
        store.read(1)
    with pytest.raises(StoreError, match="cannot write"):
        store.write(1, values())
    assert not list(store.block_path(0).glob(".*"))


# Full and read-only disks


def fill_up(store):
    for position in range(1000):
        try:
            store.write(position, values(seed=position))
        except StoreFullError as error:
            return position, error
    raise AssertionError("the disk never filled up")


def assert_intact(store, count):
    assert len(store.positions()) == count
    assert all(damage is None for _, damage in store.verify())
    assert not list(store.root.glob("block-*/.*"))


def test_a_full_disk_leaves_nothing_half_written_and_work_resumes(small_disk):
    disk, remount = small_disk("200k")
    store = Store(disk / "volumes", TINY)
    count, error = fill_up(store)
    assert count > 5
    assert "no room" in str(error)
    assert "SYNTHBRAIN_HOME" in str(error)
    assert "\n" not in str(error)
    assert_intact(store, count)
    remount("size=400k")
    assert store.write(count, values(seed=count))
    assert_intact(store, count + 1)


def test_a_file_size_limit_is_a_full_disk(tmp_path, python):
    out = python(
        """
        import resource, sys
        from pathlib import Path
        import numpy as np
        from synthbrain.errors import StoreFullError
        from synthbrain.store import Store
        from synthbrain.testing import TINY

        store = Store(Path(sys.argv[1]), TINY)
        store.write(0, np.zeros(TINY.shape, "uint8"))
        noise = np.random.default_rng(0).integers(0, 256, TINY.shape, dtype="uint8")
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        try:
            store.write(1, noise)
        except StoreFullError as error:
            print(error)
        assert [(p, d) for p, d in store.verify()] == [(0, None)]
        assert not list(store.root.glob("block-*/.*"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        assert store.write(1, noise)
        """,
        tmp_path / "volumes",
    )
    assert out.startswith("no room for another volume")
    assert out.count("\n") == 1


def test_a_read_only_disk_is_read_and_refuses_writes(small_disk):
    disk, remount = small_disk("1m")
    store = Store(disk / "volumes", TINY)
    store.write(0, values())
    flip(store.path(0), 3)
    store.write(1, values())
    remount("ro")
    fresh = Store(disk / "volumes", TINY)
    assert np.array_equal(fresh.read(1), values())
    for act in (
        lambda: fresh.write(2, values()),
        lambda: fresh.write(1000, values()),
        lambda: fresh.quarantine(0),
    ):
        with pytest.raises(StoreError, match="cannot be written to") as refused:
            act()
        assert not isinstance(refused.value, StoreFullError)
        assert "choose another folder" in str(refused.value)
    assert not fresh.write(1, values())
    assert fresh.sweep(older_than=-1) == 0
    remount("rw")


# Parity with other readers and writers of Zarr


@GEOMETRIES
def test_zarr_reads_what_we_write(tmp_path, geometry):
    store = Store(tmp_path, geometry, {"made_by": "somebody"})
    volumes = {position: values(geometry, seed=position) for position in (0, 17, 999)}
    for position, volume in volumes.items():
        store.write(position, volume)
    array = zarr.open_array(store.block_path(0), mode="r")
    assert array.shape == (1000, *geometry.shape)
    assert array.dtype == geometry.dtype
    assert array.attrs["made_by"] == "somebody"
    if geometry is LATENT:
        assert array.attrs["representation"] == "latent"
        assert array.metadata.dimension_names == ("volume", "channel", "x", "y", "z")
        assert array.dtype == np.float16
        assert array.chunks == (1, 3, 20, 28, 20)
    else:
        assert array.attrs["scale"] == (1 if geometry is HALF else geometry.scale)
        assert array.metadata.dimension_names == ("volume", "x", "y", "z")
    for position, volume in volumes.items():
        assert np.array_equal(array[position], volume)
    start, size = inner_box(geometry)
    box = tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))
    assert np.array_equal(array[(17, *box)], store.read_patch(17, start, size))
    assert not array[1].any()


def test_zarr_reads_a_black_volume(store):
    store.write(4, np.zeros(TINY.shape, np.uint8))
    assert not zarr.open_array(store.block_path(0), mode="r")[4].any()


def headed(geometry):
    """A volume whose first inner chunk is black: zarr leaves it out."""
    volume = values(geometry)
    volume[tuple(slice(n) for n in geometry.chunks)] = 0
    return volume


@pytest.mark.parametrize("empties", [False, True], ids=["left out", "written"])
@GEOMETRIES
def test_we_read_what_zarr_writes(by_zarr, geometry, empties):
    volumes = {0: values(geometry, seed=1)}
    if geometry.chunks != geometry.shape:
        volumes[17] = headed(geometry)
    with zarr.config.set({"array.write_empty_chunks": empties}):
        store = by_zarr(geometry, volumes)
    assert store.stored([0, 1, 17]).tolist() == [True, False, 17 in volumes]
    for position, volume in volumes.items():
        assert np.array_equal(store.read(position), volume)
        start, size = inner_box(geometry)
        box = tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))
        assert np.array_equal(store.read_patch(position, start, size), volume[box])
    assert all(damage is None for _, damage in store.verify())


@GEOMETRIES
def test_our_block_header_is_the_one_zarr_writes(by_zarr, geometry):
    store = by_zarr(geometry, {})
    written = json.loads((store.block_path(0) / "zarr.json").read_text())
    ours = store.metadata()
    for key in ("shape", "data_type", "chunk_grid", "chunk_key_encoding", "codecs", "fill_value"):
        assert ours[key] == written[key]


def test_zarrs_and_we_read_each_other(tmp_path, python):
    pytest.importorskip("zarrs")
    geometries = {"tiny": TINY, "half": HALF, "full": FULL}
    stores = {name: Store(tmp_path / name, geometry) for name, geometry in geometries.items()}
    for name, store in stores.items():
        store.write(3, headed(geometries[name]))
        np.save(tmp_path / f"{name}.npy", headed(geometries[name]))
    python(
        """
        import sys
        import numpy as np, zarr, zarrs

        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
        for name in ("tiny", "half", "full"):
            array = zarr.open_array(f"{sys.argv[1]}/{name}/block-0000", mode="r+")
            pipeline = type(array.async_array.codec_pipeline).__name__
            assert pipeline == "ZarrsCodecPipeline", pipeline
            expected = np.load(f"{sys.argv[1]}/{name}.npy")
            assert np.array_equal(array[3], expected), f"zarrs reads {name} differently"
            array[4] = expected[::-1]
            array[5] = np.zeros_like(expected)
        """,
        tmp_path,
    )
    for name, store in stores.items():
        assert np.array_equal(store.read(4), headed(geometries[name])[::-1])
        assert store.stored([3, 4]).all()
        assert all(damage is None for _, damage in store.verify())
