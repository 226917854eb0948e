"""A worker process as its parent sees it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthbrain.errors import SourceError
from synthbrain.torrent.settings import Task
from synthbrain.torrent.state import State

_QUIT_SECONDS = 8.0
_BEAT_SECONDS = 1.0
"""Longest time between two events of a healthy worker."""


@dataclass(frozen=True)
class Status:
    """How a torrent is getting on.

    Parameters
    ----------
    done, wanted
        Bytes here and wanted, of pieces.
    rate, upload_rate
        Bytes of payload a second.
    peers
        Connected to, web seeds included.
    state
        ``"downloading"``, ``"checking_files"``, ``"seeding"`` and so on.
    received, sent, wasted
        Bytes of payload since the start; wasted are those damaged or received twice.
    """

    done: int = 0
    wanted: int = 0
    rate: float = 0.0
    peers: int = 0
    upload_rate: float = 0.0
    state: str = "starting"
    received: int = 0
    sent: int = 0
    wasted: int = 0
    checked: int = 0
    finished: bool = False


class Process:
    """A running worker.

    Parameters
    ----------
    task
        What it is told; ``parent`` is filled in.
    name
        Of the torrent, for errors.
    timeout
        Seconds without any progress after which waiting is given up.
    """

    def __init__(self, task: dict[str, Any], name: str, timeout: float) -> None:
        self.status = Status()
        self.pid = os.getpid()
        self._name = name
        self._timeout = timeout
        self._task = Task(**task, parent=self.pid)
        self._events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._log = State(Path(self._task.state)).log
        self._worker = self._launch()
        threading.Thread(target=self._listen, daemon=True).start()
        self.send(**self._task.to_dict())

    def _launch(self) -> subprocess.Popen[bytes]:
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            Path(self._task.save).mkdir(parents=True, exist_ok=True)
            with self._log.open("wb") as log:
                return subprocess.Popen(
                    [sys.executable, "-W", "ignore", "-m", "synthbrain.torrent.worker"],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, bufsize=0,
                    env=os.environ | {"PYTHONPATH": _search_path()},
                )  # fmt: skip
        except OSError as error:
            raise SourceError(
                f"cannot start on torrent {self._name} in {self._log.parent}: {error.strerror}; "
                "choose another folder"
            ) from error

    def _listen(self) -> None:
        assert self._worker.stdout is not None
        for line in self._worker.stdout:
            with contextlib.suppress(ValueError):  # half a line of a worker that was killed
                self._events.put(json.loads(line))
        self._events.put({"event": "gone"})

    @property
    def owned(self) -> bool:
        """Whether this process started it, rather than one that this is a fork of."""
        return self.pid == os.getpid()

    @property
    def worker_pid(self) -> int:
        """Of the worker."""
        return self._worker.pid

    def send(self, **command: Any) -> None:
        """Give a command."""
        assert self._worker.stdin is not None
        with contextlib.suppress(
            OSError, ValueError
        ):  # a worker that is gone says so by its events
            data = memoryview(json.dumps(command).encode() + b"\n")
            while data:
                data = data[self._worker.stdin.write(data) or 0 :]

    def events(self) -> Iterator[dict[str, Any]]:
        """Events as they come.

        Raises
        ------
        SourceError
            The worker reports an error or is gone, or nothing has moved for the timeout.
        """
        patience = _Patience(self._timeout)
        while True:
            try:
                event = self._events.get(timeout=_BEAT_SECONDS)
            except queue.Empty:
                event = {"event": "silence"}
            kind = event.pop("event")
            if kind == "error":
                raise SourceError(self._explain(**event))
            if kind == "gone":
                raise SourceError(self._obituary())
            if kind == "status":
                self.status = Status(**event)
            if patience.ends(self.status, moved=kind not in ("status", "silence")):
                raise SourceError(self._nothing())
            yield {"event": kind, **event}

    def wait(self, *kinds: str) -> dict[str, Any]:
        """The next event of some kinds; others are passed over.

        Raises
        ------
        SourceError
            As :meth:`events`.
        """
        return next(event for event in self.events() if event["event"] in kinds)

    def close(self) -> None:
        """Have it save what it knows and end; kill it if it does not."""
        self.send(do="quit")
        try:
            self._worker.wait(_QUIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._worker.kill()
            self._worker.wait()
        assert self._worker.stdin is not None
        self._worker.stdin.close()

    def _explain(self, kind: str, text: str, path: str = "") -> str:
        about = f"torrent {self._name}"
        if kind == "full":
            return (
                f"no room for {about} in {self._task.save}: {text}; free some space, choose "
                "another folder, or give it a smaller budget"
            )
        if kind == "port":
            return f"{about}: {text}; choose another with port= (--port)"
        if kind == "locked":
            return f"{about}: {text}; close that, or choose another folder"
        if kind == "disk":
            return f"{about}: {path or self._task.save}: {text}; choose another folder"
        return text if text.startswith(self._task.torrent) else f"{about}: {text}"

    def _obituary(self) -> str:
        try:
            said = self._log.read_text(errors="replace").strip().splitlines()[-1:]
        except OSError:
            said = []
        self._worker.kill()  # its stdout is closed, so it works for nobody
        return (
            f"the worker of torrent {self._name} ended (status {self._worker.wait()}"
            f"{''.join(f', {line}' for line in said)}); run again, what is here is kept"
        )

    def _nothing(self) -> str:
        status = self.status
        return (
            f"nothing came of torrent {self._name} for {self._timeout:g} s ({status.peers} peers, "
            f"{status.state}); check the network, add peers= or web_seeds=, raise timeout=, or "
            "use another source"
        )


class _Patience:
    """Adds up the time waited without progress; time the caller spends elsewhere is no waiting."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._idle = 0.0
        self._last = time.monotonic()
        self._seen: tuple[object, ...] = ()

    def ends(self, status: Status, *, moved: bool) -> bool:
        now = time.monotonic()
        seen = (status.received - status.wasted, status.checked, status.done)
        self._idle += min(now - self._last, _BEAT_SECONDS)
        if moved or seen != self._seen:
            self._idle = 0.0
        self._seen, self._last = seen, now
        return self._idle > self._seconds


def _search_path() -> str:
    """Where the worker finds this very package, wherever it was imported from."""
    here = str(Path(__file__).parents[2])
    return os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
