"""Finding the sampling service of this node, and starting it where there is none."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import filelock

from synthbrain.errors import GeneratorError, UsageError
from synthbrain.sampling import protocol
from synthbrain.sampling.protocol import LOG, NOT_THERE, Message
from synthbrain.sampling.spec import Spec

_START_SECONDS = 120.0
"""It listens before it loads anything: only a broken or crowded node takes so long."""

_POLL_SECONDS = 0.05
_LAST_LINES = 5


@dataclass(frozen=True)
class Limits:
    """What a service that is started may use, as :func:`synthbrain.sampling.serve` takes it."""

    batch: int | None = None
    idle: float = 60.0
    memory: float | None = None


def connect(spec: Spec, limits: Limits) -> Connection:
    """Connect to the service of a generator; whoever comes first starts it.

    Parameters
    ----------
    spec
        The generator.
    limits
        Of a service that is started.

    Raises
    ------
    GeneratorError
        It cannot be started.
    """
    folder = spec.folder()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GeneratorError(
            f"cannot start a sampling service in {folder.parent}: {error.strerror}; set "
            "SYNTHBRAIN_HOME to a folder that can be written"
        ) from error
    while True:
        try:
            return protocol.dial(folder)
        except NOT_THERE:
            pass
        try:
            with protocol.lock(folder).acquire(timeout=0):
                return _start(spec, folder, limits)
        except filelock.Timeout:
            time.sleep(_POLL_SECONDS)


def tidy(folder: Path) -> None:
    """Take away what a killed service left, unless one serves there or is just starting."""
    if not folder.exists():
        return
    lock = protocol.lock(folder)
    with contextlib.suppress(OSError, filelock.Timeout), lock.acquire(timeout=0):
        try:
            protocol.dial(folder).close()
        except NOT_THERE:
            shutil.rmtree(folder, ignore_errors=True)
            Path(lock.lock_file).unlink(missing_ok=True)


def last_lines(folder: Path) -> str:
    """What the service in a folder said last, in one line."""
    try:
        lines = (folder / LOG).read_text(errors="replace").strip().splitlines()
    except OSError:
        return "it left no log"
    return " | ".join(line.strip() for line in lines[-_LAST_LINES:]) or "it said nothing"


def status(folder: str | os.PathLike[str]) -> Message:
    """How the sampling service in a folder is doing.

    Parameters
    ----------
    folder
        One of those in ``sampling/`` of the package's home.

    Returns
    -------
    dict
        ``pid``; ``generator``, its identity, None until it is loaded; ``device`` as it was asked
        for; ``batch``, the rows made at once; ``queued`` rows nobody is making yet; ``made``,
        volumes since the start; ``clients``, open connections but this one.

    Raises
    ------
    UsageError
        No service answers there.
    """
    try:
        with protocol.dial(Path(folder)) as connection:
            protocol.send(connection, {"do": "status"})
            return protocol.receive(connection)
    except NOT_THERE:
        raise UsageError(
            f"no sampling service answers in {folder}; one starts with the first volume that is "
            "asked for, or with python -m synthbrain.sampling"
        ) from None


def _start(spec: Spec, folder: Path, limits: Limits) -> Connection:
    """Start a service, unless somebody was quicker, and connect to it."""
    for other in folder.parent.iterdir():
        if other.is_dir() and other != folder:
            tidy(other)
    process: subprocess.Popen[bytes] | None = None
    began = time.monotonic()
    while True:
        # Looked at before dialling: it also ends where another one serves already.
        ended = process is not None and process.poll() is not None
        try:
            return protocol.dial(folder)
        except NOT_THERE:
            pass
        if process is None:
            process = _launch(spec, folder, limits)
        elif ended or time.monotonic() - began > _START_SECONDS:
            process.kill()
            raise GeneratorError(
                f"the sampling service of {spec.name!r} did not start: {last_lines(folder)}"
            )
        time.sleep(_POLL_SECONDS)


def _launch(spec: Spec, folder: Path, limits: Limits) -> subprocess.Popen[bytes]:
    """A process that shares nothing with this one: session, pipes, terminal."""
    command = [sys.executable, "-m", "synthbrain.sampling", spec.name, f"--idle={limits.idle}"]
    command.append(f"--sampling={json.dumps(spec.sampling)}")
    command += [] if spec.device is None else [f"--device={spec.device}"]
    command += [] if limits.batch is None else [f"--batch={limits.batch}"]
    command += [] if limits.memory is None else [f"--memory={limits.memory}"]
    folder.mkdir(mode=0o700, exist_ok=True)
    with (folder / LOG).open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            env=os.environ | {"PYTHONPATH": _search_path()},
        )  # fmt: skip
    # Somebody has to wait for it in the end, or it stays in the process table.
    threading.Thread(target=process.wait, daemon=True).start()
    return process


def _search_path() -> str:
    """Where the service finds this very package, and whatever module its generator is in."""
    here = str(Path(__file__).parents[2])
    return os.pathsep.join(dict.fromkeys([here, *(os.path.abspath(path) for path in sys.path)]))
