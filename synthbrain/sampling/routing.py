"""A generator given by name: loaded in this process, or left to the node's service."""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING, Any

from generation.generator import has_latents
from synthbrain.errors import GeneratorError
from synthbrain.generators import GENERATORS, identity, load_generator
from synthbrain.sampling.client import SharedGenerator
from synthbrain.sampling.launch import tidy

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from generation.generator import Generator

IDLE_SECONDS = 10.0
"""How long a service that nobody asked for by name outlives its clients."""


class RoutedGenerator:
    """A generator that computes here, and in DataLoader workers asks the service instead.

    Parameters
    ----------
    name
        As :func:`synthbrain.generators.load_generator` takes it.
    here
        What it gave for that name; says what there is to say of it.

    Notes
    -----
    Workers cannot each hold a model, and forked ones cannot use a GPU. The process they belong to
    computes for itself until :meth:`share` is called: then the service does that, too, and there is
    one model for all of them.
    """

    def __init__(self, name: str, here: Generator) -> None:
        self.name, self.honours, self.shape = here.name, here.honours, here.shape
        self.digest = here.digest
        self.batch_size = here.batch_size
        self.provenance: dict[str, str] = dict(getattr(here, "provenance", {}))
        self.affine = getattr(here, "affine", None)
        self.latent_shape = here.latent_shape if has_latents(here) else None
        named = name if ":" in name else here.name
        chooses = ":" not in named and named not in GENERATORS  # only weights take a device
        device = local_device(os.environ) if chooses else None
        self.shared = SharedGenerator(named, device=device, idle=IDLE_SECONDS)
        weakref.finalize(self, tidy, self.shared.spec.folder())
        self._here: Generator | None = here
        self._seconds = here.seconds_per_volume
        self._shares = False
        self._settling = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Without the model: workers have no use for it, and others load their own."""
        state = {**self.__dict__, "_here": None, "_seconds": self.seconds_per_volume}
        del state["_settling"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _settling=threading.Lock())

    def __repr__(self) -> str:
        return f"<RoutedGenerator of {self.name!r}>"

    @property
    def seconds_per_volume(self) -> float:
        """Rough cost on this machine."""
        return self._seconds if self._here is None else self._here.seconds_per_volume

    @property
    def report(self) -> dict[str, float] | None:
        """What a volume costs, where this process makes them and the generator tells."""
        return None if self._shares else getattr(self._here, "report", None)

    def share(self) -> None:
        """Leave it all to the service from now on.

        Raises
        ------
        GeneratorError
            There is none, and none can be started; all stays as it is.
        """
        with self._settling:
            self.shared.expect(self.digest)
            self._shares = True

    def sample(self, rows: pd.DataFrame) -> torch.Tensor:
        """As :meth:`generation.generator.Generator.sample`."""
        return self._current().sample(rows)

    def sample_latents(self, rows: pd.DataFrame) -> torch.Tensor:
        """As :meth:`generation.generator.LatentGenerator.sample_latents`."""
        return self._current().sample_latents(rows)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """As :meth:`generation.generator.LatentGenerator.decode`."""
        return self._current().decode(latents)

    def _current(self) -> Any:
        from torch.utils.data import get_worker_info

        if get_worker_info() is not None:
            self.shared.expect(self.digest)
            return self.shared
        with self._settling:  # who waits here needs no model of its own
            if self._shares:
                return self.shared
        if self._here is None:
            self._here = self._loaded()
        return self._here

    def _loaded(self) -> Generator:
        """The generator once more, for a copy that has none."""
        here = load_generator(self.shared.spec.name)
        if here.digest != self.digest:
            raise GeneratorError(
                f"{self.shared.spec.name} is {identity(here)} here, expected {identity(self)}: "
                "other weights, or another device that computes otherwise; open the dataset again "
                "to take what is here"
            )
        return here


def local_device(environ: os._Environ[str] | dict[str, str]) -> str | None:
    """The device of this rank, where `torchrun` started several and each has its own.

    Returns
    -------
    str or None
        Such as ``"cuda:1"``; None leaves the choice to the generator.
    """
    rank = environ.get("LOCAL_RANK")
    if rank is None:
        return None
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{int(rank) % count}" if count > 1 else None
