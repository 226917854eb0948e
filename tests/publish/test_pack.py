import errno
import os
import shutil
import subprocess
import time
import zipfile

import numpy as np
import pytest
import zarr

from synthbrain.errors import DamagedShardError, MissingVolumeError, StoreError
from synthbrain.publish import pack as packing
from synthbrain.publish.pack import pack_members, pack_name, write_pack
from synthbrain.store import Store
from synthbrain.testing import TINY

POSITIONS = (1017, 1003, 1999)


@pytest.fixture
def store(tmp_path):
    about = {"manifest": "x", "made_by": "y", "provenance": {"device": "toaster"}}
    store = Store(tmp_path / "store", TINY, about)
    draw = np.random.default_rng(0)
    for position in (*POSITIONS, 5, 2000):
        store.write(position, draw.integers(0, 256, TINY.shape, np.uint8))
    return store


@pytest.fixture
def path(tmp_path):
    return tmp_path / "packs" / pack_name(1)


def spoil(path, at=-30):
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


def test_members_are_the_shard_files_where_the_table_says(store, path):
    pack = write_pack(store, 1, path)
    data = path.read_bytes()
    assert pack.written
    assert pack.size == len(data)
    assert [member.position for member in pack.members] == sorted(POSITIONS)
    for position, (offset, size) in pack_members(path).items():
        assert data[offset : offset + size] == store.path(position).read_bytes()
    assert {m.position: m.extent for m in pack.members} == pack_members(path)


def test_it_is_a_plain_stored_zip(store, path):
    write_pack(store, 1, path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        members = archive.infolist()
    names = ["zarr.json", "c.3.0.0.0", "c.17.0.0.0", "c.999.0.0.0"]
    assert [member.filename for member in members] == names
    for member in members:
        assert member.compress_type == zipfile.ZIP_STORED
        assert member.date_time == (1980, 1, 1, 0, 0, 0)
        assert member.extra == b""
        assert member.external_attr >> 16 == 0o100644
    if shutil.which("unzip"):
        subprocess.run(["unzip", "-tq", path], check=True, capture_output=True)


def test_zarr_opens_it_as_an_array(store, path):
    write_pack(store, 1, path)
    array = zarr.open_array(zarr.storage.ZipStore(path, mode="r"), mode="r")
    for position in POSITIONS:
        assert np.array_equal(array[position - 1000], store.read(position))
    assert not array[0].any()
    assert array.attrs["made_by"] == "y"
    assert array.attrs["scale"] == TINY.scale
    assert "provenance" not in array.attrs, "another machine would give another pack"


def test_unpacking_gives_the_block_back(store, path, tmp_path):
    write_pack(store, 1, path)
    copy = Store(tmp_path / "copy", TINY)
    with zipfile.ZipFile(path) as archive:
        archive.extractall(copy.block_path(1))
    assert copy.positions() == sorted(POSITIONS)
    assert np.array_equal(copy.read(1017), store.read(1017))


def test_the_same_volumes_give_the_same_bytes(store, path, tmp_path):
    write_pack(store, 1, path)
    other = Store(tmp_path / "other", TINY, dict(store.attributes) | {"provenance": {}})
    for position in POSITIONS:
        other.write(position, store.read(position))
    os.utime(other.path(1017), (0, 0))
    time.sleep(1.1)
    write_pack(other, 1, tmp_path / pack_name(1))
    assert (tmp_path / pack_name(1)).read_bytes() == path.read_bytes()


def test_an_identical_pack_is_kept_and_another_replaced(store, path):
    first = write_pack(store, 1, path, positions=[1003, 1017])
    before = path.stat().st_mtime_ns
    again = write_pack(store, 1, path, positions=[1017, 1003])
    assert not again.written
    assert (again.members, again.size) == (first.members, first.size)
    assert path.stat().st_mtime_ns == before
    assert write_pack(store, 1, path).written
    assert len(pack_members(path)) == 3
    store.path(1017).unlink()
    store.write(1017, np.zeros(TINY.shape, np.uint8))
    assert write_pack(store, 1, path).written
    path.write_bytes(path.read_bytes()[:-5])
    assert write_pack(store, 1, path).written


@pytest.mark.parametrize("at", [-30, 20])
def test_a_damaged_shard_is_refused_by_name(store, path, at):
    spoil(store.path(1017), at)
    with pytest.raises(DamagedShardError, match=r"c\.17\.0\.0\.0 is damaged .*--repair"):
        write_pack(store, 1, path)
    assert list(path.parent.iterdir()) == []


def test_missing_volumes_are_told(store, path):
    with pytest.raises(MissingVolumeError, match=r"volume 1004 is not in .*fill"):
        write_pack(store, 1, path, positions=[1003, 1004])
    with pytest.raises(MissingVolumeError, match=r"block 7 .*holds no volumes"):
        write_pack(store, 7, path)
    assert not path.exists()


def test_a_full_disk_leaves_nothing_behind(store, path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packing.zipfile.ZipFile, "writestr", full)
    with pytest.raises(StoreError, match=r"cannot write .*No space left.*make room"):
        write_pack(store, 1, path)
    assert list(path.parent.iterdir()) == []


def test_large_packs_take_zip64_and_are_read_alike(store, path, monkeypatch):
    small = write_pack(store, 1, path)
    path.unlink()
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 8000)
    large = write_pack(store, 1, path)
    assert large.size > small.size
    data = path.read_bytes()
    for position, (offset, size) in pack_members(path).items():
        assert data[offset : offset + size] == store.path(position).read_bytes()
    if shutil.which("unzip"):
        subprocess.run(["unzip", "-tq", path], check=True, capture_output=True)


def test_what_is_no_pack_is_told(tmp_path):
    with pytest.raises(StoreError, match="not named like a pack"):
        pack_members(tmp_path / "x.zip")
    (tmp_path / pack_name(0)).write_bytes(b"<html>")
    with pytest.raises(StoreError, match="not a readable pack"):
        pack_members(tmp_path / pack_name(0))


def test_latents_are_packed_alike(with_latents, tmp_path):
    from dataclasses import replace

    store = replace(with_latents.resolver, representation="latent").recipes
    pack = write_pack(store, 0, tmp_path / pack_name(0))
    array = zarr.open_array(zarr.storage.ZipStore(pack.path, mode="r"), mode="r")
    assert array.dtype == np.float16
    assert np.array_equal(array[3], store.read(3))
