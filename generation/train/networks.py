"""New networks, the same for the same seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from generation.presets import Preset


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """PyTorch's own randomness on the CPU from a seed, and afterwards as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def new_network(preset: Preset, name: str, seed: int) -> nn.Module:
    """A network as MONAI starts it.

    Parameters
    ----------
    preset
        Its architecture.
    name
        ``"unet"`` or ``"autoencoder"``.
    seed
        Of its parameters.
    """
    from monai.networks.nets import (  # type: ignore[attr-defined]
        AutoencoderKL,
        DiffusionModelUNet,
    )

    kind = AutoencoderKL if name == "autoencoder" else DiffusionModelUNet
    with seeded(seed):
        return kind(**preset.networks[name])
