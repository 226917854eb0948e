import libtorrent as lt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthbrain.errors import SourceError, SynthBrainError
from synthbrain.torrent.metainfo import Metainfo


def torrent(info=None, **options):
    base = {b"name": b"set", b"piece length": 16384, b"pieces": bytes(20), b"length": 100}
    return lt.bencode({b"info": base | (info or {}), **options})


def files(*paths, **entry):
    listed = [{b"path": path, b"length": 10, **entry} for path in paths]
    info = {b"name": b"set", b"piece length": 16384, b"pieces": bytes(20), b"files": listed}
    return lt.bencode({b"info": info})


def entry(attributes):
    listed = [{b"path": [b"a"], b"length": 10} | attributes]
    info = {b"name": b"set", b"piece length": 16384, b"pieces": bytes(20), b"files": listed}
    return lt.bencode({b"info": info})


def test_an_honest_torrent_opens():
    meta = Metainfo.parse(files([b"a"], [b"b", b"c"]), "x.torrent")
    assert [(f.path, f.size, f.offset) for f in meta.files] == [
        ("set/a", 10, 0),
        ("set/b/c", 10, 10),
    ]
    assert meta.file("b/c") == meta.file("set/b/c")
    assert list(meta.spans(5, 10)) == [(meta.files[0], 5, 5), (meta.files[1], 0, 5)]
    with pytest.raises(SourceError, match="no file d in torrent set"):
        meta.file("d")


HOSTILE = {
    "up": files([b"..", b"etc"]),
    "up in the middle": files([b"a", b"..", b"..", b"b"]),
    "absolute": files([b"/etc/passwd"]),
    "slash": files([b"a/../../b"]),
    "backslash": files([b"..\\..\\b"]),
    "dot": files([b"."]),
    "empty part": files([b"a", b""]),
    "no parts": files([]),
    "nul": files([b"a\0b"]),
    "newline": files([b"a\nb"]),
    "not utf-8": files([b"\xff\xfe"]),
    "direction mark": files(["a\u202eb".encode()]),
    "same path": files([b"a"], [b"a"]),
    "file and folder": files([b"a"], [b"a", b"b"]),
    "name up": torrent({b"name": b".."}),
    "name absolute": torrent({b"name": b"/etc/passwd"}),
    "name empty": torrent({b"name": b""}),
    "other name": torrent({b"name.utf-8": b"../x"}),
    "other path": entry({b"path.utf-8": [b"..", b"x"]}),
    "link": entry({b"attr": b"l", b"symlink path": [b"..", b"x"]}),
    "link without target": entry({b"attr": b"l"}),
    "huge pieces": torrent({b"piece length": 1 << 40}),
    "negative pieces": torrent({b"piece length": -5}),
    "negative size": torrent({b"length": -5}),
    "too few hashes": torrent({b"length": 10**9}),
    "no files": lt.bencode({b"info": {b"name": b"a", b"piece length": 16384, b"pieces": b""}}),
    "no info": lt.bencode({b"announce": b"http://a"}),
    "a list": lt.bencode([1, 2]),
    "nested": b"l" * 100_000,
    "nothing": b"",
    "text": b"hello",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_torrents_are_refused_in_one_line(data):
    with pytest.raises(SourceError) as caught:
        Metainfo.parse(data, "x.torrent")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("x.torrent ")
    assert ";" in str(caught.value)


def tree(branch):
    info = {b"name": b"set", b"piece length": 16384, b"meta version": 2, b"file tree": branch}
    return lt.bencode({b"info": info, b"piece layers": {}})


@pytest.mark.parametrize(
    "branch",
    [
        {b"..": {b"x": {b"": {b"length": 1, b"pieces root": bytes(32)}}}},
        {b"a/b": {b"": {b"length": 1, b"pieces root": bytes(32)}}},
        {b"a": {b"": {b"attr": b"l", b"symlink path": [b".."], b"length": 0}}},
    ],
)
def test_hostile_names_of_newer_torrents_are_refused(branch):
    with pytest.raises(SourceError, match="refused"):
        Metainfo.parse(tree(branch), "x.torrent")


@given(st.binary(max_size=200), st.integers(0, 400))
def test_damaged_torrents_raise_nothing_else(noise, at):
    data = files([b"a"], [b"b", b"c"])
    try:
        Metainfo.parse(data[:at] + noise + data[at + len(noise) :], "x.torrent")
    except SynthBrainError as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_another_torrent_than_expected_is_refused():
    meta = Metainfo.parse(torrent(), "x.torrent")
    assert Metainfo.parse(torrent(), "x.torrent", meta.v1.upper()) == meta
    with pytest.raises(SourceError, match=f"info-hash {meta.v1}, expected {'ab' * 20}"):
        Metainfo.parse(torrent(), "x.torrent", "ab" * 20)


def test_unreadable_and_too_large_files_are_refused(tmp_path):
    with pytest.raises(SourceError, match="cannot read"):
        Metainfo.open(tmp_path / "missing.torrent")
    large = tmp_path / "large.torrent"
    with large.open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(SourceError, match="larger than 64 MiB"):
        Metainfo.open(large)
