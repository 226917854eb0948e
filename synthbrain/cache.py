"""A store within a limit: for volumes that can be had again.

A cache is an ordinary folder of stores. Before a shard is linked into place its room is *reserved*,
by the size of a sparse file that everybody who looks at the folder counts, and old shards are
deleted until shards and reservations keep the limit. So any number of processes share a folder
without a lock: two that look at the same time both see what the other reserved, and at worst both
delete. A shard that is deleted while it is read is read to its end, through the open file; one that
is gone before is a missing volume like any other.

What is deleted first is what is had again most easily, and what nothing here can give again is
never deleted: see :class:`Again`. Among equals it is what was stored, or looked ahead for, longest
ago: an epoch asks for each row once, so a row that has just been read is the last to keep.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import psutil

from synthbrain.errors import StoreError, StoreFullError
from synthbrain.sizes import size_text
from synthbrain.store import BLOCK, STALE_SECONDS, Store

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger("synthbrain")

_SHARES = 256
"""A process reserves this part of the limit at once, and looks at the folder again when it is used
up: with 24 processes a tenth of the cache stays empty."""

_SHARD = re.compile(r"block-(\d+)/c\.(\d+)(\.0)+(\.bad)?")
_LEFTOVER = re.compile(r"\..*\.(?P<pid>\d+)\.[0-9a-f]+\.(?:partial|room)")


class Again(IntEnum):
    """How a volume could be had once more, easiest first."""

    FETCHED = 0
    """A source of this process has it."""
    MADE = 1
    """The generator of this process makes it."""
    NEVER = 2
    """Nothing here gives it: this may be the only copy."""


Recovery = Callable[[str, "NDArray[np.int64]"], "NDArray[np.int64]"]
"""Maker and positions in; :class:`Again` of each out, ``(n,)``."""


class _Shard(NamedTuple):
    """A file of the cache; tuples sort by what to delete first."""

    again: int
    modified: float
    size: int
    path: Path


@dataclass
class _Lease:
    """What one process has reserved, in a file as large as that."""

    path: Path
    size: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def resize(self, size: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.truncate(size)  # sparse: it is as large as it says and takes no room
        self.size = size

    def stands(self) -> bool:
        """Whether nobody took it for a dead process's."""
        return self.size > 0 and self.path.exists()


