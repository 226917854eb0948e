"""Pixel-space diffusion: a U-Net draws volumes directly, without covariates.

The MedForj system of Remedios et al. 2025: 192 × 224 × 192 voxels of 1 mm, values in [-1, 1].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from generation.engine import Progress, as_seeds
from generation.options import Options
from generation.system import Checkpoint, DiffusionSystem

if TYPE_CHECKING:
    import pandas as pd


class PixelDiffusion(DiffusionSystem):
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

    kind = "pixel"
    honours: frozenset[str] = frozenset()

    def __init__(
        self,
        weights: Checkpoint,
        options: Options | None = None,
        *,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(weights, options, progress=progress)
        self.batch_size = self.options.batch_size or 1

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
        low, high = self.preset.value_range
        nothing = torch.empty((len(rows), 0))
        volumes = self._sampler.draw(as_seeds(rows["seed"]), nothing, self.progress).float()
        return volumes.sub_(low).div_(high - low).clamp_(0, 1)
