"""A generator that holds no model: it asks the node's sampling service."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from generation.covariates import NAMES
from synthbrain.errors import CovariateError, GeneratorError, UsageError
from synthbrain.sampling import protocol
from synthbrain.sampling.launch import Limits, connect, last_lines
from synthbrain.sampling.protocol import Facts, Message, Row
from synthbrain.sampling.spec import Spec

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from synthbrain.quantise import Array
    from synthbrain.sampling.maker import Work

_ATTEMPTS = 2
"""A service that went down is started again once."""


class SharedGenerator:
    """A generator for any number of DataLoader workers and ranks, in one process of its own.

    It is what it stands for in all but place: name, digest and volumes are the same. The service
    that holds the model is started by whoever first needs it, shared by all processes of the user
    on this node, and gone ``idle`` seconds after the last of them.

    Parameters
    ----------
    generator
        Name of a generator, as :func:`synthbrain.generators.load_generator` takes it.
    device
        Where it computes, such as ``"cuda:0"``; the generator's own choice by default. Ranks with
        a device of their own get a service each.
    batch
        Rows it is given at once; as many as it likes by default. Counts for the process that
        starts the service.
    idle
        Seconds the service outlives its last client; likewise.
    memory
        Share of its GPU's memory that it may use, in (0, 1]; likewise.
    sampling
        Further options of the generator, such as ``solver`` and ``steps``; of JSON's types.

    Raises
    ------
    UsageError
        An argument makes no sense.

    Notes
    -----
    Connections are made when needed, one per process and thread that asks at the same time, and
    belong to the process that made them: pickled and forked copies make their own. Volumes come
    back on the CPU.

    Examples
    --------
    >>> SharedGenerator("phantom", device="cpu")
    <SharedGenerator of 'phantom' on cpu>
    """

    def __init__(
        self,
        generator: str,
        *,
        device: str | None = None,
        batch: int | None = None,
        idle: float = 60.0,
        memory: float | None = None,
        **sampling: Any,
    ) -> None:
        if batch is not None and batch < 1:
            raise UsageError(f"batch must be at least 1, found {batch}")
        if not idle >= 0:
            raise UsageError(f"idle must be at least 0 seconds, found {idle}")
        if memory is not None and not 0 < memory <= 1:
            raise UsageError(f"memory must be a share in (0, 1], found {memory}")
        self.spec = Spec(generator, device, sampling)
        self.limits = Limits(batch, idle, memory)
        self._facts: Facts | None = None
        self._free: list[Connection] = []
        self._owner = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_free": [], "_owner": 0}

    def __repr__(self) -> str:
        return f"<SharedGenerator of {self.spec.name!r} on {self.spec.device or 'its own device'}>"

    @property
    def facts(self) -> Facts:
        """What the generator says of itself; the service is asked once.

        Raises
        ------
        GeneratorError
            The generator cannot be loaded, or its service cannot be started.
        """
        if self._facts is None:
            told, _ = self._ask({"do": "facts"})
            self._facts = Facts.from_message(told)
        return self._facts

    @property
    def name(self) -> str:
        """Short name of the generator."""
        return self.facts.name

    @property
    def digest(self) -> str:
        """Its digest."""
        return self.facts.digest

    @property
    def honours(self) -> frozenset[str]:
        """Names of the covariates its volumes follow."""
        return frozenset(self.facts.honours)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels of one volume, ``(x, y, z)``."""
        return self.facts.shape

    @property
    def batch_size(self) -> int:
        """How many rows the service gives it at once."""
        return self.facts.batch_size

    @property
    def seconds_per_volume(self) -> float:
        """Rough cost on this machine, when the service was asked."""
        return self.facts.seconds_per_volume

    @property
    def provenance(self) -> dict[str, str]:
        """How its volumes come about."""
        return dict(self.facts.provenance)

    @property
    def affine(self) -> tuple[tuple[float, ...], ...] | None:
        """Affine of its volumes; None for the default one."""
        return self.facts.affine

    @property
    def latent_shape(self) -> tuple[int, int, int, int] | None:
        """Values of one latent, ``(channel, x, y, z)``; None if it has none."""
        return self.facts.latent_shape

    def expect(self, digest: str) -> None:
        """Make sure that the service holds a certain generator.

        Raises
        ------
        GeneratorError
            It holds another one, or cannot load any.
        """
        if self.digest != digest:
            raise GeneratorError(
                f"the sampling service holds {self.name}-{self.digest[:8]}, expected "
                f"{digest[:8]}: other weights, or another device that computes otherwise; give the "
                "dataset generator=SharedGenerator(...) to take what the service makes"
            )

    def sample(self, rows: pd.DataFrame) -> torch.Tensor:
        """Have one volume made per row.

        Parameters
        ----------
        rows
            Indexed by id, with the normalised covariate columns and an integer ``seed``.

        Returns
        -------
        torch.Tensor
            ``(n, 1, x, y, z)`` float32 in [0, 1], on the CPU.

        Raises
        ------
        CovariateError
            A column is missing.
        GeneratorError
            The generator failed, or its service went down twice.
        """
        return self._made("sample", _rows(rows), (1, *self.shape))

    def sample_latents(self, rows: pd.DataFrame) -> torch.Tensor:
        """Have one latent made per row.

        Parameters
        ----------
        rows
            As for :meth:`sample`.

        Returns
        -------
        torch.Tensor
            ``(n, *latent_shape)`` float32, on the CPU.

        Raises
        ------
        CovariateError, GeneratorError
            As for :meth:`sample`, or the generator has no latents.
        """
        return self._made("sample_latents", _rows(rows), self._latents())

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Have latents turned into volumes.

        Parameters
        ----------
        latents
            ``(n, *latent_shape)``, any floating type, on any device.

        Returns
        -------
        torch.Tensor
            ``(n, 1, x, y, z)`` float32 in [0, 1], on the CPU.

        Raises
        ------
        UsageError
            Latents of another shape.
        GeneratorError
            As for :meth:`sample`, or the generator has no latents.
        """
        expected = self._latents()
        if tuple(latents.shape[1:]) != expected:
            raise UsageError(
                f"latents must have shape (n, {', '.join(map(str, expected))}), "
                f"found {tuple(latents.shape)}"
            )
        return self._made("decode", latents.detach().float().cpu().numpy(), (1, *self.shape))

    def close(self) -> None:
        """Let go of the service; it is found or started again when needed."""
        free, self._free = self._free, []
        for connection in free:
            connection.close()

    def _latents(self) -> tuple[int, ...]:
        if self.latent_shape is None:
            raise GeneratorError(f"generator {self.name!r} makes volumes without latents")
        return self.latent_shape

    def _made(self, work: Work, of: list[Row] | Array, one: tuple[int, ...]) -> torch.Tensor:
        """What the service makes of rows or latents, each of shape ``one``."""
        import torch

        if not len(of):
            return torch.empty((0, *one))
        request: Message = {"do": work, "digest": self.digest}
        if isinstance(of, list):
            _, made = self._ask({**request, "rows": of})
        else:
            _, made = self._ask(request, of)
        return torch.from_numpy(made)

    def _ask(self, request: Message, arrays: Array | None = None) -> tuple[Message, Any]:
        """The reply to a request and to what comes with it, and the arrays that come back."""
        for _ in range(_ATTEMPTS):
            connection = self._take()
            try:
                _send(connection, request, arrays)
                reply = protocol.receive(connection)
                made = protocol.receive_arrays(connection, reply) if "arrays" in reply else None
            except (EOFError, OSError):
                connection.close()
                self.close()  # the others lead to the same process
                continue
            except BaseException:
                connection.close()  # its reply is still to come
                raise
            self._give_back(connection, reply)
            return reply, made
        raise GeneratorError(
            f"the sampling service of {self.spec.name!r} went down {_ATTEMPTS} times over the same "
            f"request; it said last: {last_lines(self.spec.folder())}"
        )

    def _take(self) -> Connection:
        """A connection of this process that nobody is using."""
        if self._owner != os.getpid():
            self._owner, self._free = os.getpid(), []
        try:
            return self._free.pop()
        except IndexError:
            return connect(self.spec, self.limits)

    def _give_back(self, connection: Connection, reply: Message) -> None:
        if "error" in reply and self._facts is None:
            connection.close()  # a service that could not load its generator ends with its clients
        else:
            self._free.append(connection)
        protocol.raise_error(reply)


def _send(connection: Connection, request: Message, arrays: Array | None) -> None:
    if arrays is None:
        protocol.send(connection, request)
        return
    with protocol.packed(arrays) as memory:
        protocol.send_arrays(connection, request, arrays.shape, memory)


def _rows(rows: pd.DataFrame) -> list[Row]:
    absent = [name for name in (*NAMES, "seed") if name not in rows.columns]
    if absent:
        raise CovariateError(
            f"rows lack the column(s) {', '.join(absent)}; found {list(rows.columns)}"
        )
    columns = [rows[name].tolist() for name in NAMES]
    return [
        (str(id), float(sex), float(age), float(ventricles), float(brain), int(seed))
        for id, sex, age, ventricles, brain, seed in zip(
            rows.index, *columns, rows["seed"], strict=True
        )
    ]
