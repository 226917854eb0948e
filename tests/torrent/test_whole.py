import contextlib
import itertools
import socket

import peers
import pytest

from synthbrain.errors import SourceError
from synthbrain.torrent.make import make_torrent
from synthbrain.torrent.whole import fetch_whole, seed


def fetch(torrent, folder, **options):
    return fetch_whole(torrent, folder, **{"private": True, "timeout": 20} | options)


def test_all_of_it_arrives_and_is_given_on(archive, tmp_path):
    torrent = archive.torrent(256 << 10)
    shown = []
    with peers.aria2_seed(archive.folder, torrent) as aria2:
        status = fetch(torrent, tmp_path / "ours", peers=[aria2.address], progress=shown.append)
    assert status.finished
    assert status.done == status.wanted == archive.path.stat().st_size
    assert shown
    assert (tmp_path / "ours/brains.tar").read_bytes() == archive.path.read_bytes()

    port = peers.free_port()
    seeding = seed(torrent, tmp_path / "ours", private=True, port=port, ratio=1.0)
    with contextlib.closing(seeding):
        assert any(status.finished for status in itertools.islice(seeding, 6))
        peers.aria2_fetch(torrent, tmp_path / "theirs", (peers.HOST, port))
        assert sum(1 for _ in seeding) < 20, "it does not stop at its ratio"
    assert (tmp_path / "theirs/brains.tar").read_bytes() == archive.path.read_bytes()


@pytest.mark.parametrize("version", ["hybrid", "v2"])
def test_newer_torrents_pass_between_ourselves(small, bytes_of, tmp_path, version):
    torrent = small.torrent(64 << 10, version)
    port = peers.free_port()
    with contextlib.closing(seed(torrent, small.folder, private=True, port=port)) as seeding:
        assert any(status.finished for status in itertools.islice(seeding, 10))
        source = bytes_of(torrent, peers=[(peers.HOST, port)])
        assert len(small.check(source.read(small.members[3:6]))) == 3
        fetch(torrent, tmp_path / "whole", peers=[(peers.HOST, port)])
    assert (tmp_path / "whole/brains.tar").read_bytes() == small.path.read_bytes()


def test_a_folder_of_files_arrives(tmp_path, bytes_of):
    folder = tmp_path / "seeded/set"
    (folder / "sub").mkdir(parents=True)
    contents = {"a.bin": b"a" * 100_000, "sub/b.bin": b"b" * 70_001, "empty": b""}
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    torrent = tmp_path / "set.torrent"
    make_torrent(folder, torrent, piece_size=16 << 10, version="v1")
    with peers.aria2_seed(folder.parent, torrent) as aria2:
        fetch(torrent, tmp_path / "out", peers=[aria2.address])
        source = bytes_of(torrent, file="sub/b.bin", peers=[aria2.address])
        ((_, data),) = source.read([(*source.waves([]), whole(source))[-1]])
    assert data == contents["sub/b.bin"]
    for name, expected in contents.items():
        assert (tmp_path / "out/set" / name).read_bytes() == expected


def whole(source):
    from synthbrain.sources.extents import Extent

    return Extent(0, source.size)


def test_what_is_there_is_not_fetched_again(small, small_torrent, small_seed, tmp_path):
    (tmp_path / "brains.tar").write_bytes(small.path.read_bytes()[:6_000_000])
    status = fetch(small_torrent, tmp_path, peers=[small_seed])
    assert status.received < small.path.stat().st_size - 5_800_000
    assert (tmp_path / "brains.tar").read_bytes() == small.path.read_bytes()
    assert fetch(small_torrent, tmp_path).received == 0


def test_check_finds_damage_that_is_not_remembered(small, small_torrent, small_seed, tmp_path):
    fetch(small_torrent, tmp_path, peers=[small_seed])
    with (tmp_path / "brains.tar").open("r+b") as file:
        file.seek(3_000_000)
        file.write(bytes(50))
    status = fetch(small_torrent, tmp_path, peers=[small_seed], check=True)
    assert 0 < status.received <= 3 * (64 << 10)
    assert (tmp_path / "brains.tar").read_bytes() == small.path.read_bytes()


