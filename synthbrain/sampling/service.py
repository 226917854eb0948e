"""The sampling service: one generator, many clients, an end when nobody is left."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Listener, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

import filelock

from synthbrain.errors import GeneratorError, UsageError
from synthbrain.quantise import Array
from synthbrain.sampling import protocol
from synthbrain.sampling.maker import Maker, Order
from synthbrain.sampling.protocol import KEY, NOT_THERE, SOCKET, Message, receive, send
from synthbrain.sampling.spec import Spec

_LOOK_SECONDS = 0.2
"""How often clients and the time without them are looked at."""

_FIRST_SECONDS = 30.0
"""How long the first client may take, whoever started the service may have died."""


def serve(
    name: str,
    *,
    device: str | None = None,
    batch: int | None = None,
    idle: float | None = None,
    memory: float | None = None,
    ready: Callable[[], object] | None = None,
    **sampling: Any,
) -> None:
    """Serve a generator's volumes to this node's processes, until interrupted or idle.

    Call it from a process's main thread. Clients are
    :class:`synthbrain.sampling.SharedGenerator` objects with the same name, device and options.

    Parameters
    ----------
    name, device, sampling
        As in :class:`synthbrain.sampling.spec.Spec`.
    batch
        Rows made at once; what the generator likes by default.
    idle
        Seconds without clients after which to stop; None goes on for ever.
    memory
        Share of its GPU's memory that it may use, in (0, 1]; all of it by default. Of no effect on
        the CPU.
    ready
        Called once the generator is loaded. With it, one that cannot be loaded ends the service at
        once; without, it stays a while to tell the client that started it.

    Raises
    ------
    UsageError
        Such a service runs already, or an argument makes no sense.
    GeneratorError
        The generator cannot be loaded, or brought the service down.
    """
    if batch is not None and batch < 1:
        raise UsageError(f"batch must be at least 1, found {batch}")
    if memory is not None and not 0 < memory <= 1:
        raise UsageError(f"memory must be a share in (0, 1], found {memory}")
    spec = Spec(name, device, sampling)
    folder = spec.folder()
    with contextlib.suppress(*NOT_THERE):
        protocol.dial(folder).close()
        raise UsageError(f"a sampling service of {name!r} runs already, in {folder}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    Service(folder, Maker(spec, batch, memory), idle).run(ready)


class Service:
    """A socket in a folder, a thread that makes volumes, and one for each client.

    Parameters
    ----------
    folder
        Where its socket, key and log lie; nobody else may enter it.
    maker
        Makes the volumes.
    idle
        Seconds without clients after which to stop; None goes on for ever.
    """

    def __init__(self, folder: Path, maker: Maker, idle: float | None) -> None:
        self.folder, self.maker, self.idle = folder, maker, idle
        self._key = secrets.token_bytes(32)
        self._clients = 0
        self._left = time.monotonic()
        self._had_clients = False
        self._counting = threading.Lock()

    def run(self, ready: Callable[[], object] | None = None) -> None:
        """Serve, then leave nothing behind; ``ready`` is called once the generator is loaded."""
        making = threading.Thread(target=self.maker.run, daemon=True)
        ended_well = False
        try:
            with self._listening() as listener:
                making.start()
                threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
                is_awaited = ready is not None
                while not (self._ended() or (is_awaited and self.maker.failure is not None)):
                    time.sleep(_LOOK_SECONDS)
                    if ready is not None and self.maker.facts is not None:
                        ready()
                        ready = None
                    if not making.is_alive() and self.maker.failure is None:
                        raise GeneratorError("the generator brought the sampling service down")
            ended_well = True
        except (SystemExit, KeyboardInterrupt):
            ended_well = True
            raise
        finally:
            self._remove(log=ended_well)
        if self.maker.failure is not None:
            raise GeneratorError(f"{self.maker.spec.name} cannot be loaded: {self.maker.failure}")

    @contextlib.contextmanager
    def _listening(self) -> Iterator[Listener]:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        for leftover in (SOCKET, KEY):
            (self.folder / leftover).unlink(missing_ok=True)
        descriptor = os.open(self.folder / KEY, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            file.write(self._key)
        with protocol.address(self.folder) as name, Listener(name, "AF_UNIX", 128) as listener:
            (self.folder / SOCKET).chmod(0o600)
            yield listener

    def _accept(self, listener: Listener) -> None:
        """Give each connection a thread of its own: a silent peer holds nobody up."""
        while True:
            try:
                connection = listener.accept()
            except OSError:  # no descriptor left for it; whoever knocks is kept waiting
                time.sleep(_LOOK_SECONDS)
                continue
            threading.Thread(target=self._welcome, args=(connection,), daemon=True).start()

    def _welcome(self, connection: Connection) -> None:
        with connection:
            try:
                deliver_challenge(connection, self._key)
                answer_challenge(connection, self._key)
            except (EOFError, OSError):
                return
            except Exception as error:  # whatever a stranger may say
                print(f"refused a peer: {type(error).__name__}", file=sys.stderr, flush=True)
                return
            with self._counted(), contextlib.suppress(EOFError, OSError):
                while True:
                    self._answer(connection, receive(connection))

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        with self._counting:
            self._clients += 1
            self._had_clients = True
        try:
            yield
        finally:
            with self._counting:
                self._clients -= 1
                self._left = time.monotonic()

    def _answer(self, connection: Connection, request: Message) -> None:
        if request["do"] == "status":
            send(connection, self._status())
            return
        # Before anything else: while a request is worked on, its client is to be silent.
        latents = protocol.receive_arrays(connection, request) if "arrays" in request else None
        _wait(connection, self.maker.loaded)
        if self.maker.failure is not None:
            protocol.send_error(connection, self.maker.failure)
        elif request["do"] == "facts":
            assert self.maker.facts is not None
            send(connection, self.maker.facts.to_message())
        else:
            self._make(connection, request, latents)

    def _make(self, connection: Connection, request: Message, latents: Array | None) -> None:
        assert self.maker.facts is not None
        found = self.maker.facts.digest
        if request["digest"] != found:
            told = f"the weights of {self.maker.spec.name} changed ({request['digest'][:8]} before"
            protocol.send_error(
                connection, GeneratorError(f"{told}, {found[:8]} now); start the program again")
            )
            return
        of = latents if latents is not None else [tuple(row) for row in request["rows"]]
        orders = self.maker.submit(request["do"], of)
        try:
            _wait(connection, lambda seconds: self.maker.collected(orders, seconds))
            _reply(connection, orders)
        finally:
            self.maker.forget(orders)

    def _status(self) -> Message:
        facts = self.maker.facts
        return {
            "pid": os.getpid(),
            "generator": None if facts is None else f"{facts.name}-{facts.digest[:8]}",
            "device": self.maker.spec.device,
            "batch": self.maker.batch,
            "queued": self.maker.queued,
            "made": self.maker.made,
            "clients": self._clients - 1,
        }

    def _ended(self) -> bool:
        """Whether nobody has been here for long, and nobody is just coming in."""
        patience = self.idle if self.maker.failure is None else 0.0
        if self._clients or patience is None:
            return False
        if not self._had_clients:
            patience = max(patience, _FIRST_SECONDS)
        return time.monotonic() - self._left >= patience

    def _remove(self, *, log: bool) -> None:
        """Take what is ours away; the log stays where it has something to explain."""
        lock = protocol.lock(self.folder)
        with contextlib.suppress(OSError, filelock.Timeout), lock.acquire(timeout=5):
            if not protocol.has_key(self.folder, self._key):
                return  # another service's by now
            if log:
                shutil.rmtree(self.folder, ignore_errors=True)
                Path(lock.lock_file).unlink(missing_ok=True)
            else:
                (self.folder / KEY).unlink(missing_ok=True)


def _wait(connection: Connection, done: Callable[[float], bool]) -> None:
    """Wait for something as long as the client does, who says nothing meanwhile.

    Raises
    ------
    EOFError
        The client is gone.
    """
    while not done(_LOOK_SECONDS):
        if connection.poll():
            raise EOFError


def _reply(connection: Connection, orders: list[Order]) -> None:
    error = next((order.error for order in orders if order.error is not None), None)
    if error is not None:
        protocol.send_error(connection, error)
        return
    made = [order.values for order in orders if order.values is not None]
    with contextlib.ExitStack() as stack:
        try:
            memory = stack.enter_context(protocol.packed(made))
        except OSError as full:
            protocol.send_error(connection, full)
        else:
            protocol.send_arrays(connection, {}, [len(made), *made[0].shape], memory)
