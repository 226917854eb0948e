"""Random changes to volumes: mirrored, moved, brighter or darker."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from generation.train.settings import Augmentation


def augmented(volumes: Tensor, how: Augmentation, draws: Sequence[torch.Generator]) -> Tensor:
    """Volumes after random changes, each decided by its own draw.

    Parameters
    ----------
    volumes
        ``(n, 1, x, y, z)`` in [0, 1]; the first axis of space runs left to right.
    how
        What to do.
    draws
        One source of randomness a volume; the same number of values is always taken.

    Returns
    -------
    Tensor
        The same shape, in [0, 1].
    """
    if how == Augmentation():
        return volumes
    changed = [_one(volume, how, draw) for volume, draw in zip(volumes, draws, strict=True)]
    return torch.stack(changed)


def _one(volume: Tensor, how: Augmentation, draw: torch.Generator) -> Tensor:
    chance = torch.rand(2, generator=draw)
    angles, shifts, size, power = (2 * torch.rand(8, generator=draw) - 1).split((3, 3, 1, 1))
    if chance[0] < how.flip:
        volume = volume.flip(1)
    if chance[1] < how.affine:
        turn = _rotation(angles * math.radians(how.degrees)) * (1 + how.scale * size)
        volume = _moved(volume, turn, shifts * how.voxels)
    if how.gamma:
        volume = volume ** (1 + how.gamma * float(power))
    return volume.clamp(0, 1)


def _rotation(angles: Tensor) -> Tensor:
    skew = torch.zeros(3, 3)
    skew[[2, 0, 1], [1, 2, 0]] = angles
    return torch.matrix_exp(skew - skew.T)


def _moved(volume: Tensor, turn: Tensor, shift: Tensor) -> Tensor:
    """Resampled about the middle; beyond the border the border's value."""
    size = torch.tensor(volume.shape[1:], dtype=torch.float32)
    scale = torch.diag(size)
    linear = torch.linalg.inv(scale) @ turn @ scale  # voxels to the grid's [-1, 1]
    offset = 2 * shift / size
    theta = torch.cat([linear.flip(0, 1), offset.flip(0)[:, None]], 1)
    grid = functional.affine_grid(theta[None], [1, 1, *volume.shape[1:]], align_corners=False)
    moved = functional.grid_sample(
        volume[None], grid.to(volume), padding_mode="border", align_corners=False
    )
    return moved[0]
