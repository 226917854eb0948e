"""New networks, the same for the same seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from generation.presets import System


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """PyTorch's own randomness on the CPU from a seed, and afterwards as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def new_network(preset: System, name: str, seed: int) -> nn.Module:
    """A network as its class starts it.

    Parameters
    ----------
    preset
        Its architecture.
    name
        One of its networks.
    seed
        Of its parameters.
    """
    with seeded(seed):
        return preset.make(name)
