"""The process that owns a libtorrent session: ``python -m synthbrain.torrent.worker``.

One torrent each. The first line of stdin is a :class:`~synthbrain.torrent.settings.Task`, those
that follow are commands, lines of stdout are events, all JSON. It ends when stdin closes or its
parent dies, and may be killed at any moment: see :mod:`synthbrain.torrent.state`.

Pieces that are not wanted have priority 0 from the start, which leaves one sparse file.
(``default_dont_download`` would put pieces at the edges of files into a hidden file of their own,
and that is lost when the process is killed.)
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import filelock
import libtorrent as lt

from synthbrain.errors import SourceError
from synthbrain.torrent.lines import Commands, tell
from synthbrain.torrent.metainfo import Metainfo, is_magnet, load, magnet_hash
from synthbrain.torrent.pieces import numbers, read_piece, runs
from synthbrain.torrent.settings import Task, session_settings
from synthbrain.torrent.state import State

STATUS_SECONDS = 0.5
SAVE_SECONDS = 5.0
LOCK_SECONDS = 5.0
"""How long to wait for a folder: a worker whose parent was killed takes a moment to notice."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CHECKING = {"checking_files", "checking_resume_data", "queued_for_checking"}
_SAVE = lt.torrent_handle.flush_disk_cache | lt.torrent_handle.only_if_modified


