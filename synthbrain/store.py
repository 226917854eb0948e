"""Volumes and latents on disk: blocks of 1000 shards in Zarr v3 format.

``<root>/block-0042/zarr.json`` describes a ``(1000, *shape)`` array whose shards are single
volumes; ``<root>/block-0042/c.17.0.0.0`` is volume 42,017. A missing shard is a missing volume;
a shard counts as present when its footer's checksum holds, never because a file exists. A store of
latents differs in its geometry alone: what is said of volumes here holds for latents.

Shards are immutable: written aside and linked into place, so any number of processes may write
the same store, be killed at any moment, and no reader ever sees half a volume. Nothing here
needs a lock to be correct (claims, in :mod:`synthbrain.claims`, only save work).
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from synthbrain.errors import (
    DamagedShardError,
    GeometryError,
    MissingVolumeError,
    StoreError,
    StoreFullError,
)
from synthbrain.header import Geometry, LatentGeometry
from synthbrain.shard import Array, ShardLayout

log = logging.getLogger("synthbrain")

BLOCK = 1000
"""Volumes a block holds: one published pack, and well under any folder limit."""

STALE_SECONDS = 3600.0
"""Leftovers of killed writers are swept when older than this."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


@dataclass(frozen=True)
class Damage:
    """One damaged volume found by :meth:`Store.verify`."""

    position: int
    path: Path
    problem: str


