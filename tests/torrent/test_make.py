import pytest

from synthbrain.errors import SourceError
from synthbrain.torrent.make import choose_piece_size, make_torrent
from synthbrain.torrent.metainfo import Metainfo


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "brains.tar"
    path.write_bytes(bytes(range(256)) * 2000)
    return path


@pytest.mark.parametrize("version", ["hybrid", "v1", "v2"])
def test_the_same_files_make_the_same_torrent(file, tmp_path, version):
    first, second = (
        make_torrent(file, tmp_path / name, version=version, trackers=["http://a/announce"])
        for name in ("1.torrent", "2.torrent")
    )
    assert first.data == second.data == (tmp_path / "1.torrent").read_bytes()
    assert (first.v1 is None, first.v2 is None) == (version == "v2", version == "v1")
    assert b"creation date" not in first.data
    assert str(tmp_path).encode() not in first.data


def test_it_says_what_it_was_told(file, tmp_path):
    made = make_torrent(
        file, tmp_path / "x.torrent", trackers=["http://a/announce", "http://b/announce"],
        web_seeds=["http://w/brains.tar"], piece_size=32 << 10, comment="by us", private=True,
        created=1_700_000_000,
    )  # fmt: skip
    again = Metainfo.open(tmp_path / "x.torrent", made.v1)
    assert again == made
    assert made.trackers == ("http://a/announce", "http://b/announce")
    assert made.web_seeds == ("http://w/brains.tar",)
    assert (made.piece_length, made.private, made.name) == (32 << 10, True, "brains.tar")
    assert made.matches(0, file.read_bytes()[: 32 << 10])
    assert not made.matches(1, bytes(32 << 10))


@pytest.mark.parametrize("version", ["hybrid", "v1", "v2"])
@pytest.mark.parametrize("size", [10**5, 10**8, 10**9, 6 * 10**11])
def test_piece_sizes(version, size):
    piece = choose_piece_size(size, version)
    assert piece & (piece - 1) == 0
    assert 64 << 10 <= piece <= 2 << 20
    assert size / piece * 52 < 40_000_000


def test_progress_counts_pieces(file, tmp_path):
    seen = []
    make_torrent(
        file, tmp_path / "x.torrent", piece_size=64 << 10, progress=lambda *now: seen.append(now)
    )
    assert seen == [(piece, 8) for piece in range(1, 9)]


@pytest.mark.parametrize("size", [1000, 3 << 14, 1 << 13])
def test_odd_piece_sizes_are_refused(file, tmp_path, size):
    with pytest.raises(SourceError, match="power of two"):
        make_torrent(file, tmp_path / "x.torrent", piece_size=size)


def test_nothing_and_links_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="nothing to make"):
        make_torrent(tmp_path / "empty", tmp_path / "x.torrent")
    (tmp_path / "empty/link").symlink_to("/etc/passwd")
    with pytest.raises(SourceError, match="symbolic link"):
        make_torrent(tmp_path / "empty", tmp_path / "x.torrent")
    with pytest.raises(SourceError, match="nothing to make"):
        make_torrent(tmp_path / "missing", tmp_path / "x.torrent")
    assert not (tmp_path / "x.torrent").exists()


def test_a_folder_of_this_machine_in_the_comment_is_warned_of(file, tmp_path, caplog):
    make_torrent(file, tmp_path / "x.torrent", comment=f"from {tmp_path}")
    assert "of this machine" in caplog.text


def test_no_size_of_pieces_is_not_any_size(file, tmp_path):
    for size in (0, -1, 3 << 14):
        with pytest.raises(SourceError, match="expected a power of two"):
            make_torrent(file, tmp_path / "x.torrent", piece_size=size)