class Worker:
    """A session with one torrent, and its conversation with the parent."""

    def __init__(self, task: Task, tell: Callable[..., None]) -> None:
        self._task = task
        self._tell = tell
        self._state = State(Path(task.state))
        self._session = lt.session(cast("Any", session_settings(task)))
        self._handle = lt.torrent_handle()
        self._meta: Metainfo | None = None
        self._wanted: set[int] = set()
        self._have: set[int] = set()
        self._recent: set[int] = set()
        self._ready = False
        self._saving = False
        self._next_status = self._next_save = 0.0
        self._running = True

    def start(self) -> None:
        """Add the torrent, or first ask for what its magnet link stands for."""
        task = self._task
        if not is_magnet(task.torrent):
            self._open(Path(task.torrent))
        elif self._state.torrent.exists():
            self._open(self._state.torrent)
        else:
            params = lt.parse_magnet_uri(task.torrent)
            params.flags |= lt.torrent_flags.default_dont_download
            self._add(params)

    def run(self, commands: Commands) -> None:
        """Work until told to quit, or orphaned."""
        alarm, sound = os.pipe()
        os.set_blocking(alarm, False)
        os.set_blocking(sound, False)
        self._session.set_alert_fd(sound)
        commands.watch(alarm)
        while self._running and os.getppid() == self._task.parent:
            for command in commands.wait(STATUS_SECONDS / 2):
                self._obey(command)
            self._hear()
            self._tick()
        self._leave()

    def _open(self, path: Path) -> None:
        expected = self._task.info_hash
        if is_magnet(self._task.torrent):
            expected = magnet_hash(self._task.torrent)
        self._meta = meta = Metainfo.open(path, expected)
        params = load(meta.data)
        if self._task.whole:
            self._resume(params, meta)
        else:
            self._pick(params, meta)
        self._add(params)

    def _resume(self, params: lt.add_torrent_params, meta: Metainfo) -> None:
        """All pieces are wanted; without resume data libtorrent hashes what is there."""
        old = self._state.resume() if self._task.trust else None
        if old:
            params.have_pieces = self._bits(meta, old)
            params.unfinished_pieces = old.unfinished_pieces
        self._wanted = set(range(meta.count))

    def _pick(self, params: lt.add_torrent_params, meta: Metainfo) -> None:
        """No pieces are wanted yet; nothing but the journal's is hashed."""
        paths = [Path(self._task.save) / file.path for file in meta.files]
        if not self._state.known():
            for path in paths:
                path.unlink(missing_ok=True)
        elif not any(path.exists() for path in paths):
            self._state.clear()
        old = self._state.resume()
        params.have_pieces = self._bits(meta, old)
        params.unfinished_pieces = old.unfinished_pieces if old else {}
        params.piece_priorities = [0] * meta.count
        params.flags |= lt.torrent_flags.sequential_download

    def _bits(self, meta: Metainfo, old: lt.add_torrent_params | None) -> list[bool]:
        """Which pieces are here; given to libtorrent, even all false, it hashes no sparse file."""
        bits = list(old.have_pieces)[: meta.count] if old else []  # it is saved as whole bytes
        bits += [False] * (meta.count - len(bits))
        folder = Path(self._task.save)
        for piece in self._state.noted(meta):
            bits[piece] = bits[piece] or read_piece(meta, folder, piece) is not None
            self._recent.add(piece)
        return bits

    def _add(self, params: lt.add_torrent_params) -> None:
        flags = lt.torrent_flags
        params.save_path = self._task.save
        params.flags &= ~(flags.auto_managed | flags.paused)
        if self._task.private:
            params.trackers = []
            params.flags |= flags.disable_dht | flags.disable_lsd | flags.disable_pex
        params.url_seeds = [*dict.fromkeys([*params.url_seeds, *self._task.web_seeds])]
        params.download_limit = self._task.download_limit
        params.upload_limit = self._task.upload_limit
        self._handle = self._session.add_torrent(params)
        for host, port in self._task.peers:
            for address in _addresses(host, port):
                self._handle.connect_peer(address)

    def _obey(self, command: dict[str, Any] | None) -> None:
        if command is None:
            self._running = False
            return
        commands: dict[str, Callable[..., None]] = {
            "want": self._want,
            "flush": self._handle.flush_cache,
            "forget": self._forget,
            "drop": self._drop,
            "quit": self._stop,
        }
        commands[command.pop("do")](**command)

    def _stop(self) -> None:
        self._running = False

    def _want(self, pieces: Iterable[Iterable[int]]) -> None:
        """Fetch these pieces and no others."""
        wanted = numbers(pieces)
        changes = dict.fromkeys(self._wanted - wanted, 0) | dict.fromkeys(wanted, 4)
        self._wanted = wanted
        self._handle.prioritize_pieces(list(changes.items()))
        self._announce(wanted & self._have)

    def _forget(self, pieces: Iterable[Iterable[int]]) -> None:
        """Clear single have bits: what lies there is damaged.

        libtorrent offers no such thing but hashing the whole file again, sparse parts and all. So
        the torrent is added anew, without these bits.
        """
        self._have -= numbers(pieces)
        self._add_anew()
        self._tell("forgotten")

    def _drop(self) -> None:
        """Delete the data. What is claimed goes first, so that a kill in between is harmless."""
        self._have.clear()
        self._recent.clear()
        self._state.clear()
        self._add_anew(lt.session.delete_files)
        self._tell("dropped")

    def _add_anew(self, option: int = 0) -> None:
        meta = self._opened()
        self._session.remove_torrent(self._handle, option)
        self._await(lt.torrent_deleted_alert if option else lt.torrent_removed_alert)
        self._saving = False
        params = load(meta.data)
        params.have_pieces = [piece in self._have for piece in range(meta.count)]
        params.piece_priorities = [4 * (p in self._wanted) for p in range(meta.count)]
        params.flags |= lt.torrent_flags.sequential_download
        self._add(params)
        self._await(lt.torrent_checked_alert)
        self._save(force=True)

    def _await(self, kind: type[lt.alert], seconds: float = 30.0) -> None:
        """Handle alerts until one of a kind has come."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._session.wait_for_alert(100)
            if self._hear(kind):
                return

    def _opened(self) -> Metainfo:
        if self._meta is None:
            raise SourceError("the torrent's metadata are not here yet; wait for them")
        return self._meta

    def _hear(self, kind: type[lt.alert] | None = None) -> bool:
        """Handle waiting alerts; whether one was of a kind."""
        finished: set[int] = set()
        met = False
        for alert in self._session.pop_alerts():
            met = met or (kind is not None and isinstance(alert, kind))
            if isinstance(alert, lt.piece_finished_alert):
                finished.add(alert.piece_index)
            else:
                self._handle_alert(alert)
        self._came(finished)
        return met

    def _handle_alert(self, alert: lt.alert) -> None:
        if isinstance(alert, lt.save_resume_data_alert):
            self._saving = False
            self._recent = self._state.save(alert.params, self._recent)
        elif isinstance(alert, lt.save_resume_data_failed_alert):
            self._saving = False
        elif isinstance(alert, lt.metadata_received_alert):
            self._metadata()
        elif isinstance(alert, lt.file_error_alert):
            self._file_error(alert)
        elif isinstance(alert, lt.torrent_error_alert):
            self._tell("error", kind="torrent", text=alert.message())
        elif isinstance(alert, lt.listen_failed_alert):
            if self._task.port and alert.error.value() == errno.EADDRINUSE:
                self._tell("error", kind="port", text=f"port {self._task.port} is in use")
        elif isinstance(alert, lt.cache_flushed_alert):
            self._tell("flushed")
        elif isinstance(alert, lt.alerts_dropped_alert):
            self._reconcile()

    def _file_error(self, alert: lt.file_error_alert) -> None:
        full = alert.error.value() in _FULL
        self._tell(
            "error", kind="full" if full else "disk", text=alert.error.message(), path=alert.file
        )

    def _metadata(self) -> None:
        """A magnet link's metadata came: start anew with them, now that pieces have numbers."""
        if self._meta is not None:
            return
        params = lt.add_torrent_params()
        params.ti = self._handle.torrent_file()
        params.trackers = [tracker["url"] for tracker in self._handle.trackers()]
        self._state.keep_metadata(lt.bencode(cast("Any", lt.write_torrent_file(params))))
        self._session.remove_torrent(self._handle)
        self._open(self._state.torrent)

    def _came(self, pieces: set[int]) -> None:
        if pieces - self._have:
            self._recent |= pieces
            self._have |= pieces
            self._state.note(sorted(pieces))
            self._announce(pieces)

    def _announce(self, pieces: set[int]) -> None:
        if pieces and not self._task.whole:
            self._tell("pieces", pieces=runs(pieces))

    def _reconcile(self) -> None:
        """Whatever alerts got lost, libtorrent knows the pieces."""
        bits = self._handle.status(lt.torrent_handle.query_pieces).pieces
        self._came({piece for piece, have in enumerate(bits) if have} - self._have)

    def _tick(self) -> None:
        now = time.monotonic()
        if now >= self._next_status:
            self._next_status = now + STATUS_SECONDS
            self._report()
        if now >= self._next_save and self._ready:
            self._next_save = now + SAVE_SECONDS
            self._save()

    def _report(self) -> None:
        status = self._handle.status(0)
        state = str(status.state)
        if not self._ready and self._meta is not None and state not in _CHECKING:
            self._begin()
        self._tell(
            "status",
            state=state,
            done=status.total_wanted_done if self._meta else 0,
            wanted=status.total_wanted if self._meta else 0,
            checked=status.progress_ppm if state in _CHECKING else 0,
            rate=status.download_payload_rate,
            upload_rate=status.upload_payload_rate,
            received=status.total_payload_download,
            sent=status.total_payload_upload,
            wasted=status.total_failed_bytes + status.total_redundant_bytes,
            peers=status.num_peers,
            finished=self._ready and status.is_seeding,
        )

    def _begin(self) -> None:
        bits = self._handle.status(lt.torrent_handle.query_pieces).pieces
        self._have = {piece for piece, have in enumerate(bits) if have}
        self._ready = True
        # Saved at once: without resume data, the next start would hash a large sparse file.
        self._save(force=True)
        self._tell("ready", port=self._session.listen_port(), have=runs(self._have))

    def _save(self, force: bool = False) -> None:
        if not self._saving and self._handle.is_valid():
            self._saving = True
            self._handle.save_resume_data(0 if force else _SAVE)

    def _leave(self) -> None:
        if self._ready:
            self._saving = False
            self._session.pause()
            self._save(force=True)
            self._await(lt.save_resume_data_alert, 5.0)


def _addresses(host: str, port: int) -> list[tuple[str, int]]:
    """Where a peer may be: libtorrent takes numbers, people write names."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise SourceError(f"no peer {host}:{port} ({error.strerror}); check its name") from None
    return [(str(address[0]), port) for *_, address in found]


def main() -> None:
    """Work for the process at the other end of stdin and stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    commands = Commands(sys.stdin.fileno())
    first = commands.first()
    if not first:
        return
    task = Task(**first)
    lock = filelock.FileLock(State(Path(task.state)).lock)
    try:
        lock.acquire(timeout=LOCK_SECONDS)
        worker = Worker(task, tell)
        worker.start()
        worker.run(commands)
    except filelock.Timeout:
        tell("error", kind="locked", text=f"another process uses {task.state}")
    except (SourceError, OSError, RuntimeError) as error:
        tell("error", kind="torrent", text=str(error))
    os._exit(0)  # the session's own end would wait for trackers


if __name__ == "__main__":
    main()
