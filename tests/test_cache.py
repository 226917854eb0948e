import contextlib
import itertools
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from watching import bytes_of_shards

from synthbrain.cache import Again, Cache, CachedStore
from synthbrain.errors import StoreError
from synthbrain.header import Geometry
from synthbrain.shard import ShardLayout
from synthbrain.testing import check_store

SMALL = Geometry(shape=(4, 4, 4), chunks=(4, 4, 4))


def volume(number):
    return np.random.default_rng(number).integers(0, 255, SMALL.shape).astype("uint8")


CLOCK = itertools.count()
SIZE = len(ShardLayout(SMALL.shape, SMALL.chunks, "uint8").encode(volume(0)))


def fetched(maker, positions):
    return np.full(len(positions), Again.FETCHED)


def stored(folder, limit, recovery=fetched, maker="somebody"):
    cache = Cache(folder, limit, recovery)
    return CachedStore(folder / maker / "volumes", SMALL, cache=cache)


def fill(store, positions):
    """Store volumes one after the other, as the clock ticks."""
    for position in positions:
        store.write(position, volume(position))
        if store.has(position):
            then = 1e9 + next(CLOCK)
            os.utime(store.path(position), (then, then))


@pytest.fixture
def root(tmp_path):
    return tmp_path / "set"


def test_it_is_a_store(root):
    check_store(stored(root, 10**6))


def test_what_was_stored_longest_ago_goes_first(root):
    store = stored(root, 5 * SIZE)
    fill(store, range(5))
    store.touch(1)
    fill(store, range(1000, 1002))
    assert store.positions() == [1, 3, 4, 1000, 1001]
    assert store.cache.used() <= 5 * SIZE


def test_what_is_had_again_most_easily_goes_first(root):
    def recovery(maker, positions):
        return np.array([Again.NEVER, Again.MADE, Again.FETCHED])[positions % 3]

    store = stored(root, 6 * SIZE, recovery)
    fill(store, range(6))
    fill(store, [12, 15])  # only copies, two in place of those a source has
    assert store.positions() == [0, 1, 3, 4, 12, 15]
    fill(store, [18, 21])  # and two in place of those the generator makes
    assert store.positions() == [0, 3, 12, 15, 18, 21]


def test_only_copies_are_never_deleted(root, caplog):
    store = stored(root, 3 * SIZE, lambda _, positions: np.full(len(positions), Again.NEVER))
    fill(store, range(5))
    assert store.positions() == [0, 1, 2]
    assert store.cache.is_full
    assert caplog.text.count("volumes are served and not kept") == 1


def test_stores_of_a_set_share_its_limit(root):
    cache = Cache(root, 4 * SIZE, fetched)
    one, other = (CachedStore(root / maker / "volumes", SMALL, cache=cache) for maker in "ab")
    fill(one, range(3))
    fill(other, range(3))
    assert (one.positions(), other.positions()) == ([2], [0, 1, 2])


def test_a_volume_larger_than_the_limit_is_not_kept(root):
    store = stored(root, SIZE - 1)
    assert not store.write(0, volume(0))
    assert store.positions() == []


def test_a_damaged_shard_set_aside_counts_and_goes(root):
    store = stored(root, 3 * SIZE)
    fill(store, range(3))
    store.quarantine(0)
    assert store.cache.used() == 3 * SIZE
    fill(store, [7])
    assert not list(root.rglob("*.bad"))
    assert store.positions() == [1, 2, 7]


def test_a_volume_deleted_while_it_is_read_is_read_whole(root):
    store = stored(root, 2 * SIZE)
    store.write(0, volume(0))
    wrong, stop = [], threading.Event()

    def read():
        while not stop.is_set():
            try:
                found = store.read(0)
            except LookupError:
                continue
            if not np.array_equal(found, volume(0)):
                wrong.append(found)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(300):
        store.write(number % 4, volume(number % 4))
    stop.set()
    reader.join()
    assert wrong == []


