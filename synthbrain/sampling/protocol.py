"""What crosses between a sampling service and its clients: JSON, and arrays in shared memory.

Nothing is ever unpickled. Arrays lie in anonymous memory whose descriptor is passed along the
socket: it has no name, so that nothing is left when either side is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import filelock
import numpy as np

from generation.generator import has_latents
from synthbrain import errors
from synthbrain.quantise import Array

if TYPE_CHECKING:
    from generation.generator import Generator

Message = dict[str, Any]

Row = tuple[str, float, float, float, float, int]
"""Id, the covariates in the order of :data:`generation.covariates.NAMES`, and the seed."""

SOCKET, KEY, LOG = "socket", "key", "service.log"
"""Files in a service's folder."""

NOT_THERE = (OSError, EOFError, AuthenticationError)
"""What :func:`dial` raises where nobody answers, or another service than the key's."""

_FDS = "/proc/self/fd"


@dataclass(frozen=True)
class Facts:
    """What a generator says of itself, as :class:`generation.generator.Generator` explains it."""

    name: str
    digest: str
    honours: tuple[str, ...]
    shape: tuple[int, int, int]
    batch_size: int
    seconds_per_volume: float
    provenance: dict[str, str] = field(default_factory=dict)
    affine: tuple[tuple[float, ...], ...] | None = None
    latent_shape: tuple[int, int, int, int] | None = None

    @classmethod
    def of(cls, generator: Generator, batch_size: int) -> Facts:
        """Those of a generator that is given ``batch_size`` rows at once."""
        affine = getattr(generator, "affine", None)
        return cls(
            name=generator.name,
            digest=generator.digest,
            honours=tuple(sorted(generator.honours)),
            shape=generator.shape,
            batch_size=batch_size,
            seconds_per_volume=float(generator.seconds_per_volume),
            provenance=dict(getattr(generator, "provenance", {})),
            affine=None if affine is None else _nested(affine),
            latent_shape=generator.latent_shape if has_latents(generator) else None,
        )

    def to_message(self) -> Message:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def from_message(cls, told: Message) -> Facts:
        """The inverse of :meth:`to_message`."""
        x, y, z = told["shape"]
        affine, latent = told["affine"], told["latent_shape"]
        lists = {
            "honours": tuple(told["honours"]),
            "shape": (x, y, z),
            "affine": None if affine is None else _nested(affine),
            "latent_shape": None if latent is None else tuple(latent),
        }
        return cls(**told | lists)


def _nested(affine: Any) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(value) for value in row) for row in affine)


@contextlib.contextmanager
def address(folder: Path) -> Iterator[str]:
    """A name of the folder's socket that is short enough for one, valid inside the block.

    Addresses end after about 100 bytes, paths do not; on Linux the folder's descriptor is a short
    path to it.
    """
    if not os.path.isdir(_FDS):
        yield str(folder / SOCKET)
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"{_FDS}/{descriptor}/{SOCKET}"
    finally:
        os.close(descriptor)


def dial(folder: Path) -> Connection:
    """Connect to the service of a folder, each side proving that it knows the key.

    Raises
    ------
    OSError, EOFError, multiprocessing.AuthenticationError
        As :data:`NOT_THERE` says.
    """
    key = (folder / KEY).read_bytes()
    with address(folder) as name:
        return Client(name, "AF_UNIX", authkey=key)


def lock(folder: Path) -> filelock.FileLock:
    """Held by whoever starts a service in the folder, or takes the folder away."""
    return filelock.FileLock(folder.with_name(f"{folder.name}.lock"))


def has_key(folder: Path, key: bytes) -> bool:
    """Whether the folder still belongs to the service with this key."""
    try:
        return (folder / KEY).read_bytes() == key
    except OSError:
        return False


def send(connection: Connection, message: Message) -> None:
    """Send one message."""
    connection.send_bytes(json.dumps(message).encode())


def receive(connection: Connection) -> Message:
    """Wait for the next message.

    Raises
    ------
    EOFError, OSError
        The other side is gone.
    """
    return json.loads(connection.recv_bytes())


def send_error(connection: Connection, error: BaseException) -> None:
    """Send what went wrong, in one line."""
    lines = str(error).strip().splitlines() or ["no message"]
    send(connection, {"error": type(error).__name__, "message": lines[0]})


def raise_error(message: Message) -> None:
    """Raise the error that a message tells of, if it does.

    Raises
    ------
    SynthBrainError
        Of the class it had in the service; :class:`GeneratorError` for those of other packages.
    """
    kind = message.get("error")
    if kind is None:
        return
    text = str(message["message"])
    if kind in errors.__all__:
        raise getattr(errors, kind)(text)
    raise errors.GeneratorError(f"the generator failed in the sampling service: {kind}: {text}")


@contextlib.contextmanager
def packed(arrays: Iterable[Array]) -> Iterator[BinaryIO]:
    """Float32 arrays in memory without a name, for :func:`send_arrays`.

    Raises
    ------
    OSError
        There is no room for them.
    """
    with _anonymous() as memory:
        for array in arrays:
            memory.write(np.ascontiguousarray(array, dtype=np.float32).data)
        memory.flush()
        yield memory


def send_arrays(
    connection: Connection, message: Message, shape: Sequence[int], memory: BinaryIO
) -> None:
    """Send a message and packed arrays of ``shape``, ``(n, ...)``."""
    send(connection, {**message, "arrays": list(shape)})
    with socket.socket(fileno=os.dup(connection.fileno())) as channel:
        socket.send_fds(channel, [b"a"], [memory.fileno()])


def receive_arrays(connection: Connection, message: Message) -> Array:
    """The arrays a message announces, ``(n, ...)`` float32."""
    arrays = np.empty(message["arrays"], dtype=np.float32)
    with socket.socket(fileno=os.dup(connection.fileno())) as channel:
        data, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
    if not data:
        raise EOFError
    left = arrays.data.cast("B")
    with open(descriptors[0], "rb", buffering=0) as memory:
        memory.seek(0)
        while left:
            count = memory.readinto(left)
            if not count:
                raise EOFError
            left = left[count:]
    return arrays


def _anonymous() -> BinaryIO:
    """A file in memory without a name; on systems that have none, one that is already deleted."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("synthbrain-arrays"), "w+b")
    return tempfile.TemporaryFile()
