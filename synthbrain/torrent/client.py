"""A file of a torrent as something to read extents of, of which only the pieces asked for come."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from synthbrain.errors import SourceError
from synthbrain.sources.base import Cost
from synthbrain.sources.extents import Extent
from synthbrain.torrent.metainfo import Metainfo, TorrentFile, is_magnet, magnet_hash, magnet_name
from synthbrain.torrent.pieces import numbers, read_piece, runs
from synthbrain.torrent.process import Process, Status
from synthbrain.torrent.settings import Address
from synthbrain.torrent.state import State

BUDGET = 20_000_000_000
"""Bytes of pieces kept on disk."""

RATE = 5e6
"""Bytes a second assumed of a swarm, for estimates."""


class TorrentBytes:
    """One file of a torrent, read piece by piece: a :class:`synthbrain.sources.extents.Bytes`.

    Only pieces that cover the extents asked for are transferred, into a sparse file in ``scratch``
    that is dropped when it would outgrow its budget. Each is hashed again when it is read, so that
    no bytes but the torrent's own are given out. Nothing is started before it is needed.

    Parameters
    ----------
    torrent
        A ``.torrent``, or a magnet link.
    file
        Path inside the torrent; its largest file if None.
    scratch
        Folder for pieces; may be shared between torrents, but not by two processes at a time.
    budget
        Bytes of pieces to keep on disk.
    info_hash
        The info-hash the torrent must have, in hexadecimal digits.
    peers, web_seeds
        Known beforehand: ``(address, port)``, URLs.
    private
        Talk to those alone: no tracker, no discovery, and listen on 127.0.0.1 only.
    download_limit, upload_limit
        Bytes a second; 0 for none.
    timeout
        Seconds without any progress after which reading is given up.

    Raises
    ------
    SourceError
        The torrent is unreadable or another one, or has no such file.
    """

    def __init__(
        self,
        *,
        torrent: str | Path,
        scratch: Path,
        file: str | None = None,
        budget: int = BUDGET,
        info_hash: str | None = None,
        peers: Sequence[Address] = (),
        web_seeds: Sequence[str] = (),
        private: bool = False,
        download_limit: int = 0,
        upload_limit: int = 0,
        timeout: float = 120.0,
    ) -> None:
        self._magnet = is_magnet(torrent)
        self._torrent = str(torrent if self._magnet else Path(torrent).expanduser().absolute())
        self._file = file
        self._info_hash = info_hash
        self._budget = budget
        self._timeout = timeout
        self._options: dict[str, Any] = {
            "peers": tuple(peers), "web_seeds": tuple(web_seeds), "private": private,
            "download_limit": download_limit, "upload_limit": upload_limit,
        }  # fmt: skip
        self._process: Process | None = None
        self._have: set[int] | None = None
        self._last: tuple[int, bytes] = (-1, b"")
        self._turn = 0
        key = magnet_hash(self._torrent) if self._magnet else self._meta.key
        self._folder = Path(scratch).expanduser().absolute() / (key or "")
        self.name = f"torrent {magnet_name(self._torrent) if self._magnet else self._meta.name}"

    @cached_property
    def size(self) -> int:  # type: ignore[override]
        """Bytes of the file."""
        return self._target.size

    @property
    def unit(self) -> int:
        """A piece."""
        return self._meta.piece_length

    @property
    def status(self) -> Status:
        """How the transfer is getting on."""
        return self._process.status if self._process else Status()

    @cached_property
    def _meta(self) -> Metainfo:
        if not self._magnet:
            return Metainfo.open(self._torrent, self._info_hash)
        path = State(self._folder).torrent
        if not path.exists():
            self._running()
        return Metainfo.open(path, self._info_hash or magnet_hash(self._torrent))

    @cached_property
    def _target(self) -> TorrentFile:
        return self._meta.file(self._file)

    def cost(self, extents: Sequence[Extent]) -> Cost:
        """Bytes of the pieces that cover the extents and are not here yet, at 5 MB/s."""
        size = self._bytes(self._covering(extents) - self._here())
        return Cost(bytes=size, seconds=size / RATE)

    def waves(self, extents: Sequence[Extent]) -> Iterable[Sequence[Extent]]:
        """The extents in the file's order, in groups whose pieces fit the budget together."""
        wave: list[Extent] = []
        pieces: set[int] = set()
        for extent in sorted(extents):
            more = pieces | set(self._pieces(extent))
            if wave and self._bytes(more) > self._budget:
                yield wave
                wave, more = [], set(self._pieces(extent))
            wave.append(extent)
            pieces = more
        if wave:
            yield wave

    def read(self, extents: Sequence[Extent]) -> Iterator[tuple[Extent, bytes]]:
        """Fetch the pieces of the extents, in the file's order, and yield each when it is here.

        A new call ends the one before.

        Raises
        ------
        SourceError
            Nothing comes any more, there is no room, or what comes is damaged each time.
        """
        self._turn += 1
        for wave in self.waves(extents):
            yield from self._read_wave(wave, self._turn)

    def spare(self) -> list[Extent]:
        """Longest runs of the file's bytes that lie in scratch."""
        begin, end = self._target.offset, self._target.offset + self._target.size
        length = self._meta.piece_length
        clipped = ((max(a * length, begin), min(b * length, end)) for a, b in runs(self._here()))
        return [Extent(a - begin, b - a) for a, b in clipped if a < b]

    def close(self) -> None:
        """End the worker; what is in scratch stays for the next time."""
        process, self._process = self._process, None
        if process is not None and process.owned:
            process.close()

    def clear(self) -> None:
        """End the worker and delete what is in scratch."""
        self.close()
        self._have = None
        shutil.rmtree(self._folder, ignore_errors=True)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_process": None, "_have": None, "_last": (-1, b"")}

    def __del__(self) -> None:
        if getattr(self, "_process", None) is not None:
            self.close()

    def _pieces(self, extent: Extent) -> range:
        begin = self._target.offset + extent.offset
        length = self._meta.piece_length
        return range(begin // length, -(-(begin + extent.size) // length))

    def _covering(self, extents: Iterable[Extent]) -> set[int]:
        return {piece for extent in extents for piece in self._pieces(extent)}

    def _bytes(self, pieces: set[int]) -> int:
        """Bytes of pieces, of which only the last is of another size."""
        meta = self._meta
        short = meta.piece_length - meta.extent(meta.count - 1)[1]
        return len(pieces) * meta.piece_length - short * (meta.count - 1 in pieces)

    def _here(self) -> set[int]:
        """Pieces in scratch: told by the worker, or remembered from the last time."""
        if self._have is None:
            data = self._folder / "data" / self._target.path
            self._have = State(self._folder).claimed(self._meta) if data.exists() else set()
        return self._have

    def _running(self) -> Process:
        """The worker of this very process, ready to fetch."""
        if self._process is None or not self._process.owned:
            data, state = str(self._folder / "data"), str(self._folder)
            task = {"torrent": self._torrent, "save": data, "state": state, **self._options}
            task["info_hash"] = self._info_hash
            self._process = Process(task, self.name.removeprefix("torrent "), self._timeout)
            try:
                self._have = numbers(self._process.wait("ready")["have"])
            except BaseException:
                self.close()
                raise
        return self._process

    def _read_wave(self, extents: Sequence[Extent], turn: int) -> Iterator[tuple[Extent, bytes]]:
        process = self._running()
        try:
            self._make_room(process, self._covering(extents))
            for extent in self._arriving(process, extents, turn):
                yield extent, self._assemble(process, extent)
        except SourceError:
            self.close()
            raise
        finally:
            if turn == self._turn:
                process.send(do="want", pieces=[])

    def _make_room(self, process: Process, pieces: set[int]) -> None:
        here = self._here()
        if self._bytes(here | pieces) > self._budget and here - pieces:
            process.send(do="drop")
            process.wait("dropped")
            here.clear()

    def _arriving(self, process: Process, extents: Sequence[Extent], turn: int) -> Iterator[Extent]:
        """Extents in the order in which the last of their pieces comes."""
        wanted = self._covering(extents)
        process.send(do="want", pieces=runs(wanted))
        here = self._here()
        waiting = list(extents)
        events = process.events()
        while waiting:
            complete = [extent for extent in waiting if here.issuperset(self._pieces(extent))]
            for extent in complete:
                self._check_turn(turn)
                waiting.remove(extent)
                yield extent
            self._check_turn(turn)
            if waiting:
                self._hear(next(events))

    def _hear(self, event: dict[str, Any]) -> None:
        if event["event"] == "pieces":
            self._here().update(numbers(event["pieces"]))

    def _check_turn(self, turn: int) -> None:
        if turn != self._turn:
            raise SourceError(
                f"{self.name} is being read by another call; read one after the other"
            )

    def _assemble(self, process: Process, extent: Extent) -> bytes:
        begin = self._target.offset + extent.offset
        parts = []
        for piece in self._pieces(extent):
            start = piece * self._meta.piece_length
            data = self._piece(process, piece)
            parts.append(data[max(begin - start, 0) : begin + extent.size - start])
        return b"".join(parts)

    def _piece(self, process: Process, piece: int) -> bytes:
        """A piece's bytes, hashed; the last one is kept, for extents often share their edges."""
        if self._last[0] != piece:
            self._last = (piece, self._sound(process, piece))
        return self._last[1]

    def _sound(self, process: Process, piece: int) -> bytes:
        """A piece that matches its hash: as it lies there, flushed, or fetched once more.

        A piece that was just fetched may still be on its way to the disk, hence the second flush.
        """
        for remedy in (None, self._flush, self._refetch, self._flush):
            if remedy is not None:
                remedy(process, piece)
            data = read_piece(self._meta, self._folder / "data", piece)
            if data is not None:
                return data
        raise SourceError(
            f"piece {piece} of {self.name} does not match its hash even when fetched again; "
            f"check the disk of {self._folder}, or use another scratch folder"
        )

    def _flush(self, process: Process, piece: int) -> None:
        process.send(do="flush")
        self._hear_until(process, "flushed")

    def _refetch(self, process: Process, piece: int) -> None:
        process.send(do="forget", pieces=runs([piece]))
        self._hear_until(process, "forgotten")
        self._here().discard(piece)  # what was said of it before is void
        for event in process.events():
            self._hear(event)
            if piece in self._here():
                return

    def _hear_until(self, process: Process, kind: str) -> None:
        for event in process.events():
            self._hear(event)
            if event["event"] == kind:
                return
