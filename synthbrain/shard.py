"""One volume ↔ one shard file.

A shard is a Zarr v3 ``sharding_indexed`` chunk: the inner chunks, each ``bytes → zstd → crc32c``,
followed by an index of (offset, length) pairs as little-endian uint64 and the index's crc32c.
(Zarr v3 specification, sharding codec 1.0.)

Reading and writing are done here rather than through a Zarr library because of what training
needs: it must survive ``fork``, tell a missing volume from a black one, check every byte it
serves, decode only the chunks a patch touches, and decode straight into the caller's array.
Plain zarr-python and zarrs read and write the same files; the tests hold both directions.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import google_crc32c
import numpy as np
from numcodecs import zstd

from synthbrain.errors import DamagedShardError, GeometryError

Array = np.ndarray[Any, np.dtype[Any]]
Region = tuple[slice, ...]
Job = TypeVar("Job")

Extent = tuple[int, int]
"""Offset and length of an inner chunk in its file."""

Shard = int | bytes
"""A shard: the descriptor of its open file, or its bytes."""

_ABSENT: Extent = (2**64 - 1, 2**64 - 1)
_CRC_BYTES = 4


@dataclass(frozen=True)
class ShardLayout:
    """The shape of a volume on disk and how it is cut into inner chunks.

    Parameters
    ----------
    shape
        Shape of one volume, any number of axes; for images ``(160, 224, 160)``.
    chunks
        Shape of the inner chunks, which must divide ``shape``.
    dtype
        NumPy type name of the stored values, ``"uint8"`` or ``"float16"``.
    level
        zstd level of what is written. Negative ones leave literals uncoded: on head volumes, -1
        takes 8 % more room than 1 and decodes more than twice as fast.

    Examples
    --------
    >>> layout = ShardLayout(shape=(4, 4), chunks=(2, 4), dtype="uint8")
    >>> len(layout.encode(np.zeros((4, 4), "uint8"))) > layout.footer_size
    True
    """

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str = "uint8"
    level: int = -1

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.chunks) or any(
            size % chunk for size, chunk in zip(self.shape, self.chunks, strict=True)
        ):
            raise GeometryError(f"chunks {self.chunks} do not divide the volume {self.shape}")

    @cached_property
    def grid(self) -> tuple[int, ...]:
        """Number of inner chunks along each axis."""
        return tuple(size // chunk for size, chunk in zip(self.shape, self.chunks, strict=True))

    @cached_property
    def footer_size(self) -> int:
        """Bytes of the index and its checksum at the end of every shard."""
        return 16 * int(np.prod(self.grid)) + _CRC_BYTES

    @cached_property
    def regions(self) -> tuple[Region, ...]:
        """Where each inner chunk lies in the volume, in index order."""
        return tuple(
            tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, self.chunks, strict=True))
            for index in itertools.product(*map(range, self.grid))
        )

    def encode(self, volume: Array) -> bytes:
        """The shard file of one volume. Every chunk is written, black ones too.

        Raises
        ------
        GeometryError
            The array has another shape or type.
        """
        if volume.shape != self.shape or volume.dtype != np.dtype(self.dtype):
            raise GeometryError(
                f"expected a volume of shape {self.shape} and type {self.dtype}, "
                f"found {volume.shape} {volume.dtype}"
            )
        chunks = [
            _seal(zstd.compress(np.ascontiguousarray(volume[region]).tobytes(), self.level))
            for region in self.regions
        ]
        offset, index = 0, []
        for chunk in chunks:
            index += [offset, len(chunk)]
            offset += len(chunk)
        return b"".join((*chunks, _seal(struct.pack(f"<{len(index)}Q", *index))))

    def check(self, path: Path) -> bool:
        """Whether a file is there whose footer is intact: 16 bytes a chunk read, none decoded."""
        try:
            with path.open("rb", buffering=0) as file:
                self._footer(file.fileno())
        except (OSError, DamagedShardError):
            return False
        return True

    def read(
        self,
        path: Path,
        *,
        out: Array | None = None,
        threads: Executor | None = None,
    ) -> Array:
        """Read a whole volume, every byte of it checked.

        Parameters
        ----------
        path
            The shard file.
        out
            Array to fill, of :attr:`shape` and :attr:`dtype`; a new one by default.
        threads
            Decode the chunks on this pool; in the calling thread by default.

        Raises
        ------
        FileNotFoundError
            There is no such shard.
        DamagedShardError
            The file is cut short, or a checksum does not match.
        """
        target = np.empty(self.shape, self.dtype) if out is None else out
        if target.shape != self.shape or target.dtype != np.dtype(self.dtype):
            raise GeometryError(
                f"out must have shape {self.shape} and type {self.dtype}, "
                f"found {target.shape} {target.dtype}"
            )
        with path.open("rb", buffering=0) as file:
            return self._fill(target, file.fileno(), threads)

    def decode(self, shard: bytes) -> Array:
        """The volume in the bytes of a shard, every one of them checked.

        Raises
        ------
        DamagedShardError
            They are cut short, or a checksum does not match.
        """
        return self._fill(np.empty(self.shape, self.dtype), shard, None)

    def _fill(self, target: Array, shard: Shard, threads: Executor | None) -> Array:
        index = self._footer(shard)

        def fill(job: tuple[Region, Extent]) -> None:
            region, extent = job
            target[region] = self._chunk(shard, extent)

        _run(fill, zip(self.regions, index, strict=True), threads)
        return target

    def read_patch(
        self,
        path: Path,
        start: Sequence[int],
        size: Sequence[int],
        *,
        threads: Executor | None = None,
    ) -> Array:
        """Read a box of a volume; only the chunks it touches are read, checked and decoded.

        Parameters
        ----------
        start, size
            First voxel and extent of the box along each axis of :attr:`shape`.
        path, threads
            As in :meth:`read`.

        Raises
        ------
        GeometryError
            The box leaves the volume.
        FileNotFoundError, DamagedShardError
            As in :meth:`read`; damage outside the touched chunks goes unseen.
        """
        if (
            len(start) != len(self.shape)
            or len(size) != len(self.shape)
            or any(
                s < 0 or n < 1 or s + n > full
                for s, n, full in zip(start, size, self.shape, strict=True)
            )
        ):
            raise GeometryError(
                f"patch at {tuple(start)} of size {tuple(size)} leaves the volume {self.shape}"
            )
        target = np.empty(tuple(size), self.dtype)
        with path.open("rb", buffering=0) as file:
            descriptor = file.fileno()
            index = self._footer(descriptor)

            def fill(job: tuple[int, Region, Region]) -> None:
                number, inside, into = job
                target[into] = self._chunk(descriptor, index[number])[inside]

            _run(fill, self._touched(start, size), threads)
        return target

    def _touched(
        self, start: Sequence[int], size: Sequence[int]
    ) -> Iterator[tuple[int, Region, Region]]:
        """(chunk number, region inside the chunk, region of the patch) of each touched chunk."""
        spans = [
            range(s // c, (s + n - 1) // c + 1)
            for s, n, c in zip(start, size, self.chunks, strict=True)
        ]
        for index in itertools.product(*spans):
            inside, into = [], []
            for i, s, n, c in zip(index, start, size, self.chunks, strict=True):
                low, high = max(s, i * c), min(s + n, (i + 1) * c)
                inside.append(slice(low - i * c, high - i * c))
                into.append(slice(low - s, high - s))
            yield int(np.ravel_multi_index(index, self.grid)), tuple(inside), tuple(into)

    def _footer(self, shard: Shard) -> list[Extent]:
        """Where each chunk lies in a shard."""
        total = len(shard) if isinstance(shard, bytes) else os.fstat(shard).st_size
        if total <= self.footer_size:
            raise DamagedShardError(f"shard has {total} bytes, too few for {self.grid} chunks")
        footer = _unseal(_pread(shard, self.footer_size, total - self.footer_size))
        values = struct.unpack(f"<{len(footer) // 8}Q", footer)
        index = list(zip(values[::2], values[1::2], strict=True))
        for extent in index:
            if extent != _ABSENT and sum(extent) > total - self.footer_size:
                raise DamagedShardError("shard index points outside its file")
        return index

    def _chunk(self, shard: Shard, extent: Extent) -> Array:
        """One inner chunk of a shard, checked and decoded."""
        if extent == _ABSENT:  # other writers leave chunks of the fill value out
            return np.zeros(self.chunks, self.dtype)
        offset, size = extent
        body = _unseal(_pread(shard, size, offset))
        try:
            return np.frombuffer(zstd.decompress(body), self.dtype).reshape(self.chunks)
        except (RuntimeError, ValueError) as error:
            raise DamagedShardError(f"chunk does not decode ({error})") from error


def _seal(data: bytes) -> bytes:
    return data + struct.pack("<I", google_crc32c.value(data))


def _unseal(data: bytes) -> bytes:
    body, (expected,) = data[:-_CRC_BYTES], struct.unpack("<I", data[-_CRC_BYTES:])
    found = google_crc32c.value(body)
    if found != expected:
        raise DamagedShardError(f"checksum {found:08x}, expected {expected:08x}")
    return body


def _pread(shard: Shard, size: int, offset: int) -> bytes:
    try:
        if isinstance(shard, bytes):
            data = shard[offset : offset + size]
        else:
            data = os.pread(shard, size, offset)
    except OSError as error:  # a bad sector is damage like any other
        raise DamagedShardError(f"cannot be read at {offset}: {error.strerror}") from error
    if len(data) != size:
        raise DamagedShardError(f"read {len(data)} of {size} bytes at {offset}: cut short")
    return data


def _run(task: Callable[[Job], None], jobs: Iterable[Job], threads: Executor | None) -> None:
    for _ in (threads.map if threads else map)(task, jobs):
        pass
