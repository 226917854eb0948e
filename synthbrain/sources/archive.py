"""Volumes inside a large tar, on disk, behind an address or in a torrent."""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from synthbrain.errors import SourceError
from synthbrain.nifti import decode_nifti
from synthbrain.sources.base import Cost
from synthbrain.sources.extents import Bytes, Extent
from synthbrain.sources.tar import BLOCK, ArchiveIndex, Member, extend, scan, walk
from synthbrain.store import publish

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from synthbrain.header import Archive, Geometry

log = logging.getLogger("synthbrain")

Array = np.ndarray[Any, np.dtype[Any]]

EDGE = 2**24
"""Where tables are looked for: so much at either end of an archive whose index is not known."""

_SPAN = 2**22
_AHEAD = 2**26
_MEAN = 5_900_000
"""Bytes of a volume of the released set; for plans made before any was seen."""

_THREADS = 4
_BATCH = 16
_RECENT = 100
_TABLE_STEP = 2**18


class ArchiveVolumes:
    """A source of the volumes inside a tar.

    Parameters
    ----------
    archive
        Where volumes lie inside, from the manifest's header.
    bytes
        The tar.
    index
        What is known of it; grows with what arrives.
    index_path
        Where to keep the index.
    originals
        Folder to keep the files of the archive in as well.
    any_affine
        Take voxels whatever affine their files state.
    search
        Whether to look for volumes the index does not know.
    unwanted
        Tells ids that need not be decoded when they come along with others.
    """

    made_by = "published"

    def __init__(
        self,
        archive: Archive,
        bytes: Bytes,
        index: ArchiveIndex | None = None,
        *,
        index_path: Path | None = None,
        originals: Path | None = None,
        any_affine: bool = False,
        search: bool = True,
        unwanted: Callable[[str], bool] = lambda id: False,
    ) -> None:
        self.archive, self.bytes = archive, bytes
        self.index = index or ArchiveIndex(archive.name)
        self.index_path, self.originals, self.any_affine = index_path, originals, any_affine
        self.search, self.unwanted = search, unwanted
        self.name = bytes.name
        self._kept: tuple[int, int, bool] | None = None
        first, *rest = map(re.escape, archive.member.split("{id}"))
        self._volume = re.compile(f"{first}(?P<id>[A-Za-z0-9_-]+)" + "(?P=id)".join(rest))

    def path(self, id: str) -> str:
        """A volume's path inside the archive."""
        return self.archive.member.replace("{id}", id)

    def holds(self, ids: Sequence[str]) -> NDArray[np.bool_]:
        """Which volumes it has; all of them, while there is something left to search."""
        if self._may_search:
            return np.ones(len(ids), dtype=bool)
        return np.array([self.path(id) in self.index.members for id in ids], dtype=bool)

    def cost(self, ids: Sequence[str]) -> Cost:
        """What is known is priced, what is not takes what volumes do on average."""
        known = list(self._known(ids))
        cost = self.bytes.cost(known)
        rest = (len(ids) - len(known)) * self._mean(known or self._recent())
        return Cost(cost.bytes + rest, cost.seconds + self._seconds(rest) + 0.06 * len(ids))

    def fetch(self, ids: Sequence[str], geometry: Geometry) -> Iterator[tuple[str, Array]]:
        """Yield volumes as they arrive, and others of the archive that came along.

        Where the index does not know a volume the archive is searched from where the index ends.
        """
        yield from self.some(ids, len(ids), geometry)

    def some(
        self, ids: Sequence[str], count: int, geometry: Geometry
    ) -> Iterator[tuple[str, Array]]:
        """Yield ``count`` of some volumes, those that are nearest to hand first."""
        self._check_index()
        given: set[str] = set()
        known = dict(sorted(self._known(ids).items())[:count])
        try:
            yield from self._noted(self._aimed(known, geometry), given)
            left = set(ids) - given - set(known.values())
            if left and len(known) < count and self._may_search:
                found = self._searched(left, count - len(known), geometry)
                yield from self._noted(found, given)
        finally:
            self.save_index()

    def table(self) -> bytes:
        """The table of covariates.

        Raises
        ------
        SourceError
            It is not where tables are: near either end of the archive.
        """
        path = self.archive.participants
        for look in (self._look_at_start, self._look_at_end):
            if path not in self.index.members:
                look()
        if path not in self.index.members:
            raise SourceError(
                f"{self.name} has no {path} in its first or last {EDGE >> 20} MiB; pass the table "
                "with --participants, or an index of the archive with --index"
            )
        ((_, data),) = self.bytes.read([self.index.members[path]])
        self.save_index()
        return data

    def save_index(self) -> None:
        """Keep what is known of the archive, if that is more than was kept."""
        known = (len(self.index.members), self.index.walked, self.index.complete)
        if self.index_path is not None and self.index.members and known != self._kept:
            self.index.save(self.index_path)
            self._kept = known

    def _check_index(self) -> None:
        if self.index.size not in (None, self.bytes.size):
            raise SourceError(
                f"the index is of an archive of {self.index.size:,} bytes, {self.name} has "
                f"{self.bytes.size:,}; delete {self.index_path}, or pass another with --index"
            )

    @property
    def _may_search(self) -> bool:
        return self.search and not self.index.complete

    def _known(self, ids: Sequence[str]) -> dict[Extent, str]:
        members = self.index.members
        found = ((members.get(self.path(id)), id) for id in ids)
        return {extent: id for extent, id in found if extent is not None}

    def _mean(self, known: Sequence[Extent]) -> int:
        return sum(e.size for e in known) // len(known) if known else _MEAN

    def _seconds(self, count: int) -> float:
        return self.bytes.cost([Extent(0, count)]).seconds if count else 0.0

    def _noted(
        self, volumes: Iterable[tuple[str, Array]], given: set[str]
    ) -> Iterator[tuple[str, Array]]:
        for id, volume in volumes:
            if id not in given:
                given.add(id)
                yield id, volume

    def _aimed(self, wanted: dict[Extent, str], geometry: Geometry) -> Iterator[tuple[str, Array]]:
        """Volumes whose places are known, and what else each wave brings."""
        for wave in self.bytes.waves(list(wanted)):
            arrived = ((wanted[extent], data) for extent, data in self.bytes.read(wave))
            yield from self._decoded(arrived, geometry)
            asked = {wanted[extent] for extent in wave}
            yield from self._decoded(self._come_along(asked), geometry)
            self.save_index()

    def _come_along(self, asked: set[str]) -> Iterator[tuple[str, bytes]]:
        for run in self.bytes.spare():
            for member in scan(_buffered(self.bytes, run), run):
                id = self._id(member)
                if id is None or id in asked or not member.data.within(run) or self.unwanted(id):
                    continue
                ((_, data),) = self.bytes.read([member.data])
                yield id, data

    def _searched(
        self, wanted: set[str], count: int, geometry: Geometry
    ) -> Iterator[tuple[str, Array]]:
        """Volumes whose places are not known, from where the index ends."""
        rest, mean = self.bytes.size - self.index.walked, self._mean(self._recent())
        share = min(1.0, len(wanted) * mean / max(rest, 1))
        if self.bytes.unit < (1 - share) * mean / 2:
            yield from self._found_by_headers(wanted, count, geometry)
        else:
            yield from self._found_in_order(wanted, count, geometry)

    def _found_by_headers(
        self, wanted: set[str], count: int, geometry: Geometry
    ) -> Iterator[tuple[str, Array]]:
        """Read one header after the other, and only the volumes wanted."""
        batch: dict[Extent, str] = {}
        for member in extend(self.index, direct(self.bytes), self.bytes.size):
            if (id := self._volume_id(member)) is not None and id in wanted:
                batch[member.data] = id
                count -= 1
            if len(batch) == _BATCH or (batch and count == 0):
                yield from self._aimed(batch, geometry)
                batch = {}
            if count == 0:
                return
        yield from self._aimed(batch, geometry)

    def _found_in_order(
        self, wanted: set[str], count: int, geometry: Geometry
    ) -> Iterator[tuple[str, Array]]:
        """Read on from where the index ends, keeping every whole volume."""
        window = _Window(self.index.walked)
        while count > 0 and window.end < self.bytes.size:
            seen = self._recent()
            ahead = min(_AHEAD, max(_SPAN, count * self._mean(seen))) if seen else _SPAN
            for offset, data in self._in_order(window.end, ahead):
                if offset != window.end:  # something large was passed over
                    break
                window.append(data)
                for id, volume in self._decoded(self._whole(window), geometry):
                    count -= id in wanted
                    yield id, volume
                if count <= 0:
                    return
        if count > 0:
            self.index.finish(self.bytes.size)

    def _recent(self) -> list[Extent]:
        """Some volumes that are known, for what others may take."""
        last = list(self.index.members.items())[-_RECENT:]
        return [extent for path, extent in last if self._volume.fullmatch(path)]

    def _in_order(self, start: int, count: int) -> Iterator[tuple[int, bytes]]:
        """Consecutive bytes of the archive from an offset on."""
        end = min(start + count, self.bytes.size)
        spans = [Extent(at, min(_SPAN, end - at)) for at in range(start, end, _SPAN)]
        for wave in self.bytes.waves(spans):
            early: dict[int, bytes] = {}
            queue = deque(sorted(wave))
            for extent, data in self.bytes.read(wave):
                early[extent.offset] = data
                while queue and queue[0].offset in early:
                    offset = queue.popleft().offset
                    yield offset, early.pop(offset)

    def _whole(self, window: _Window) -> Iterator[tuple[str, bytes]]:
        """The volumes that lie in the window, which is cut behind the last of them."""
        self.index.size = self.bytes.size
        end = self.index.walked
        for member in walk(window.read, window.extent):
            id = self._id(member)
            if id is not None and not member.data.within(window.extent):
                break
            end = min(member.next, self.bytes.size)
            if id is not None and not self.unwanted(id):
                yield id, window.read(member.data)
        self.index.walked = end
        window.cut(end)

    def _id(self, member: Member) -> str | None:
        """Take a member into the index; the id of its volume if it is one."""
        self.index.add(member)
        return self._volume_id(member)

    def _volume_id(self, member: Member) -> str | None:
        match = self._volume.fullmatch(member.path)
        found = match is not None and self.index.members.get(member.path) == member.data
        return match["id"] if match is not None and found else None

    def _decoded(
        self, arrived: Iterable[tuple[str, bytes]], geometry: Geometry
    ) -> Iterator[tuple[str, Array]]:
        """Unpack, check and quantise on a few threads; what is unfit is logged and left out."""
        running: deque[tuple[str, Future[Array]]] = deque()
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="synthbrain-nifti") as pool:
            try:
                for id, data in arrived:
                    running.append((id, pool.submit(self._decode, id, data, geometry)))
                    if len(running) > _THREADS:
                        yield from _result(*running.popleft())
                while running:
                    yield from _result(*running.popleft())
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _decode(self, id: str, data: bytes, geometry: Geometry) -> Array:
        where = f"{self.path(id)} in {self.name}"
        volume = decode_nifti(
            data, geometry, where, archive=self.archive, any_affine=self.any_affine
        )
        if self.originals is not None:
            file = self.originals / self.path(id)
            file.parent.mkdir(parents=True, exist_ok=True)
            publish(
                file, data, keep=lambda path: path.exists() and path.stat().st_size == len(data)
            )
        return volume

    def _look_at_start(self) -> None:
        start = Extent(0, min(EDGE, self.bytes.size))
        read = _buffered(self.bytes, start, _TABLE_STEP)
        for member in walk(read, start):
            self.index.add(member)
            if self._volume.fullmatch(member.path):
                return

    def _look_at_end(self) -> None:
        offset = max(0, self.bytes.size - EDGE) // BLOCK * BLOCK
        end = Extent(offset, self.bytes.size - offset)
        ((_, data),) = self.bytes.read([end])
        for member in scan(lambda e: data[e.offset - offset : e.end - offset], end):
            self.index.add(member)


