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

STALE_SECONDS = 120.0
"""A claim not touched for so long belongs to nobody."""

_BEAT_SECONDS = 20.0


def claim(shard: Path) -> bool:
    """Try to claim a shard for this process; False if somebody else holds it."""
    path = _path(shard)
    for _ in range(2):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            if not is_stale(shard):
                return False
            path.unlink(missing_ok=True)
        except OSError:
            return True  # a claim that cannot be written must not stop the work
        else:
            with os.fdopen(descriptor, "w") as file, contextlib.suppress(OSError):
                json.dump({"host": socket.gethostname(), "pid": os.getpid()}, file)
            return True
    return False


def release(shard: Path) -> None:
    """Give a claim up."""
    with contextlib.suppress(OSError):
        _path(shard).unlink(missing_ok=True)


def is_stale(shard: Path) -> bool:
    """Whether nobody holds the shard: no claim, an old one, or one of a dead local process."""
    path = _path(shard)
    try:
        age = time.time() - path.stat().st_mtime
        owner = json.loads(path.read_text())
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return age > STALE_SECONDS  # being written, or cut short
    if owner.get("host") == socket.gethostname() and not _alive(int(owner.get("pid", 0))):
        return True
    return age > STALE_SECONDS


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
    return shard.with_name(shard.name + ".claim")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
