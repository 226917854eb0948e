import hashlib
import os
import pickle
import random
import signal
import subprocess
import sys
import time

import peers
import psutil
import pytest

from synthbrain.errors import SourceError
from synthbrain.sources.extents import Bytes, Extent
from synthbrain.torrent.metainfo import Metainfo

PIECE = 64 << 10
OVERHEAD = 1.02
"""The counters of payload hold some bytes of the protocol."""


@pytest.fixture
def covering():
    def count(torrent, extents):
        meta = Metainfo.open(torrent)
        length = meta.piece_length
        pieces = {p for e in extents for p in range(e.offset // length, (e.end - 1) // length + 1)}
        return sum(meta.extent(piece)[1] for piece in pieces)

    return count


def scattered(archive, count=20):
    return random.Random(7).sample(archive.members, count)


@pytest.mark.parametrize(
    ("program", "piece"),
    [
        ("transmission", 64),
        pytest.param("aria2", 64, marks=pytest.mark.slow),
        ("aria2", 256),
        ("aria2", 1024),
    ],
)
def test_scattered_members_cost_their_pieces(archive, bytes_of, covering, program, piece, tmp_path):
    torrent, extents = archive.torrent(piece << 10), scattered(archive)
    with seeding(program, archive.folder, torrent, tmp_path) as peer:
        source = bytes_of(torrent, peers=[peer.address])
        assert isinstance(source, Bytes)
        assert source.cost(extents).bytes == covering(torrent, extents)
        found = archive.check(source.read(extents))
        assert sorted(found) == sorted(extents)
        assert sum(e.size for e in extents) <= peers.received(source)
        assert peers.received(source) <= OVERHEAD * covering(torrent, extents)
        assert source.cost(extents).bytes == 0


def seeding(program, folder, torrent, tmp_path):
    if program == "aria2":
        return peers.aria2_seed(folder, torrent)
    return peers.transmission_seed(folder, torrent, tmp_path / "daemon")


def test_first_members_cost_the_first_pieces(small, small_torrent, small_seed, bytes_of, covering):
    source = bytes_of(small_torrent, peers=[small_seed])
    for count in (1, 5, 10):
        small.check(source.read(small.members[:count]))
        first = covering(small_torrent, small.members[:count])
        assert peers.received(source) <= OVERHEAD * first
    assert source.spare()[0].end >= small.members[9].end


def test_what_is_here_needs_no_peer(small, small_torrent, small_seed, bytes_of):
    with_peer = bytes_of(small_torrent, peers=[small_seed])
    small.check(with_peer.read(small.members[:3]))
    with_peer.close()
    alone = bytes_of(small_torrent)
    assert alone.cost(small.members[:3]).bytes == 0
    assert len(small.check(alone.read(small.members[:3]))) == 3


def test_a_budget_is_kept(small, small_torrent, small_seed, bytes_of, tmp_path):
    source = bytes_of(small_torrent, peers=[small_seed], budget=2_000_000)
    waves = list(source.waves(small.members))
    assert sorted(e for wave in waves for e in wave) == sorted(small.members)
    assert len(waves) > 5
    used = []
    for wave in waves:
        assert source.cost(wave).bytes <= 2_000_000
        small.check(source.read(wave))
        used.append(disk_use(tmp_path / "scratch"))
    assert max(used) < 2_000_000 + 300_000


def disk_use(folder):
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def test_a_closed_read_stops_the_transfer(small, small_torrent, small_seed, bytes_of):
    source = bytes_of(small_torrent, peers=[small_seed], download_limit=500_000)
    reading = source.read(small.members)
    next(reading)
    reading.close()
    seen = [-PIECE]

    def rests():  # what was requested, some seconds of it, still comes
        time.sleep(1.5)
        seen.append(peers.received(source))
        return seen[-1] <= seen[-2] + PIECE

    peers.wait_until(rests, 30, "the transfer to stop")
    assert seen[-1] < 8_000_000
    assert len(small.check(source.read(small.members[:2]))) == 2


def test_flipped_bytes_in_scratch_are_fetched_again(
    small, small_torrent, small_seed, bytes_of, tmp_path
):
    first = bytes_of(small_torrent, peers=[small_seed])
    small.check(first.read(small.members[:10]))
    first.close()
    (data,) = (tmp_path / "scratch").rglob("brains.tar")
    with data.open("r+b") as file:
        for member in small.members[2:8:2]:
            file.seek(member.offset + 1000)
            file.write(bytes(100))
    again = bytes_of(small_torrent, peers=[small_seed])
    assert len(small.check(again.read(small.members[:10]))) == 10
    assert peers.received(again) <= OVERHEAD * 3 * PIECE


def test_flipped_bytes_under_a_running_worker_are_fetched_again(
    small, small_torrent, small_seed, bytes_of, tmp_path
):
    source = bytes_of(small_torrent, peers=[small_seed])
    small.check(source.read(small.members[:10]))
    (data,) = (tmp_path / "scratch").rglob("brains.tar")
    with data.open("r+b") as file:
        file.seek(small.members[4].offset + 1000)
        file.write(bytes(100))
    assert len(small.check(source.read(small.members[:20]))) == 20


def test_a_lost_scratch_file_is_fetched_again(small, small_torrent, small_seed, bytes_of, tmp_path):
    first = bytes_of(small_torrent, peers=[small_seed])
    small.check(first.read(small.members[:4]))
    first.close()
    (data,) = (tmp_path / "scratch").rglob("brains.tar")
    data.unlink()
    again = bytes_of(small_torrent, peers=[small_seed])
    assert again.cost(small.members[:4]).bytes > 0
    assert len(small.check(again.read(small.members[:4]))) == 4


def test_a_magnet_link_leads_to_the_members(small, small_torrent, small_seed, bytes_of):
    meta = Metainfo.open(small_torrent)
    uri = f"magnet:?xt=urn:btih:{meta.v1}&dn=brains.tar"
    source = bytes_of(uri, peers=[small_seed])
    assert source.size == small.path.stat().st_size
    assert len(small.check(source.read(small.members[5:8]))) == 3
    source.close()
    assert len(small.check(bytes_of(uri).read(small.members[5:8]))) == 3


def test_a_magnet_link_nobody_knows_is_one_error(bytes_of):
    source = bytes_of("magnet:?xt=urn:btih:" + "ab" * 20 + "&dn=lost", timeout=2)
    started = time.monotonic()
    with pytest.raises(SourceError, match=r"nothing came of torrent lost for 2 s .*peers="):
        source.size  # noqa: B018
    assert time.monotonic() - started < 15


def test_no_seeder_is_one_error_in_time(small, small_torrent, bytes_of):
    started = time.monotonic()
    with pytest.raises(SourceError, match=r"nothing came .* for 2 s \(0 peers.*web_seeds="):
        list(bytes_of(small_torrent, timeout=2).read(small.members[:2]))
    assert time.monotonic() - started < 15


def test_a_scratch_folder_has_one_worker(small, small_torrent, small_seed, bytes_of):
    first = bytes_of(small_torrent, peers=[small_seed])
    small.check(first.read(small.members[:1]))
    with pytest.raises(SourceError, match="another process uses"):
        list(bytes_of(small_torrent).read(small.members[:1]))
    assert len(small.check(first.read(small.members[:2]))) == 2


def test_a_later_read_ends_the_one_before(small, small_torrent, small_seed, bytes_of):
    source = bytes_of(small_torrent, peers=[small_seed])
    before = source.read(small.members[:5])
    next(before)
    small.check(source.read(small.members[5:7]))
    with pytest.raises(SourceError, match="read by another call"):
        list(before)


def test_a_worker_that_dies_is_an_error_then_replaced(small, small_torrent, small_seed, bytes_of):
    source = bytes_of(small_torrent, peers=[small_seed])
    small.check(source.read(small.members[:1]))
    os.kill(source._process.worker_pid, signal.SIGKILL)
    with pytest.raises(SourceError, match=r"ended \(status -9\); run again"):
        list(source.read(small.members[:30]))
    assert len(small.check(source.read(small.members[:30]))) == 30


def test_pickles_start_anew(small, small_torrent, small_seed, bytes_of):
    source = bytes_of(small_torrent, peers=[small_seed])
    small.check(source.read(small.members[:1]))
    copy = pickle.loads(pickle.dumps(source))
    source.close()
    assert len(small.check(copy.read(small.members[:2]))) == 2
    copy.close()


def test_nothing_starts_before_it_is_needed(small, small_torrent, bytes_of, tmp_path):
    source = bytes_of(small_torrent)
    list(source.waves(small.members))
    assert source.cost(small.members[:1]).bytes > 0
    assert source.spare() == []
    assert source.size == small.path.stat().st_size
    assert not (tmp_path / "scratch").exists()


def test_the_worker_imports_no_heavy_packages(python):
    heavy = python("""
        import sys, synthbrain.torrent.worker
        print([m for m in ("torch", "pandas", "nibabel") if m in sys.modules])
    """)
    assert heavy.strip() == "[]"


READER = """
import sys
from pathlib import Path
from synthbrain.sources.extents import Extent
from synthbrain.torrent.client import TorrentBytes

torrent, scratch, port, done = sys.argv[1:5]
extents = [Extent(*map(int, line.split())) for line in Path(done).read_text().splitlines()]
todo = [Extent(*map(int, pair.split(":"))) for pair in sys.argv[5:]]
source = TorrentBytes(
    torrent=torrent, scratch=Path(scratch), private=True, peers=[("127.0.0.1", int(port))],
    download_limit=3_000_000, timeout=20,
)
source._running()
assert source.cost(extents).bytes == 0, "what was read before is not here any more"
print("worker", source._process.worker_pid, flush=True)
for extent, data in source.read(todo):
    print(extent.offset, extent.size, hash_of(data), flush=True)
print("end", flush=True)
source.close()
"""


def spawn(torrent, scratch, port, done, todo):
    script = "import hashlib\nhash_of = lambda data: hashlib.sha256(data).hexdigest()\n" + READER
    pairs = [f"{e.offset}:{e.size}" for e in todo]
    command = [sys.executable, "-c", script, *map(str, (torrent, scratch, port, done)), *pairs]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


def worker_of(reader):
    word, _, pid = reader.stdout.readline().partition(" ")
    assert word == "worker", reader.stderr.read()
    return int(pid)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_goes_on(small, small_torrent, tmp_path, kills):
    draw = random.Random(3)
    done = tmp_path / "done"
    done.write_text("")
    todo = list(small.members)
    with peers.aria2_seed(small.folder, small_torrent, limit=2_000_000) as aria2:
        for _ in range(kills):
            reader = spawn(small_torrent, tmp_path / "scratch", aria2.address[1], done, todo)
            worker = worker_of(reader)
            time.sleep(draw.uniform(0, 0.35))
            for pid in draw.sample([reader.pid, worker], 2):
                with peers.contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            lines = [line.split() for line in reader.communicate()[0].splitlines()]
            for offset, size, digest in (line for line in lines if len(line) == 3):
                extent = Extent(int(offset), int(size))
                assert hashlib.sha256(small.bytes(extent)).hexdigest() == digest
                with done.open("a") as file:
                    file.write(f"{offset} {size}\n")
        reader = spawn(small_torrent, tmp_path / "scratch", aria2.address[1], done, todo)
        assert "end" in reader.communicate(timeout=60)[0]
        sent = aria2.sent()
    assert sent <= small.path.stat().st_size + kills * 10 * PIECE


def test_no_worker_outlives_its_parent(small, small_torrent, small_seed, tmp_path):
    done = tmp_path / "done"
    done.write_text("")
    reader = spawn(small_torrent, tmp_path / "scratch", small_seed[1], done, small.members)
    worker = worker_of(reader)
    reader.kill()
    reader.wait()
    peers.wait_until(lambda: not psutil.pid_exists(worker), 10, "the worker to end")
