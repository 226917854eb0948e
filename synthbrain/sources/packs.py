"""Published packs: stored zips of one block of shards each, behind an address or on disk.

A pack is read by ranges: its directory once, then runs of neighbouring shards. What arrives is
the shard as it was published, so nothing lies on disk twice and nothing is encoded again.
(ZIP: APPNOTE 6.3, method 0.)
"""

from __future__ import annotations

import io
import json
import logging
import struct
import zipfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from synthbrain.errors import SourceError
from synthbrain.sources.base import Cost
from synthbrain.sources.extents import Bytes, Extent
from synthbrain.sources.url import open_bytes
from synthbrain.store import BLOCK

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from synthbrain.header import Geometry
    from synthbrain.manifest import Manifest

log = logging.getLogger("synthbrain")

_TAIL = 2**18
"""A directory of 1000 entries takes 60 kB."""

_DIRECTORY_LIMIT = 2**20
_LOCAL = struct.Struct("<4s5H3I2H")
_LOCAL_MAGIC = b"PK\x03\x04"
_ROOM = 256
"""For what a local header may hold beyond what the directory says."""

_SHARE = 0.3
"""Bytes a voxel takes; for plans made before a pack was seen."""


class PackVolumes:
    """A source of the volumes in published packs.

    Parameters
    ----------
    manifest
        Whose packs; of a selection, the parent's.
    url
        Address below which ``packs/`` lies.
    made_by
        ``"published"``, or the identity of the generator that made them; what the packs say by
        default.
    """

    def __init__(self, manifest: Manifest, url: str, *, made_by: str | None = None) -> None:
        self.url = url.rstrip("/")
        self.name = f"packs {self.url}"
        self._manifest = manifest
        self._packs: dict[int, Bytes] = {}
        self._directories: dict[int, dict[str, Extent]] = {}
        self.made_by = self._said() if made_by is None else made_by

    def holds(self, ids: Sequence[str]) -> NDArray[np.bool_]:
        """All rows of the manifest, which was published with its packs."""
        return self._rows(ids) >= 0

    def cost(self, ids: Sequence[str]) -> Cost:
        """What is known is priced, what is not takes what volumes do on average."""
        voxels = int(np.prod(self._manifest.header.geometry.shape))
        count = round(len(ids) * voxels * _SHARE)
        return Cost(count, count / 2e7)

    def fetch(self, ids: Sequence[str], geometry: Geometry) -> Iterator[tuple[str, bytes]]:
        """Yield shards as they arrive, neighbours by one request."""
        rows = self._rows(ids)
        wanted = [
            (int(self._manifest.positions[r]), id)
            for r, id in zip(rows, ids, strict=True)
            if r >= 0
        ]
        for block in sorted({position // BLOCK for position, _ in wanted}):
            slots = {position % BLOCK: id for position, id in wanted if position // BLOCK == block}
            yield from self._fetch_block(block, slots, len(geometry.shape))

    def _rows(self, ids: Sequence[str]) -> NDArray[np.intp]:
        return self._manifest.rows_of(ids)

    def _fetch_block(
        self, block: int, slots: dict[int, str], axes: int
    ) -> Iterator[tuple[str, bytes]]:
        directory = self._directory(block)
        names = {slot: ".".join(("c", str(slot), *("0",) * axes)) for slot in slots}
        absent = [id for slot, id in slots.items() if names[slot] not in directory]
        if absent:
            log.warning(
                "%s has no %s (%d absent); left out", self._pack(block).name, absent[0], len(absent)
            )
        extents = {
            directory[names[slot]]: id for slot, id in slots.items() if names[slot] in directory
        }
        pack = self._pack(block)
        for wave in pack.waves(list(extents)):
            for extent, data in pack.read(wave):
                yield extents[extent], _stored(data, pack.name)

    def _said(self) -> str:
        """What the pack of the first row says made its volumes."""
        self._manifest.require_rows()
        block = int(self._manifest.positions[0]) // BLOCK
        pack, directory = self._pack(block), self._directory(block)
        try:
            ((_, data),) = pack.read([directory["zarr.json"]])
            return str(json.loads(_stored(data, pack.name))["attributes"]["made_by"])
        except (KeyError, ValueError, TypeError):
            raise SourceError(f"{pack.name} does not say what made its volumes") from None

    def _pack(self, block: int) -> Bytes:
        if block not in self._packs:
            self._packs[block] = open_bytes(f"{self.url}/packs/block-{block:04d}.zarr.zip")
        return self._packs[block]

    def _directory(self, block: int) -> dict[str, Extent]:
        if block not in self._directories:
            self._directories[block] = read_directory(self._pack(block))
        return self._directories[block]


def read_directory(pack: Bytes) -> dict[str, Extent]:
    """Where each member of a zip lies, header included.

    Raises
    ------
    SourceError
        It is no zip, or one with compressed or overlong members.
    """
    tail = Extent(max(0, pack.size - _TAIL), min(_TAIL, pack.size))
    try:
        with zipfile.ZipFile(_File(pack, tail)) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise SourceError(f"{pack.name} is not a pack ({error})") from None
    odd = [i for i in infos if i.compress_type != zipfile.ZIP_STORED or i.flag_bits & 1]
    if odd:
        raise SourceError(f"{pack.name} holds {odd[0].filename} compressed, expected a stored zip")
    members = {}
    for info in infos:
        size = _LOCAL.size + len(info.filename.encode()) + _ROOM + info.file_size
        if info.header_offset + _LOCAL.size + info.file_size > pack.size:
            raise SourceError(f"{pack.name} places {info.filename} outside itself; do not use it")
        members[info.filename] = Extent(
            info.header_offset, min(size, pack.size - info.header_offset)
        )
    return members


def _stored(data: bytes, where: str) -> bytes:
    """The bytes of a member, from its local header on."""
    magic, *_, size, _, name, extra = _LOCAL.unpack_from(data)
    start = _LOCAL.size + name + extra
    if magic != _LOCAL_MAGIC or start + size > len(data):
        raise SourceError(f"{where} does not hold what its directory says; was it replaced?")
    return data[start : start + size]


class _File(io.RawIOBase):
    """A remote file for :mod:`zipfile`: its end at once, anything else when asked."""

    def __init__(self, source: Bytes, tail: Extent) -> None:
        self._source, self._extent, self._at = source, tail, 0
        ((_, self._data),) = source.read([tail]) if tail.size else [(tail, b"")]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._source.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._source.size - self._at)
        extent = Extent(self._at, left if size < 0 else min(size, left))
        self._at = extent.end
        if extent.size == 0:
            return b""
        if extent.within(self._extent):
            start = extent.offset - self._extent.offset
            return self._data[start : start + extent.size]
        if extent.size > _DIRECTORY_LIMIT:
            raise ValueError(f"its directory takes {extent.size:,} bytes")
        ((_, data),) = self._source.read([extent])
        return data
