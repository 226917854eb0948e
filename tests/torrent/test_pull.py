"""Volumes out of an archive inside a torrent, from programs of others on this machine."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import peers
import pytest
from released import release

from synthbrain.manifest import Manifest
from synthbrain.pull import Pull
from synthbrain.resolver import Resolver
from synthbrain.sources.opening import SourceOptions, index_path
from synthbrain.torrent.make import make_torrent

PIECE = 64 << 10


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """320 volumes, 22 MB."""
    return release(tmp_path_factory.mktemp("released"), 320)


@pytest.fixture(scope="module")
def torrent(released):
    path = released.tar.with_name("SET.torrent")
    make_torrent(released.tar, path, piece_size=PIECE, version="v1")
    return path


@pytest.fixture(params=["aria2", pytest.param("transmission", marks=pytest.mark.slow)])
def peer(request, released, torrent, tmp_path):
    folder = released.tar.parent
    if request.param == "aria2":
        with peers.aria2_seed(folder, torrent) as running:
            yield running.address
    else:
        with peers.transmission_seed(folder, torrent, tmp_path / "config") as running:
            yield running.address


def options(torrent, peer, **more):
    swarm = {"peers": [peer], "private": True, "timeout": 30}
    return SourceOptions(torrent=str(torrent), only=True, torrent_options=swarm, **more)


def same(released, resolver, rows):
    ids = resolver.manifest.table.index
    return all(
        np.array_equal(resolver.published.read(int(row)), released.stored(ids[row])) for row in rows
    )


def test_scattered_rows_cost_their_pieces(released, torrent, peer, home):
    known = Pull.of(released.open(), SourceOptions(folders=[released.tar]), store=home / "a")
    list(known.run())  # to know where they lie
    ids = [f"sub-{number:06d}" for number in range(3, 320, 16)]
    given = options(torrent, peer, index=index_path("tiny-set"))
    pull = Pull.of(Manifest.open("tiny-set"), given, ids=ids)
    assert pull.plan().missing == 20
    planned = pull.plan().bytes_to_fetch
    done = list(pull.run())
    received = peers.received(pull.sources[0].bytes)
    pull.close()
    assert set(pull.rows.tolist()) <= set(done)
    assert same(released, pull.resolver, pull.rows)
    assert planned <= 20 * (70_000 + 2 * PIECE)
    assert received <= 1.02 * planned + PIECE


def test_the_first_rows_of_an_unknown_archive_cost_the_first_bytes(released, torrent, home):
    from released import table

    tsv = home.parent / "participants.tsv"
    tsv.write_bytes(table(sorted(released.values)))
    with peers.aria2_seed(released.tar.parent, torrent) as aria2:
        pull = Pull.of(released.open(), options(torrent, aria2.address), table=tsv, limit=40)
        assert pull.count == 40
        done = list(pull.run())
        received = peers.received(pull.sources[0].bytes)
        pull.close()
    assert len(done) >= 40
    assert same(released, pull.resolver, np.flatnonzero(pull.resolver.stored()))
    assert received <= 40 * 70_000 + 2 * 2**22 + 2**20


def test_rows_of_an_unknown_archive_come_with_it(released, torrent, home):
    with peers.aria2_seed(released.tar.parent, torrent) as aria2:
        pull = Pull.of(released.open(), options(torrent, aria2.address), age_years=(45, 50))
        done = list(pull.run())
        pull.close()
    assert set(pull.rows.tolist()) <= set(done)
    stored = np.flatnonzero(pull.resolver.stored())
    assert same(released, pull.resolver, stored)
    assert len(stored) >= len(done)


KILLED = """
import sys
from synthbrain.manifest import Manifest
from synthbrain.pull import Pull
from synthbrain.sources.opening import SourceOptions
name, torrent, host, port = sys.argv[1:]
swarm = {"peers": [(host, int(port))], "private": True, "timeout": 30, "download_limit": 6_000_000}
options = SourceOptions(torrent=torrent, only=True, torrent_options=swarm)
pull = Pull.of(Manifest.open(name), options)
print("opened", flush=True)
for _ in pull.run():
    print("one", flush=True)
pull.close()
print("done", flush=True)
"""


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_pull_that_is_killed_goes_on_and_shows_no_bad_volume(released, torrent, home, kills):
    rng = np.random.default_rng(5)
    with peers.aria2_seed(released.tar.parent, torrent) as aria2:
        line = [sys.executable, "-c", KILLED, released.manifest, torrent, *aria2.address]
        for _ in range(kills):
            process = subprocess.Popen(
                list(map(str, line)), stdout=subprocess.PIPE, env=dict(os.environ)
            )
            process.stdout.readline()
            time.sleep(rng.uniform(0, 1.0))
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=30)
        subprocess.run(list(map(str, line)), check=True, timeout=100, capture_output=True)
        sent = aria2.sent()
    resolver = Resolver(Manifest.open("tiny-set"), home / "store")
    assert resolver.stored().all()
    assert same(released, resolver, range(320))
    # Pieces on their way when a process was killed, and at most one span each that was not kept.
    assert sent <= released.tar.stat().st_size + kills * 2**22