@dataclass(eq=False)
class Cache:
    """Keeps the stores of one set of volumes, together, within a limit.

    Parameters
    ----------
    folder
        ``<folder>/<maker>/volumes/block-0042/…``, as a resolver lays stores out.
    limit
        Bytes of all shards below it.
    recovery
        Tells how volumes could be had again.
    """

    folder: Path
    limit: int
    recovery: Recovery
    _leases: dict[int, _Lease] = field(init=False, default_factory=dict, repr=False)
    is_full: bool = field(init=False, default=False)
    """Whether there was no room for the latest volume."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_leases": {}}

    @contextlib.contextmanager
    def room(self, size: int) -> Iterator[bool]:
        """Room for a shard that the body stores, or False.

        Parameters
        ----------
        size
            Bytes of the shard.

        Yields
        ------
        bool
            Whether the limit allows it, after deleting what can be had again.
        """
        lease = self._lease()
        with lease.lock:
            granted = (lease.stands() and lease.size >= size) or self._extend(lease, size)
            try:
                yield granted
            finally:
                if granted:
                    lease.resize(max(0, lease.size - size))

    def used(self) -> int:
        """Bytes of all shards in the folder."""
        return sum(size for _, _, size, _ in self._shards())

    def refuse(self, why: str) -> None:
        """Note that a volume cannot be kept; told once, until there is room again."""
        if not self.is_full:
            log.warning(
                "no room in the cache %s of %s: %s; volumes are served and not kept. Raise "
                "cache_limit, free some disk, or choose another cache",
                self.folder, size_text(self.limit), why,
            )  # fmt: skip
        self.is_full = True

    def _lease(self) -> _Lease:
        pid = os.getpid()  # a forked child must not use what its parent reserved, nor its lock
        name = f".{socket.gethostname()}.{pid}.{secrets.token_hex(4)}.room"
        return self._leases.setdefault(pid, _Lease(self.folder / name))

    def _extend(self, lease: _Lease, size: int) -> bool:
        """Reserve room for a shard and some more to come, or leave things as they are."""
        if size > self.limit:
            self.refuse(f"a volume of {size_text(size)} is larger than the limit")
            return False
        wanted = max(size, self.limit // _SHARES)
        lease.resize(wanted)
        over = self._trim()
        if wanted - over < size:
            lease.resize(0)
            self.refuse("the rest of it is reserved, or holds what can be had from nowhere else")
            return False
        if over > 0:
            lease.resize(wanted - over)
        self.is_full = False
        return True

    def _trim(self) -> int:
        """Delete until shards and reservations keep the limit; bytes by which they do not."""
        reserved = self._reserved()  # first: what is stored meanwhile must not be missed in both
        shards = self._shards()
        over = reserved + sum(shard.size for shard in shards) - self.limit
        for shard in sorted(shards):
            if over <= 0 or shard.again == Again.NEVER:
                break
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                shard.path.unlink()
            over -= shard.size
        return over

    def _shards(self) -> list[_Shard]:
        """All shards; what killed writers left beside them is swept."""
        found: list[_Shard] = []
        for maker in _folders(self.folder):
            files = list(_shard_files(Path(maker.path, "volumes")))
            positions = np.array([position for position, _ in files], dtype=np.int64)
            again = self.recovery(maker.name, positions).tolist()
            for how, (_, entry) in zip(again, files, strict=True):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    path = Path(entry.path)
                    found.append(_Shard(how, status.st_mtime, status.st_size, path))
        return found

    def _reserved(self) -> int:
        """Bytes that living processes have reserved."""
        total = 0
        for entry in _entries(self.folder):
            if entry.name.endswith(".room") and not _sweep(entry):
                with contextlib.suppress(FileNotFoundError):
                    total += entry.stat().st_size
        return total


@dataclass(frozen=True, eq=False)
class CachedStore(Store):
    """A store that keeps the limit of a cache, and serves on where it cannot store.

    Parameters
    ----------
    root, geometry, attributes
        As of every :class:`synthbrain.Store`.
    cache
        Whose limit to keep.
    """

    cache: Cache = field(kw_only=True)

    def touch(self, position: int) -> None:
        """Note that a volume will be asked for soon."""
        with contextlib.suppress(OSError):
            os.utime(self.path(position))

    def _publish(self, position: int, shard: bytes) -> bool:
        try:
            with self.cache.room(len(shard)) as granted:
                return granted and super()._publish(position, shard)
        except StoreFullError:
            self.cache.refuse("the disk is full")
            return False
        except StoreError:
            raise
        except OSError as error:
            raise self._explain(error, self.cache.folder, 0) from error


def _shard_files(root: Path) -> Iterator[tuple[int, os.DirEntry[str]]]:
    """Position and file of each shard of a store, damaged ones too; leftovers are swept."""
    for block in _folders(root):
        for entry in _entries(Path(block.path)):
            match = _SHARD.fullmatch(f"{block.name}/{entry.name}")
            if match is None:
                _sweep(entry)
            else:
                yield int(match[1]) * BLOCK + int(match[2]), entry


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _folders(folder: Path) -> list[os.DirEntry[str]]:
    return [entry for entry in _entries(folder) if entry.is_dir()]


def _sweep(entry: os.DirEntry[str]) -> bool:
    """Delete a file that a dead process left; whether it was one."""
    match = _LEFTOVER.fullmatch(entry.name)
    if match is None:
        return False
    try:
        is_local = f".{socket.gethostname()}.{match['pid']}." in entry.name
        old = time.time() - entry.stat().st_mtime > STALE_SECONDS
        if (is_local and not psutil.pid_exists(int(match["pid"]))) or old:
            os.unlink(entry.path)
            return True
    except OSError:
        pass
    return False
