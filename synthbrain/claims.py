"""Who is making which volume right now, so that two processes do not make the same one.

A claim is a small file beside the shard: created exclusively, touched while its owner lives,
ignored once stale. Losing, deleting or disbelieving every claim costs time, never correctness,
because shards are published atomically whatever the claims say. No ``flock`` is used: cluster
file systems grant it without meaning it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from synthbrain.store import publish

STALE_SECONDS = 120.0
"""A claim not touched for so long belongs to nobody."""

_SUFFIX = ".claim"
_BEAT_SECONDS = 20.0
_UNREADABLE_SECONDS = 5.0
"""Claims are published whole: one without an owner is at most some odd file system's delay."""


def claim(shard: Path) -> bool:
    """Try to claim a shard for this process; False if somebody else holds it."""
    path = _path(shard)
    owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            if publish(path, owner, keep=Path.exists):
                return True
            if not is_stale(shard):
                return False
            path.unlink(missing_ok=True)
    except OSError:
        return True  # a claim that cannot be written must not stop the work
    return False


def release(shard: Path) -> None:
    """Give a claim up."""
    with contextlib.suppress(OSError):
        _path(shard).unlink(missing_ok=True)


def is_stale(shard: Path) -> bool:
    """Whether nobody holds the shard: no claim, an old one, or one of a dead local process.

    A claim from the future is as unbelievable as an old one: some clock is wrong, and the worst
    that disbelief can do is to make a volume twice.
    """
    path = _path(shard)
    try:
        age = abs(time.time() - path.stat().st_mtime)
    except OSError:
        return True
    try:
        owner = json.loads(path.read_text())
        dead = owner["host"] == socket.gethostname() and not _alive(int(owner["pid"]))
    except OSError:
        dead = False
    except (ValueError, TypeError, KeyError, OverflowError):
        return age > _UNREADABLE_SECONDS
    return dead or age > STALE_SECONDS


def sweep(root: Path) -> None:
    """Delete the claims in a store's folder that belong to nobody any more."""
    for path in root.glob(f"block-*/*{_SUFFIX}"):
        if is_stale(shard := path.with_name(path.name.removesuffix(_SUFFIX))):
            release(shard)


@contextlib.contextmanager
def held(shards: list[Path]) -> Iterator[None]:
    """Keep claims fresh while the body runs, and release them after it."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(_BEAT_SECONDS):
            for shard in shards:
                with contextlib.suppress(OSError):
                    os.utime(_path(shard))

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    try:
        yield
    finally:
        done.set()
        heart.join()
        for shard in shards:
            release(shard)


def _path(shard: Path) -> Path:
    return shard.with_name(shard.name + _SUFFIX)


def _alive(pid: int) -> bool:
    """Whether a local process may still be at work: one that its parent has not buried is not."""
    try:
        os.kill(pid, 0)  # refuses numbers that are no process's
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False
    except (OSError, psutil.Error):
        return True
