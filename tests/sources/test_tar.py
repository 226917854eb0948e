import io
import logging
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthbrain.errors import SourceError
from synthbrain.sources.extents import Extent
from synthbrain.sources.tar import BLOCK, ArchiveIndex, Member, extend, scan, walk

names = st.text("abcdefghij/é_-.0123456789", min_size=1, max_size=180).filter(
    lambda name: not name.startswith("/") and "//" not in name and not name.endswith("/")
)
files = st.lists(st.tuples(names, st.integers(0, 3000)), max_size=12, unique_by=lambda f: f[0])
formats = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


def archive(members, format=tarfile.GNU_FORMAT, others=()):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for number, (name, size) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(bytes([number % 251 + 1]) * size))
            for type in others:
                other = tarfile.TarInfo(f"other{number}")
                other.type, other.linkname = type, "/etc/passwd"
                tar.addfile(other)
    return stream.getvalue()


def reader(data):
    return lambda extent: data[extent.offset : extent.end]


def known(data):
    """What the standard library finds."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(m.name, Extent(m.offset_data, m.size)) for m in tar if m.isreg()]


def whole(data):
    return Extent(0, len(data))


@given(files, formats)
def test_walking_finds_what_the_standard_library_finds(members, format):
    if format == tarfile.USTAR_FORMAT:
        members = [(name[:40], size) for name, size in members]
    data = archive(members, format, others=[tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE])
    assert [(m.path, m.data) for m in walk(reader(data), whole(data))] == known(data)


@given(files, formats, st.data())
def test_any_stretch_tells_of_the_members_in_it(members, format, drawn):
    members = [(name.replace("é", "e")[:40], size) for name, size in members]
    data = archive(members, format)
    start = drawn.draw(st.integers(0, len(data)))
    run = Extent(start, drawn.draw(st.integers(0, len(data) - start)))
    found = [(m.path, m.data) for m in scan(reader(data), run)]
    expected = [
        (name, extent)
        for name, extent in known(data)
        if extent.offset - BLOCK >= run.offset and extent.offset <= run.end
    ]
    assert found == expected


@given(files, st.data())
def test_an_index_goes_on_where_it_stopped(members, drawn):
    data = archive(members)
    index = ArchiveIndex("a.tar")
    pauses = drawn.draw(st.lists(st.integers(0, 12), max_size=4))
    for pause in pauses:
        for count, _ in enumerate(extend(index, reader(data), len(data))):
            if count == pause:
                break
    for _ in extend(index, reader(data), len(data)):
        pass
    assert index.complete
    assert index.members == dict(known(data))


def test_an_index_survives_the_disk(tmp_path):
    index = ArchiveIndex("a.tar", 4096, {"x/y": Extent(512, 7)}, walked=1024)
    index.save(tmp_path / "a" / "index.parquet")
    assert ArchiveIndex.load(tmp_path / "a" / "index.parquet") == index
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["index.parquet"]


@pytest.mark.parametrize(
    ("extent", "says"),
    [
        (Extent(512, 4000), "outside the archive of 4,096 bytes"),
        (Extent(100, 7), "not a multiple of 512"),
        (Extent(512, 2**40), "outside the archive"),
    ],
)
def test_an_index_that_points_outside_its_archive_is_refused(tmp_path, extent, says):
    ArchiveIndex("a.tar", 4096, {"evil": extent}).save(tmp_path / "i.parquet")
    with pytest.raises(SourceError, match=says) as refused:
        ArchiveIndex.load(tmp_path / "i.parquet")
    assert "evil" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_is_no_index_is_refused(tmp_path):
    with pytest.raises(SourceError, match="make one with `synthbrain index`"):
        ArchiveIndex.load(tmp_path / "nowhere")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(SourceError, match="is not an archive index"):
        ArchiveIndex.load(tmp_path / "text")
    import pandas as pd

    pd.DataFrame({"path": ["a"], "offset": [0], "size": [1]}).to_parquet(tmp_path / "other")
    with pytest.raises(SourceError, match="is not an archive index"):
        ArchiveIndex.load(tmp_path / "other")


def test_absurd_sizes_are_left_out(caplog):
    index = ArchiveIndex("a.tar", 2**50)
    with caplog.at_level(logging.WARNING, "synthbrain"):
        assert not index.add(Member("huge", Extent(512, 2**40), 2**41))
    assert "more than the 1,073,741,824" in caplog.text
    assert index.members == {}


def test_a_damaged_header_is_told_with_its_place():
    data = bytearray(archive([("a", 600), ("b", 10), ("c", 10)]))
    data[3 * BLOCK + 10] ^= 1
    with pytest.raises(SourceError, match="no tar header at 1,536"):
        list(walk(reader(bytes(data)), whole(data)))
    assert [m.path for m in scan(reader(bytes(data)), whole(data))] == ["a", "c"]


def test_an_archive_that_was_cut_short_is_not_complete(caplog):
    data = archive([("a", 600), ("b", 6000)])
    cut = data[: len(data) // BLOCK // 2 * BLOCK]
    index = ArchiveIndex("a.tar")
    with caplog.at_level(logging.WARNING, "synthbrain"):
        list(extend(index, reader(cut), 3 * BLOCK + 100))
    assert "a" in index.members
    assert "b" not in index.members


def test_names_that_take_forever_are_refused():
    info = tarfile.TarInfo("long")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**30
    data = info.tobuf(tarfile.GNU_FORMAT) + bytes(BLOCK)
    with pytest.raises(SourceError, match="announces 1,073,741,824 bytes of names"):
        list(walk(reader(data), whole(data)))


@pytest.mark.parametrize("kind", [tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, b"Z"])
def test_members_of_rare_kinds_are_passed_over_with_their_data(kind):
    data = bytearray(archive([("a", 600), ("b", 1000), ("c", 10)]))
    info = tarfile.TarInfo("b")
    info.size, info.type = 1000, kind
    data[3 * BLOCK : 4 * BLOCK] = info.tobuf(tarfile.GNU_FORMAT)
    index = ArchiveIndex("a.tar")
    assert [m.path for m in extend(index, reader(bytes(data)), len(data))] == ["a", "c"]
    assert index.complete