class _Window:
    """Consecutive bytes of an archive."""

    def __init__(self, offset: int) -> None:
        self.offset, self.data = offset, bytearray()

    @property
    def end(self) -> int:
        return self.offset + len(self.data)

    @property
    def extent(self) -> Extent:
        return Extent(self.offset, len(self.data))

    def append(self, data: bytes) -> None:
        self.data += data

    def cut(self, offset: int) -> None:
        """Forget what lies before an offset, which may be beyond the end."""
        del self.data[: offset - self.offset]
        self.offset = offset

    def read(self, extent: Extent) -> bytes:
        start = extent.offset - self.offset
        return bytes(self.data[start : start + extent.size])


def direct(source: Bytes) -> Callable[[Extent], bytes]:
    """Reads one extent of a file at a time."""

    def read(extent: Extent) -> bytes:
        ((_, data),) = source.read([extent])
        return data

    return read


def _buffered(source: Bytes, run: Extent, size: int = _SPAN) -> Callable[[Extent], bytes]:
    """Reads extents of a run by way of larger ones, the last of which is kept."""
    read, kept = direct(source), [Extent(0, 0)]
    data = [b""]

    def buffered(extent: Extent) -> bytes:
        if extent.size > size:
            return read(extent)
        if not extent.within(kept[0]):
            kept[0] = Extent(extent.offset, min(size, run.end - extent.offset))
            data[0] = read(kept[0])
        start = extent.offset - kept[0].offset
        return data[0][start : start + extent.size]

    return buffered


def _result(id: str, future: Future[Array]) -> Iterator[tuple[str, Array]]:
    try:
        yield id, future.result()
    except SourceError as error:
        log.warning("%s; left out", error)
