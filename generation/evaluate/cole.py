"""The network of Cole et al. 2017, which tells age from a volume."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

from generation.errors import EvaluationError


class ColeNetwork(nn.Module):
    """Blocks of two convolutions that halve a volume, and a line from what is left to the outputs.

    A block is a convolution of 3³ voxels, ReLU, another such convolution, norm, ReLU, and the
    maximum of 2³ voxels (Cole et al. 2017, NeuroImage 163:115-124, sec. 2.4.1).

    Parameters
    ----------
    shape
        Voxels of a volume, ``(x, y, z)``.
    channels
        Of each block; published are 8, 16, 32, 64, 128.
    outputs
        How many numbers are predicted; published is one.
    norm
        ``"batch"`` as published, or ``"instance"``.
    downsample
        Volumes are averaged over so many voxels along each axis first; published is 1.

    Notes
    -----
    Convolutions before a norm have no bias: the norm would take it out again, and Adam would
    enlarge the rounding errors that are its gradient. Odd sides lose a voxel where they are halved.
    """

    def __init__(
        self,
        shape: Sequence[int],
        channels: Sequence[int],
        outputs: int = 1,
        norm: str = "batch",
        downsample: int = 1,
    ) -> None:
        super().__init__()
        self.shape, self.downsample = tuple(shape), downsample
        self.blocks = nn.Sequential(*(_block(a, b, norm) for a, b in pairwise((1, *channels))))
        left = math.prod(side // downsample // 2 ** len(channels) for side in shape)
        self.end = nn.Linear(channels[-1] * left, outputs)

    def forward(self, volumes: Tensor) -> Tensor:
        """Outputs ``(n, k)`` of volumes ``(n, 1, x, y, z)``; no activation at the end.

        Raises
        ------
        EvaluationError
            The volumes have another shape.
        """
        if tuple(volumes.shape[1:]) != (1, *self.shape):
            raise EvaluationError(
                f"the regressor takes volumes of {(1, *self.shape)}, found "
                f"{tuple(volumes.shape[1:])}; cut or fill them"
            )
        if self.downsample > 1:
            volumes = functional.avg_pool3d(volumes, self.downsample)
        return self.end(self.blocks(volumes).flatten(1))


def _block(before: int, after: int, norm: str) -> nn.Sequential:
    last = nn.BatchNorm3d(after) if norm == "batch" else nn.InstanceNorm3d(after, affine=True)
    return nn.Sequential(
        nn.Conv3d(before, after, 3, padding=1),
        nn.ReLU(),
        nn.Conv3d(after, after, 3, padding=1, bias=False),
        last,
        nn.ReLU(),
        nn.MaxPool3d(2),
    )
