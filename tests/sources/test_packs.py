import hashlib
import logging
import zipfile

import numpy as np
import pandas as pd
import pytest
from faulty import FaultyServer

from synthbrain import SynthBrainDataset
from synthbrain.errors import SourceError
from synthbrain.manifest import Manifest
from synthbrain.publish.pack import write_pack
from synthbrain.resolver import Resolver
from synthbrain.sources.extents import Extent
from synthbrain.sources.packs import PackVolumes, read_directory
from synthbrain.sources.url import FileBytes
from synthbrain.testing import TINY, TinyGenerator, check_source, tiny_manifest


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A manifest with hashes, the resolver of its filled store, and the folder of its packs."""
    folder = tmp_path_factory.mktemp("packs")
    manifest = tiny_manifest(12)
    resolver = Resolver(manifest, folder / "store", TinyGenerator())
    list(resolver.fill(resolver.plan()))
    write_pack(resolver.recipes, 0, folder / "packs" / "block-0000.zarr.zip")
    hashes = [hashlib.sha256(resolver.path(i).read_bytes()).hexdigest() for i in range(12)]
    sha256 = pd.Series(hashes, index=manifest.table.index, dtype="str")
    return Manifest(manifest.header, manifest.table, manifest.positions, sha256), resolver, folder


def source(filled, url=None):
    manifest, resolver, folder = filled
    return PackVolumes(manifest, str(url or folder), made_by=resolver.made_by)


def pull(filled, folder, *sources):
    manifest, resolver, _ = filled
    pulling = Resolver(manifest, folder, made_by=resolver.made_by, sources=sources)
    return pulling, sorted(pulling.fill(pulling.plan()))


def test_the_contract_of_a_source(filled):
    check_source(source(filled), filled[0].table.index[:4].tolist(), TINY)


def test_shards_arrive_byte_for_byte(filled, tmp_path):
    pulling, rows = pull(filled, tmp_path, source(filled))
    assert rows == list(range(12))
    for row in rows:
        assert pulling.path(row).read_bytes() == filled[1].path(row).read_bytes()


def test_neighbours_cost_one_request(filled, tmp_path):
    data = (filled[2] / "packs" / "block-0000.zarr.zip").read_bytes()
    with FaultyServer({"set/packs/block-0000.zarr.zip": data}).running() as server:
        pull(filled, tmp_path, source(filled, f"{server.url}/set"))
    assert len(server.log) <= 3  # its size, its directory, its shards


def test_a_shard_with_another_hash_is_not_stored(filled, tmp_path, caplog):
    manifest, resolver, _ = filled
    wrong = manifest.sha256.copy()
    wrong.iloc[3] = "0" * 64
    other = Manifest(manifest.header, manifest.table, manifest.positions, wrong)
    pulling = Resolver(other, tmp_path, made_by=resolver.made_by, sources=[source(filled)])
    with pytest.raises(LookupError, match="1 rows, 'tiny000003' first"):
        list(pulling.fill(pulling.plan()))
    assert pulling.stored().tolist() == [i != 3 for i in range(12)]
    assert "the manifest says 000000000000" in caplog.text


def test_a_flipped_byte_is_caught_without_hashes_too(filled, tmp_path, caplog):
    manifest, resolver, folder = filled
    pack = (folder / "packs" / "block-0000.zarr.zip").read_bytes()
    extent = read_directory(FileBytes(folder / "packs" / "block-0000.zarr.zip"))["c.5.0.0.0"]
    (tmp_path / "packs").mkdir()
    bad = bytearray(pack)
    bad[extent.offset + 100] ^= 1
    (tmp_path / "packs" / "block-0000.zarr.zip").write_bytes(bad)
    plain = Manifest(manifest.header, manifest.table, manifest.positions)
    liar = PackVolumes(plain, str(tmp_path), made_by=resolver.made_by)
    sources = [liar, source(filled)]
    pulling = Resolver(plain, tmp_path / "s", made_by=resolver.made_by, sources=sources)
    assert sorted(pulling.fill(pulling.plan())) == list(range(12))  # the mirror had the sound one
    assert "gave a bad volume of tiny000005" in caplog.text


@pytest.mark.parametrize("cut", [0, 10, 1000, -30])
def test_packs_that_are_none_are_refused(filled, tmp_path, cut):
    data = (filled[2] / "packs" / "block-0000.zarr.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(data[:cut])
    with pytest.raises(SourceError, match="is not a pack") as refused:
        read_directory(FileBytes(tmp_path / "a.zip"))
    assert "\n" not in str(refused.value)


def test_compressed_members_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("c.0.0.0.0", b"x" * 1000)
    with pytest.raises(SourceError, match="expected a stored zip"):
        read_directory(FileBytes(tmp_path / "a.zip"))


def test_a_directory_that_points_outside_is_refused(filled, tmp_path):
    data = bytearray((filled[2] / "packs" / "block-0000.zarr.zip").read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = (2**31).to_bytes(4, "little")
    data[entry + 20 : entry + 24] = (2**31).to_bytes(4, "little")
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(SourceError, match="outside itself"):
        read_directory(FileBytes(tmp_path / "a.zip"))


def test_a_volume_a_pack_lacks_is_told(filled, tmp_path, caplog):
    manifest, resolver, _ = filled
    (tmp_path / "packs").mkdir()
    write_pack(resolver.recipes, 0, tmp_path / "packs" / "block-0000.zarr.zip", positions=[0, 1])
    with caplog.at_level(logging.WARNING, "synthbrain"):
        found = dict(source(filled, tmp_path).fetch(manifest.table.index.tolist(), TINY))
    assert sorted(found) == manifest.table.index[:2].tolist()
    assert "(10 absent)" in caplog.text


def test_a_failing_source_is_given_up_after_a_while(filled, tmp_path):
    manifest, resolver, _ = filled
    dead = source(filled, "http://127.0.0.1:9/nowhere")
    pulling = Resolver(manifest, tmp_path, made_by=resolver.made_by, sources=[dead])
    pulling._failures[dead.name] = 3
    assert len(pulling.plan().unavailable) == 12


def test_a_dataset_reads_what_its_manifest_says_is_published(filled, tmp_path, python):
    from synthbrain.header import PacksSource

    manifest, resolver, folder = filled
    header = manifest.header.model_copy(update={
        "sources": {"disk": PacksSource(kind="packs", url=f"file://{folder}",
                                        made_by=resolver.made_by)},
    })  # fmt: skip
    published = Manifest(header, manifest.table, manifest.positions)
    ds = SynthBrainDataset(
        published, generator=None, made_by=resolver.made_by, store=tmp_path, dtype="uint8"
    )
    assert np.array_equal(ds[4]["image"][0].numpy(), resolver.recipes.read(4))
    assert ds.missing() == [id for id in manifest.table.index if id != "tiny000004"]


def test_extents_of_a_directory_hold_the_members(filled):
    path = filled[2] / "packs" / "block-0000.zarr.zip"
    found = read_directory(FileBytes(path))
    with zipfile.ZipFile(path) as archive:
        assert set(found) == set(archive.namelist())
        assert all(isinstance(extent, Extent) for extent in found.values())