@pytest.mark.parametrize("manner", ["lies", "stalls", "closes", "short"])
def test_a_bad_web_seed_beside_an_honest_peer(small, small_torrent, tmp_path, manner, bytes_of):
    data, some = small.path.read_bytes(), small.members[:20]
    with (
        peers.web_seed(data, "brains.tar", manner) as web,
        peers.aria2_seed(small.folder, small_torrent, limit=1_500_000) as slow,
    ):
        source = bytes_of(small_torrent, peers=[slow.address], web_seeds=[web.url], timeout=60)
        assert len(small.check(source.read(some))) == len(some)
        assert web.ranges, "the web seed was not asked"


def test_a_peer_that_lies_beside_an_honest_one(
    small, small_torrent, bytes_of, small_seed, tmp_path
):
    data = bytearray(small.path.read_bytes())
    data[::5000] = bytes(len(data[::5000]))
    (tmp_path / "lies").mkdir()
    (tmp_path / "lies" / small.path.name).write_bytes(data)
    with peers.aria2_seed(tmp_path / "lies", small_torrent, host=peers.WEB_HOST) as liar:
        source = bytes_of(small_torrent, peers=[liar.address, small_seed])
        assert len(small.check(source.read(small.members))) == len(small.members)


def test_a_peer_that_lies_alone_is_one_error(small, small_torrent, bytes_of, tmp_path):
    data = bytes(byte ^ 1 for byte in small.path.read_bytes())
    (tmp_path / "lies").mkdir()
    (tmp_path / "lies" / small.path.name).write_bytes(data)
    with peers.aria2_seed(tmp_path / "lies", small_torrent) as liar:
        source = bytes_of(small_torrent, peers=[liar.address], timeout=5)
        with pytest.raises(SourceError, match="nothing came") as told:
            list(source.read(small.members[:5]))
    assert "\n" not in str(told.value)


def test_a_web_seed_alone_is_enough(small, small_torrent, bytes_of):
    with peers.web_seed(small.path.read_bytes(), "brains.tar") as web:
        source = bytes_of(small_torrent, web_seeds=[web.url])
        assert len(small.check(source.read(small.members[10:20]))) == 10
        asked = sum(end - begin for begin, end in web.ranges)
    assert asked <= sum(e.size + 2 * (64 << 10) for e in small.members[10:20])


def test_a_lying_web_seed_alone_is_one_error(small, small_torrent, bytes_of):
    with peers.web_seed(small.path.read_bytes(), "brains.tar", "lies") as web:
        source = bytes_of(small_torrent, web_seeds=[web.url], timeout=3)
        with pytest.raises(SourceError, match="nothing came"):
            small.check(source.read(small.members[:30]))


def test_a_full_disk_is_told(small, small_torrent, small_seed, small_disk, bytes_of):
    folder, remount = small_disk("4m")
    source = bytes_of(small_torrent, peers=[small_seed], scratch=folder)
    with pytest.raises(SourceError, match=r"no room .*free some space"):
        small.check(source.read(small.members))
    remount("size=30m")
    again = bytes_of(small_torrent, peers=[small_seed], scratch=folder)
    assert len(small.check(again.read(small.members))) == len(small.members)


def test_a_port_that_is_taken_is_told(small, small_torrent):
    with socket.create_server((peers.HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SourceError, match=f"port {port} is in use; choose another"):
            for _ in seed(small_torrent, small.folder, private=True, port=port, seconds=10):
                pass


def test_a_peer_may_be_named(small, tmp_path):
    torrent = small.torrent(64 << 10)
    port = peers.free_port()
    with contextlib.closing(seed(torrent, small.folder, private=True, port=port)) as seeding:
        assert any(status.finished for status in itertools.islice(seeding, 10))
        fetch(torrent, tmp_path / "whole", peers=[("localhost", port)])
    with pytest.raises(SourceError, match=r"no peer nowhere\.invalid:1 "):
        fetch(torrent, tmp_path / "other", peers=[("nowhere.invalid", 1)])
