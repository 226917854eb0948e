"""Pixel-space diffusion: a U-Net draws volumes directly, without covariates.

The MedForj system of Remedios et al. 2025: 192 × 224 × 192 voxels of 1 mm, values in [-1, 1].
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from generation.engine import Progress, Sampler, Timing, as_seeds, peak_bytes, prepare
from generation.latent import Checkpoint, digest_of, guess_seconds, provenance_of
from generation.options import Options

if TYPE_CHECKING:
    import pandas as pd


class PixelDiffusion:
    """Volumes from seeds; covariates are not looked at.

    Parameters
    ----------
    weights
        A checkpoint with the network ``"unet"``.
    options
        How to sample; UniPC with 20 steps by default.
    progress
        Told about every step.
    """

    honours: frozenset[str] = frozenset()

    def __init__(
        self,
        weights: Checkpoint,
        options: Options | None = None,
        *,
        progress: Progress | None = None,
    ) -> None:
        if weights.preset.system != "pixel":
            raise ValueError(f"{weights.name} is not a pixel-space system")
        self.weights, self.options = weights, options or Options()
        self.progress = progress
        self.name = weights.name
        self.shape, self.affine = weights.preset.shape, weights.preset.affine
        self.batch_size = 1 if self.options.batch_size is None else self.options.batch_size

    def __getstate__(self) -> dict[str, Any]:
        return {"weights": self.weights, "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        PixelDiffusion.__init__(self, **state)

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 over the weights and everything that changes what they give."""
        return digest_of(self.weights, self.options)

    @property
    def provenance(self) -> dict[str, str]:
        """How its volumes come about, as text."""
        return provenance_of(self.weights, self.options)

    @property
    def seconds_per_volume(self) -> float:
        """As measured, or guessed before the first volume."""
        step = self._step
        if not step.calls:
            return guess_seconds(self.weights.preset, self.options)
        return step.seconds / step.calls * len(self.options.solution(self.weights.preset))

    @property
    def report(self) -> dict[str, float]:
        """Milliseconds a volume takes per step, and the peak of memory in GB."""
        step = self._step
        return {
            "ms_per_step": 1e3 * step.seconds / max(step.calls, 1),
            "peak_gb": peak_bytes(self.options.place) / 1e9,
        }

    @torch.inference_mode()
    def sample(self, rows: pd.DataFrame) -> Tensor:
        """Make one volume per row.

        Parameters
        ----------
        rows
            With an integer column ``seed``; nothing else is read.

        Returns
        -------
        Tensor
            ``(n, 1, 192, 224, 192)`` float32 in [0, 1], on the device.
        """
        if not len(rows):
            return torch.empty((0, 1, *self.shape), device=self.options.place)
        low, high = self.weights.preset.value_range
        nothing = torch.empty((len(rows), 0))
        volumes = self._sampler.draw(as_seeds(rows["seed"]), nothing, self.progress).float()
        return volumes.sub_(low).div_(high - low).clamp_(0, 1)

    @property
    def _step(self) -> Timing:
        sampler = self.__dict__.get("_sampler")
        return Timing() if sampler is None else sampler.step

    @cached_property
    def _sampler(self) -> Sampler:
        preset, options = self.weights.preset, self.options
        unet = self.weights.network("unet")
        denoiser = prepare(unet, preset, self.weights.target, options, constants=0)
        return Sampler(denoiser, (1, *self.shape), options, preset.clip)
