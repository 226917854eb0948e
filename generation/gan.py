"""Volumes from a GAN: one pass of a generator, without covariates.

The baselines of Pinaya et al. 2022: the VAE-GAN of Larsen et al. 2016 and the LSGAN of Mao et
al. 2017. Their networks are in :mod:`generation.gan_networks`, :mod:`generation.train.gan` trains
them.
"""

from __future__ import annotations

import hashlib
import json
import time
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from generation.engine import RowNoise, Timing, as_seeds, peak_bytes, synchronise
from generation.options import Options
from generation.presets import GanPreset
from generation.system import Checkpoint

if TYPE_CHECKING:
    import pandas as pd

VERSION = 1
"""Raise it whenever the same weights and row would give other voxels beyond rounding."""

OPTIONS = frozenset({"dtype", "device"})
"""What of :class:`generation.options.Options` means something here."""

_CPU_RATE, _GPU_RATE = 1e11, 5e13


class GanGenerator:
    """Volumes from seeds; covariates are not looked at.

    Parameters
    ----------
    weights
        A checkpoint with the network ``"generator"``.
    options
        Of which ``device`` and ``dtype`` are heeded; ``"auto"`` is float32, one pass is cheap.

    Raises
    ------
    ValueError
        The checkpoint is of another kind.
    """

    honours: frozenset[str] = frozenset()
    batch_size = 1

    def __init__(self, weights: Checkpoint, options: Options | None = None) -> None:
        preset = weights.preset
        if not isinstance(preset, GanPreset):
            raise ValueError(f"{weights.name} is a {preset.system} system, expected a gan one")
        self.weights, self.preset, self.options = weights, preset, options or Options()
        self.name, self.shape, self.affine = weights.name, preset.shape, preset.affine
        self._dtype = torch.float32 if self.options.dtype == "auto" else self.options.type
        self._timing = Timing()

    def __getstate__(self) -> dict[str, Any]:
        return {"weights": self.weights, "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        type(self).__init__(self, **state)

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 over the weights and everything that changes what they give."""
        parts = {"weights": self.weights.digest, "version": str(VERSION), "dtype": self._word}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def provenance(self) -> dict[str, str]:
        """How its volumes come about, as text."""
        return {
            "weights": self.weights.name,
            "weights_digest": self.weights.digest,
            "dtype": self._word,
            "device": str(self.options.place),
            "torch": torch.__version__,
        }

    @property
    def seconds_per_volume(self) -> float:
        """As measured, or guessed from the network's operations before the first."""
        if self._timing.calls:
            return self._timing.mean
        rate = _GPU_RATE if self.options.place.type == "cuda" else _CPU_RATE
        return operations(self.preset) / rate

    @property
    def report(self) -> dict[str, float]:
        """Milliseconds a volume takes, and the peak of memory in GB."""
        return {
            "ms_per_volume": 1e3 * self._timing.mean,
            "peak_gb": peak_bytes(self.options.place) / 1e9,
        }

    @torch.inference_mode()
    def sample(self, rows: pd.DataFrame) -> Tensor:
        """Make one volume per row, each on its own.

        Parameters
        ----------
        rows
            With an integer column ``seed``; nothing else is read.

        Returns
        -------
        Tensor
            ``(n, 1, 160, 224, 160)`` float32 in [0, 1], on the device.
        """
        device = self.options.place
        out = torch.empty((len(rows), 1, *self.shape), device=device)
        for i, seed in enumerate(as_seeds(rows["seed"])):
            began = time.perf_counter()
            noise = RowNoise([seed], (self.preset.latent,)).draw()
            out[i] = self._network(noise.to(device, self._dtype))[0]
            synchronise(device)
            self._timing.seconds += time.perf_counter() - began
            self._timing.calls += 1
        return out

    @property
    def _word(self) -> str:
        return str(self._dtype).removeprefix("torch.")

    @cached_property
    def _network(self) -> nn.Module:
        return self.weights.network("generator").to(self.options.place, self._dtype)


def operations(preset: GanPreset) -> float:
    """Multiplications and additions of one volume's convolutions.

    Parameters
    ----------
    preset
        Of the generator: each level doubles the voxels, has a convolution and a residual of two.
    """
    channels = preset.networks["generator"].channels
    voxels, total = prod(preset.base), 2 * prod(preset.base) * 27 * 2 * channels[0] ** 2
    for before, after in pairwise(channels):
        voxels *= 8
        total += 2 * voxels * 27 * (before * after + 2 * after**2)
    return float(total)
