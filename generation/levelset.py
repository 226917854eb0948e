"""Surfaces as level sets on a voxel grid: partial volumes, and shifts that make a volume exact."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

REACH = 6.0
"""Voxels either way within which a surface may be shifted."""

BINS_PER_VOXEL = 100


def ramp(distance: Tensor) -> Tensor:
    """Part of a voxel on the positive side of a surface at a distance in voxels."""
    return (distance + 0.5).clamp(0, 1)


def in_voxels(distance: Tensor) -> Tensor:
    """Distance in voxels of this grid, from a distance ``(n, x, y, z)`` in units of another."""
    slope = torch.stack(torch.gradient(distance, dim=(1, 2, 3))).square_().sum(0).sqrt_()
    return distance / slope.clamp_(min=0.15)


def shift_to_volume(distance: Tensor, weight: Tensor, volume: Tensor) -> Tensor:
    """How far to lower a level set so that a weighted volume lies above it.

    Solves ``sum(weight * ramp(distance - shift)) = volume`` for the shift, from one histogram.

    Parameters
    ----------
    distance
        ``(n, x, y, z)`` signed distance in voxels, positive above the surface.
    weight
        ``(n, x, y, z)`` part of each voxel that counts, in [0, 1].
    volume
        ``(n,)`` wanted volumes in voxels.

    Returns
    -------
    Tensor
        ``(n, 1, 1, 1)`` shifts in voxels, to about 0.005; the end of the range (5.5 either way) if
        none gives the volume.

    Examples
    --------
    >>> x = torch.arange(20.0).expand(1, 1, 1, 20) - 9.5
    >>> round(shift_to_volume(x, torch.ones_like(x), torch.tensor([12.0])).item(), 1)
    -2.0
    """
    shifts = [_shift(d, w, v) for d, w, v in zip(distance, weight, volume.tolist(), strict=True)]
    return torch.tensor(shifts, device=distance.device).view(-1, 1, 1, 1)


def _shift(distance: Tensor, weight: Tensor, volume: float) -> float:
    bins = int(2 * REACH * BINS_PER_VOXEL)
    index = ((distance + REACH) * BINS_PER_VOXEL).clamp_(0, bins - 1).long()
    histogram = torch.bincount(index.flatten(), weight.flatten().double(), minlength=bins).cpu()
    tail = histogram.flip(0).cumsum(0).flip(0)
    # A ramp is a step averaged over one voxel, and the volume above a step is the tail.
    sums = F.pad(tail.cumsum(0), (1, 0))
    above = (sums[BINS_PER_VOXEL:] - sums[:-BINS_PER_VOXEL]) / BINS_PER_VOXEL
    place = float(torch.searchsorted(-above, -volume).clamp(max=len(above) - 1))
    if place > 0 and above[int(place)] <= volume:
        before, here = above[int(place) - 1 : int(place) + 1].tolist()
        place -= (volume - here) / (before - here)
    return 0.5 - REACH + (place - 0.5) / BINS_PER_VOXEL  # a bin's distances lie half a bin in
