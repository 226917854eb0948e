"""Which part of a global batch is whose, and randomness that does not depend on it.

Everything random about a training step is a function of (seed, step, place in the global batch):
how many processes share the batch changes nothing, and a run that is resumed draws what it would
have drawn.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from generation.errors import TrainingError
from generation.options import find_device

_NOISE, _ORDER, _CHECKS, _PASSES = 1, 2, 3, 4
_BUCKET = 64 << 20


@dataclass(frozen=True)
class World:
    """The processes of a run, as seen by one of them.

    Parameters
    ----------
    rank, size
        Which one this is, of how many.
    device
        Where it computes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def of_environment(cls, device: str | None = None) -> World:
        """As ``torchrun`` says (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``), joined; or alone.

        Raises
        ------
        TrainingError
            There is no such device, or none for this process.
        """
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        found = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            place = find_device(f"cuda:{local}" if found == "cuda" else found)
        except ValueError as error:
            raise TrainingError(str(error)) from None
        if size > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if place.type == "cuda" else "gloo")
        return cls(rank, size, place)

    def places(self, batch: int) -> range:
        """The places of a global batch that this process fills.

        Raises
        ------
        ValueError
            The batch cannot be shared evenly.
        """
        if batch % self.size:
            raise ValueError(
                f"a batch of {batch} cannot be shared by {self.size} processes; use a multiple"
            )
        share = batch // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes."""
        if self.size > 1:
            torch.distributed.all_reduce(values)
            values /= self.size
        return values

    def average_gradients(self, module: nn.Module) -> None:
        """Give every process the mean of all processes' gradients, some MB at a time."""
        if self.size == 1:
            return
        bucket: list[Tensor] = []
        for parameter in module.parameters():
            if parameter.grad is not None:
                bucket.append(parameter.grad)
            if sum(gradient.nbytes for gradient in bucket) >= _BUCKET:
                self._average(bucket)
                bucket = []
        if bucket:
            self._average(bucket)

    def _average(self, gradients: list[Tensor]) -> None:
        flat = self.mean(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def barrier(self) -> None:
        """Wait for the others."""
        if self.size > 1:
            torch.distributed.barrier()


def draws(seed: int, step: int, place: int) -> torch.Generator:
    """What is random about one sample of one step.

    Parameters
    ----------
    seed
        Of the run.
    step, place
        Training step, and place in its global batch.
    """
    return _generator(_NOISE, seed, step, place)


def checks(seed: int, place: int) -> torch.Generator:
    """What is random about one sample of every validation."""
    return _generator(_CHECKS, seed, place)


def pass_seed(seed: int, step: int, place: int) -> int:
    """What a network's own randomness, such as dropout, begins with in a pass.

    Parameters
    ----------
    seed, step
        As of :func:`draws`.
    place
        Of the pass's first sample: with dropout, how a batch is shared changes the result.
    """
    return _mixed(_PASSES, seed, step, place)


def _generator(*words: int) -> torch.Generator:
    return torch.Generator().manual_seed(_mixed(*words))


def _mixed(*words: int) -> int:
    high, low = np.random.SeedSequence(words).generate_state(2, np.uint32)
    return int(high) << 31 | int(low) >> 1


@lru_cache(maxsize=4)
def order(seed: int, epoch: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The order of an epoch: a permutation of ``count`` rows."""
    return np.random.default_rng((_ORDER, seed, epoch)).permutation(count)


def row_of(seed: int, step: int, place: int, batch: int, count: int) -> int:
    """The row in a place of a step's global batch.

    Epochs follow one another without a gap: the last batch of one may hold the first rows of the
    next, so that every row is seen equally often.
    """
    epoch, position = divmod(step * batch + place, count)
    return int(order(seed, epoch, count)[position])
