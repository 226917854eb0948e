import gzip
import logging
import struct

import nibabel
import numpy as np
import pytest
from released import MEMBER, SHAPE, TABLE, nifti, release

from synthbrain.errors import SourceError
from synthbrain.sources.archive import ArchiveVolumes
from synthbrain.sources.base import Cost
from synthbrain.sources.extents import Extent
from synthbrain.sources.tar import ArchiveIndex
from synthbrain.sources.url import FileBytes
from synthbrain.testing import check_source


class Counting(FileBytes):
    """A file that counts what is read of it, in units of a piece as a torrent has them."""

    def __init__(self, path, unit=512):
        super().__init__(path)
        object.__setattr__(self, "piece", unit)
        object.__setattr__(self, "pieces", set())
        object.__setattr__(self, "keeps", False)

    @property
    def unit(self):
        return self.piece

    def cost(self, extents):
        return Cost(bytes=self.piece * len(self.covering(extents)) or 1, seconds=1.0)

    def covering(self, extents):
        return {
            number
            for extent in extents
            for number in range(extent.offset // self.piece, -(-extent.end // self.piece))
        }

    def read(self, extents):
        for extent, data in super().read(extents):
            self.pieces.update(self.covering([extent]))
            yield extent, data

    def spare(self):
        if not self.keeps:
            return []
        runs, last = [], None
        for number in sorted(self.pieces):
            start = number * self.piece
            end = min(start + self.piece, self.size)
            if last == number - 1:
                runs[-1] = Extent(runs[-1].offset, end - runs[-1].offset)
            else:
                runs.append(Extent(start, end - start))
            last = number
        return runs


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return release(tmp_path_factory.mktemp("released"), 40)


@pytest.fixture
def ids(released):
    return sorted(released.values)


def archive(released, unit=512, **options):
    header = released.open().header
    return ArchiveVolumes(header.archive, Counting(released.tar, unit), **options)


def indexed(released):
    source = archive(released)
    list(source.fetch(["nobody"], SHAPE))
    assert source.index.complete
    return source.index


def same(released, found):
    return all(np.array_equal(volume, released.stored(id)) for id, volume in found.items())


def test_the_contract_of_a_source(released, ids):
    check_source(archive(released), ids[:3], SHAPE)
    check_source(archive(released, index=indexed(released)), ids[:3], SHAPE)


def test_with_an_index_only_the_members_are_read(released, ids):
    source = archive(released, index=indexed(released))
    found = dict(source.fetch(ids[::7], SHAPE))
    assert sorted(found) == ids[::7]
    assert same(released, found)
    members = [source.index.members[source.path(id)] for id in ids[::7]]
    assert source.bytes.pieces == source.bytes.covering(members)


@pytest.mark.parametrize("unit", [512, 4096, 2**16, 2**20])
def test_without_an_index_it_builds_itself(released, ids, unit):
    source = archive(released, unit)
    found = dict(source.fetch(ids[::7], SHAPE))
    assert sorted(set(found) & set(ids[::7])) == ids[::7]
    assert same(released, found)
    again = dict(source.fetch(ids[::7], SHAPE))
    assert sorted(set(again) & set(ids[::7])) == ids[::7]


def test_the_first_members_cost_the_first_bytes(released, ids):
    source = archive(released, 2**15)
    found = dict(source.some(ids, 7, SHAPE))
    assert same(released, found)
    order = sorted(indexed(released).members.items(), key=lambda item: item[1])
    first = [path for path, _ in order if path.endswith(".nii.gz")][:7]
    assert {source.path(id) for id in found} >= set(first)
    last = dict(order)[first[-1]]
    assert max(source.bytes.pieces) * 2**15 <= last.end + 2**22  # a span further at most


def test_headers_alone_are_read_where_that_is_cheaper(released, ids):
    source = archive(released, 512)
    dict(source.some(ids, 1, SHAPE))  # how large volumes are
    source.bytes.pieces.clear()
    found = dict(source.fetch(ids[:2], SHAPE))
    assert sorted(found) == ids[:2]
    read = 512 * len(source.bytes.pieces)
    assert read < released.tar.stat().st_size / 4


def test_every_whole_member_of_a_fetched_piece_is_kept(released, ids):
    index = indexed(released)
    source = archive(released, 2**18, index=index)
    object.__setattr__(source.bytes, "keeps", True)
    found = dict(source.fetch(ids[:1], SHAPE))
    runs = source.bytes.spare()
    inside = {id for id in ids if any(index.members[source.path(id)].within(run) for run in runs)}
    assert len(inside) > 1
    assert set(found) == inside
    assert same(released, found)


def test_members_that_are_not_wanted_again_are_not_decoded(released, ids):
    source = archive(released, 2**18, index=indexed(released), unwanted=lambda id: True)
    object.__setattr__(source.bytes, "keeps", True)
    assert list(dict(source.fetch(ids[:1], SHAPE))) == ids[:1]


@pytest.mark.parametrize("table_first", [True, False])
def test_the_table_is_found_at_either_end(tmp_path, table_first):
    released = release(tmp_path, 5, table_first=table_first)
    assert archive(released).table().startswith(b"participant_id\t")


def test_a_table_that_is_nowhere_is_told_with_what_to_do(tmp_path):
    released = release(tmp_path, 5)
    header = released.open().header
    other = header.archive.model_copy(update={"participants": "SET/other.tsv"})
    with pytest.raises(SourceError, match="pass the table with --participants"):
        ArchiveVolumes(other, FileBytes(released.tar)).table()


def test_the_index_is_kept(released, ids, tmp_path):
    path = tmp_path / "index.parquet"
    list(archive(released, index_path=path).some(ids, 3, SHAPE))
    kept = ArchiveIndex.load(path)
    assert len(kept.members) >= 3
    source = archive(released, index=kept, index_path=path)
    dict(source.fetch(ids, SHAPE))
    assert set(ArchiveIndex.load(path).members) >= {source.path(id) for id in ids}


def test_an_index_that_did_not_grow_is_not_written_again(released, ids, tmp_path):
    path = tmp_path / "index.parquet"
    source = archive(released, index=indexed(released), index_path=path)
    dict(source.fetch(ids[:1], SHAPE))
    path.unlink()
    dict(source.fetch(ids[1:2], SHAPE))
    assert not path.exists()


def test_originals_are_kept_on_request(released, ids, tmp_path):
    source = archive(released, index=indexed(released), originals=tmp_path)
    dict(source.fetch(ids[:2], SHAPE))
    kept = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert [str(path.relative_to(tmp_path)) for path in kept] == [source.path(i) for i in ids[:2]]
    assert np.array_equal(
        nibabel.load(kept[0]).get_fdata(dtype=np.float32), released.values[ids[0]]
    )


def lying(**fields):
    data = bytearray(nibabel.Nifti1Image(np.zeros(SHAPE.shape, np.float32), None).to_bytes())
    for offset, (format, *values) in fields.items():
        struct.pack_into(format, data, int(offset[1:]), *values)
    return gzip.compress(bytes(data))


HOSTILE = {
    "sub-900000": gzip.compress(bytes(50_000_000)),
    "sub-900001": b"not a volume",
    "sub-900002": nifti(np.zeros((3, 3, 3), np.float32), SHAPE.affine),
    "sub-900003": nifti(np.full(SHAPE.shape, np.nan, np.float32), SHAPE.affine),
    "sub-900004": lying(_40=("<4h", 3, 32000, 32000, 32000)),
    "sub-900005": lying(_108=("<f", 1e9)),
    "sub-900006": b"",
}


def test_hostile_volumes_are_left_out_with_one_line_each(tmp_path, caplog):
    released = release(
        tmp_path, 3, extra={MEMBER.format(id=id): data for id, data in HOSTILE.items()}
    )
    asked = [*HOSTILE, *released.values]
    with caplog.at_level(logging.WARNING, "synthbrain"):
        found = dict(archive(released).fetch(asked, SHAPE))
    assert sorted(found) == sorted(released.values)
    assert len(caplog.messages) == len(HOSTILE)
    assert all("left out" in text and "\n" not in text for text in caplog.messages)


def test_hostile_members_write_nothing_outside(tmp_path):
    import io
    import tarfile

    released = release(tmp_path / "a", 2)
    with tarfile.open(released.tar, "a") as tar:
        for name, type in (
            ("../../evil.nii.gz", tarfile.REGTYPE),
            (str(tmp_path / "evil.nii.gz"), tarfile.REGTYPE),
            (MEMBER.format(id="../../evil"), tarfile.REGTYPE),
            (MEMBER.format(id="sub-700000"), tarfile.SYMTYPE),
            (MEMBER.format(id="sub-700001"), tarfile.LNKTYPE),
            (MEMBER.format(id="sub-700002"), tarfile.CHRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = type, "/etc/passwd"
            data = nifti(np.zeros(SHAPE.shape, np.float32), SHAPE.affine)
            info.size = len(data) if type == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(data))
    before = sorted(tmp_path.rglob("*"))
    source = archive(released, originals=tmp_path / "kept")
    asked = [*released.values, "sub-700000", "sub-700001", "sub-700002"]
    assert sorted(dict(source.fetch(asked, SHAPE))) == sorted(released.values)
    after = [path for path in tmp_path.rglob("*") if path.is_file() and path not in before]
    assert all(path.is_relative_to(tmp_path / "kept" / "SET" / "rawdata") for path in after)
    assert "evil" not in "".join(map(str, after))


def test_a_member_that_lies_of_its_size_does_not_fill_memory(tmp_path, caplog):
    released = release(tmp_path, 3)
    header = released.open().header
    data = bytearray(released.tar.read_bytes())
    found = indexed(released).members
    last = max(found.items(), key=lambda item: item[1])
    import tarfile

    info = tarfile.TarInfo(last[0])
    info.size = 2**33 - 1
    block = info.tobuf(tarfile.GNU_FORMAT)
    start = last[1].offset - 512
    data[start : start + 512] = block[-512:]
    released.tar.write_bytes(data)
    for unit in (512, 2**20):
        source = ArchiveVolumes(header.archive, Counting(released.tar, unit))
        with caplog.at_level(logging.WARNING, "synthbrain"):
            assert len(dict(source.fetch(list(released.values), SHAPE))) == 2
    assert "outside the archive" in caplog.text


def test_the_layout_of_an_archive_cannot_lead_out_of_it(released):
    from pydantic import ValidationError

    fields = released.open().header.archive.model_dump()
    for member in ("../{id}.nii.gz", "/{id}.nii.gz", "a//{id}", "a/b.nii.gz", "a\\{id}"):
        with pytest.raises(ValidationError, match="must"):
            type(released.open().header.archive).model_validate({**fields, "member": member})
    assert TABLE in str(fields)