def test_a_full_disk_and_a_read_only_one_are_told(small_disk, caplog):
    folder, remount = small_disk("40k")
    store = stored(folder / "set", 10**6)
    fill(store, range(30))
    assert 0 < len(store.positions()) < 30
    assert caplog.text.count("the disk is full; volumes are served and not kept") == 1
    remount("ro")
    with pytest.raises(StoreError, match="cannot be written to"):
        store.write(99, volume(99))


def test_what_dead_processes_left_is_swept(root):
    store = stored(root, 4 * SIZE)
    fill(store, range(4))
    here = os.uname().nodename
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    lease = root / f".{here}.{dead.pid}.0a1b.room"
    partial = store.path(0).with_name(f".c.9.0.0.0.{here}.{dead.pid}.0a1b.partial")
    for path in (lease, partial):
        path.write_bytes(b"")
        os.truncate(path, 4 * SIZE)
    fill(store, [7])
    assert not lease.exists()
    assert not partial.exists()
    assert store.positions() == [1, 2, 3, 7]


def test_what_living_processes_reserved_is_theirs(root):
    store = stored(root, 4 * SIZE)
    other = root / f".{os.uname().nodename}.{os.getppid()}.0a1b.room"
    other.parent.mkdir(parents=True)
    with other.open("wb") as file:
        file.truncate(2 * SIZE)
    fill(store, range(4))
    assert store.positions() == [2, 3]
    elsewhere = root / ".another-host.1.0a1b.room"
    other.rename(elsewhere)
    fill(store, [4])
    assert store.positions() == [3, 4]
    os.utime(elsewhere, (1e9, 1e9))
    fill(store, [5, 6])
    assert store.positions() == [3, 4, 5, 6]


def test_a_lease_somebody_deleted_is_taken_anew(root):
    store = stored(root, 256 * 4 * SIZE)
    fill(store, [0])
    (lease,) = root.glob(".*.room")
    assert lease.stat().st_size == 3 * SIZE
    lease.unlink()
    fill(store, [1])
    assert lease.stat().st_size == 3 * SIZE


def test_copies_reserve_for_themselves(root):
    store = stored(root, 256 * 4 * SIZE)
    fill(store, [0])
    twin = pickle.loads(pickle.dumps(store))
    fill(twin, [1])
    assert len(list(root.glob(".*.room"))) == 2
    if (child := os.fork()) == 0:
        fill(store, [2])
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert len(list(root.glob(".*.room"))) == 3
    assert store.positions() == [0, 1, 2]


def write_and_read(root, seed):
    store = stored(root, 20 * SIZE)
    for position in np.random.default_rng(seed).permutation(np.tile(range(50), 6)).tolist():
        store.write(position, volume(position))
        with contextlib.suppress(LookupError):
            assert np.array_equal(store.read(position), volume(position))


def test_processes_never_exceed_the_limit_together(root):
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=write_and_read, args=(root, seed)) for seed in range(3)]
    for writer in writers:
        writer.start()
    most = 0
    while any(writer.is_alive() for writer in writers):
        most = max(most, bytes_of_shards(root))
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert 10 * SIZE < most <= 20 * SIZE


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.sampled_from(["write", "touch", "read"])), max_size=60
    ),
    st.integers(1, 12),
)
def test_the_limit_holds_after_every_step(tmp_path_factory, steps, room):
    def recovery(maker, positions):
        return np.where(positions % 7 == 0, Again.NEVER, Again.FETCHED)

    store = stored(tmp_path_factory.mktemp("cache"), room * SIZE, recovery)
    only_copies = set()
    for position, action in steps:
        if action == "write":
            if store.write(position, volume(position)) and position % 7 == 0:
                only_copies.add(position)
        elif action == "touch":
            store.touch(position)
        elif store.has(position):
            assert np.array_equal(store.read(position), volume(position))
        assert store.cache.used() <= room * SIZE
        assert only_copies <= set(store.positions())