@dataclass(frozen=True, eq=False)
class Store:
    """The volumes, or the latents, one generator made for one manifest.

    Parameters
    ----------
    root
        Folder of the blocks, created at the first write.
    geometry
        Shape and type every volume or latent must have, and where it lies in space.
    attributes
        Written into each block's ``zarr.json``: what made the volumes, from which rows.

    Examples
    --------
    >>> import tempfile
    >>> geometry = Geometry(shape=(4, 4, 4), chunks=(2, 4, 4))
    >>> store = Store(Path(tempfile.mkdtemp()) / "volumes", geometry)
    >>> store.has(3)
    False
    >>> store.write(3, np.ones((4, 4, 4), "uint8"))
    True
    >>> int(store.read(3).sum())
    64
    """

    root: Path
    geometry: Geometry | LatentGeometry
    attributes: Mapping[str, Any] = field(default_factory=dict)
    layout: ShardLayout = field(init=False)
    _ready: set[int] = field(init=False, default_factory=set, repr=False)

    def __post_init__(self) -> None:
        layout = ShardLayout(self.geometry.shape, self.geometry.chunks, self.geometry.dtype)
        object.__setattr__(self, "layout", layout)

    def block_path(self, block: int) -> Path:
        """Folder of a block."""
        return self.root / f"block-{block:04d}"

    def path(self, position: int) -> Path:
        """Shard file of a volume, present or not."""
        block, slot = divmod(int(position), BLOCK)
        return self.block_path(block) / self._name(slot)

    def _name(self, slot: int) -> str:
        return ".".join(("c", str(slot), *("0",) * len(self.layout.shape)))

    def has(self, position: int) -> bool:
        """Whether the volume is stored: its shard's footer is read and checked."""
        return self.layout.check(self.path(position))

    def stored(self, positions: Iterable[int]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """:meth:`has` for many, touching only files that exist: ``(n,)`` booleans."""
        wanted = np.asarray(list(positions), dtype=np.int64)
        found = np.zeros(len(wanted), dtype=bool)
        for block in np.unique(wanted // BLOCK):
            names = _listing(self.block_path(int(block)))
            if not names:
                continue
            for i in np.flatnonzero(wanted // BLOCK == block):
                position = int(wanted[i])
                there = self._name(position % BLOCK) in names
                found[i] = there and self.layout.check(self.path(position))
        return found

    def about(self, position: int) -> dict[str, Any]:
        """What the block of a volume says of itself: the attributes it was written with."""
        try:
            path = self.block_path(int(position) // BLOCK) / "zarr.json"
            return dict(json.loads(path.read_text())["attributes"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def read(
        self, position: int, *, out: Array | None = None, threads: Executor | None = None
    ) -> Array:
        """Read a volume as stored, every byte checked.

        Returns
        -------
        numpy.ndarray
            Shape and type of the geometry; multiply by its ``scale`` for intensities.

        Raises
        ------
        MissingVolumeError
            Not stored.
        DamagedShardError
            Stored, but its bytes do not match their checksums.
        GeometryError
            The block holds volumes of another geometry.
        """
        with self._reading(position) as path:
            return self.layout.read(path, out=out, threads=threads)

    def read_patch(
        self,
        position: int,
        start: Sequence[int],
        size: Sequence[int],
        *,
        threads: Executor | None = None,
    ) -> Array:
        """Read a box of a volume, decoding only the chunks it touches.

        Parameters and errors as in :meth:`synthbrain.shard.ShardLayout.read_patch` and
        :meth:`read`.
        """
        with self._reading(position) as path:
            return self.layout.read_patch(path, start, size, threads=threads)

    def write(self, position: int, volume: Array) -> bool:
        """Store a volume, unless a valid one is already there.

        Parameters
        ----------
        position
            The row's number in its manifest.
        volume
            Shape and type of the geometry.

        Returns
        -------
        bool
            Whether this call stored it; False when another writer was first.

        Raises
        ------
        StoreFullError
            The disk is full; nothing half-written is left.
        StoreError
            The store cannot be written to.
        GeometryError
            The volume, or the block on disk, has another geometry.
        """
        return self._publish(position, self.layout.encode(volume))

    def write_shard(self, position: int, shard: bytes) -> Array:
        """Store a shard that was encoded elsewhere, byte for byte; its volume.

        Raises
        ------
        DamagedShardError
            It does not decode to a volume of this geometry; nothing is stored.
        StoreFullError, StoreError, GeometryError
            As :meth:`write`.
        """
        volume = self.layout.decode(shard)
        self._publish(position, shard)
        return volume

    def _publish(self, position: int, shard: bytes) -> bool:
        path = self.path(position)
        try:
            self._open_block(int(position) // BLOCK)
            return publish(path, shard, keep=self.layout.check)
        except OSError as error:
            raise self._explain(error, path, len(shard)) from error

    def quarantine(self, position: int) -> Path:
        """Set a damaged shard aside as ``*.bad``, so that the volume counts as missing.

        Returns
        -------
        Path
            Where the damaged file is kept.
        """
        path = self.path(position)
        bad = path.with_name(path.name + ".bad")
        try:
            os.replace(path, bad)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._explain(error, path, 0) from error
        return bad

    def verify(self, positions: Iterable[int] | None = None) -> Iterator[tuple[int, Damage | None]]:
        """Decode and check volumes one after the other.

        Parameters
        ----------
        positions
            Which to check; every file in the store by default. Missing volumes are not damage
            and are passed over.

        Yields
        ------
        tuple
            The position, and the damage or None.

        Raises
        ------
        GeometryError, StoreError
            A block's ``zarr.json`` is of another geometry or unreadable: its volumes may be sound.
        """
        for position in self.positions() if positions is None else positions:
            path = self.path(position)
            try:
                self._check_block(int(position) // BLOCK)
                self.layout.read(path)
            except FileNotFoundError:
                continue
            except DamagedShardError as error:
                yield int(position), Damage(int(position), path, str(error))
            else:
                yield int(position), None

    def positions(self) -> list[int]:
        """Positions of all shard files, sound or not, ascending."""
        shard = re.compile(r"block-(\d+)/c\.(\d+)" + r"\.0" * len(self.layout.shape))
        files = (f"{path.parent.name}/{path.name}" for path in self.root.glob("block-*/c.*"))
        matches = filter(None, map(shard.fullmatch, files))
        return sorted(int(match[1]) * BLOCK + int(match[2]) for match in matches)

    def sweep(self, older_than: float = STALE_SECONDS) -> int:
        """Delete what killed writers left behind; returns how many files."""
        swept = 0
        for path in self.root.glob("block-*/.*.partial"):
            try:
                if time.time() - path.stat().st_mtime > older_than:
                    path.unlink()
                    swept += 1
            except OSError:
                continue
        return swept

    @contextlib.contextmanager
    def _reading(self, position: int) -> Iterator[Path]:
        """The shard's path; what goes wrong with it in the body is told in the store's words."""
        self._check_block(int(position) // BLOCK)
        path = self.path(position)
        try:
            yield path
        except FileNotFoundError:
            raise MissingVolumeError(f"volume {position} is not in {self.root}") from None
        except DamagedShardError as error:
            raise DamagedShardError(f"{path}: {error}") from error
        except OSError as error:
            raise StoreError(error.errno, f"cannot read {path}: {error.strerror}") from error

    def _check_block(self, block: int) -> None:
        """Once per block and process: the block on disk has this store's geometry."""
        if block in self._ready:
            return
        path = self.block_path(block) / "zarr.json"
        try:
            found = json.loads(path.read_text())
        except (FileNotFoundError, NotADirectoryError):
            return
        except (OSError, ValueError) as error:
            raise StoreError(
                f"cannot read {path} ({error}); delete it to have it written anew"
            ) from error
        expected = self.metadata()
        for key in ("shape", "data_type", "chunk_grid", "codecs", "chunk_key_encoding"):
            if _without_level(found.get(key)) != _without_level(expected[key]):
                raise GeometryError(
                    f"{path} holds {key} {_short(found.get(key))}, this manifest needs "
                    f"{_short(expected[key])}; use another store folder"
                )
        self._ready.add(block)

    def _open_block(self, block: int) -> None:
        path = self.block_path(block) / "zarr.json"
        if not path.exists():  # also when the store was deleted under a running process
            path.parent.mkdir(parents=True, exist_ok=True)
            publish(path, json.dumps(self.metadata(), indent=2).encode(), keep=Path.exists)
        self._check_block(block)

    def metadata(self) -> dict[str, Any]:
        """The ``zarr.json`` of a block."""
        inner = [
            {"name": "bytes"} | _endian(self.layout.dtype),
            {"name": "zstd", "configuration": {"level": self.layout.level, "checksum": False}},
            {"name": "crc32c"},
        ]
        sharding = {
            "chunk_shape": [1, *self.layout.chunks],
            "codecs": inner,
            "index_codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "crc32c"},
            ],
            "index_location": "end",
        }
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [BLOCK, *self.layout.shape],
            "data_type": self.layout.dtype,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [1, *self.layout.shape]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": 0 if self.layout.dtype.startswith("uint") else 0.0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": {**self.geometry.attributes, **self.attributes},
            "dimension_names": ["volume", *self.geometry.axes],
        }

    def _explain(self, error: OSError, path: Path, size: int) -> StoreError:
        if error.errno in _FULL:
            return StoreFullError(
                f"no room for another volume ({size / 1e6:.1f} MB) in {self.root}: "
                f"{error.strerror}. What is stored is intact; free some space, or choose another "
                "folder with store= (--store, SYNTHBRAIN_HOME), and run again"
            )
        if error.errno in _READ_ONLY:
            return StoreError(
                error.errno,
                f"{path.parent} cannot be written to ({error.strerror}); "
                "choose another folder with store= (--store, SYNTHBRAIN_HOME)",
            )
        return StoreError(error.errno, f"cannot write {path}: {error.strerror or error}")


def stored_shape(root: Path) -> tuple[int, ...] | None:
    """Shape of the volumes or latents in the blocks of a folder; None where there are none."""
    for path in sorted(root.glob("block-*/zarr.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return tuple(map(int, json.loads(path.read_text())["shape"][1:]))
    return None


def publish(path: Path, data: bytes, *, keep: Any) -> bool:
    """Give ``data`` the name ``path`` in one step, unless ``keep(path)`` accepts what is there."""
    if keep(path):
        return False
    scratch = path.with_name(
        f".{path.name}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.partial"
    )
    try:
        scratch.write_bytes(data)
        return _link(scratch, path, keep)
    finally:
        scratch.unlink(missing_ok=True)


def _link(scratch: Path, path: Path, keep: Any) -> bool:
    try:
        os.link(scratch, path)
    except FileExistsError:
        if keep(path):
            return False
        os.replace(scratch, path)
    except OSError as error:
        if error.errno in _FULL:
            raise
        os.replace(scratch, path)  # file systems without hard links
    return True


def _listing(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _endian(dtype: str) -> dict[str, Any]:
    if np.dtype(dtype).itemsize == 1:
        return {}
    return {"configuration": {"endian": "little"}}


def _without_level(value: Any) -> Any:
    """Metadata without what only matters to writers: how hard zstd tried."""
    if isinstance(value, dict):
        return {key: _without_level(item) for key, item in value.items() if key != "level"}
    return [_without_level(item) for item in value] if isinstance(value, list) else value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 400 else text[:397] + "..."
