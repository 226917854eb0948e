"""Smooth warps of volumes: looking fields up at points, random bends, and flows, in torch."""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Grid(NamedTuple):
    """Where a field's samples lie: world position (mm) of the first one, and their spacing (mm).

    The spacing is signed per axis: a volume stored right to left has a negative one along x.
    """

    origin: tuple[float, float, float]
    step: tuple[float, float, float]


def positions(grid: Grid, shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """World coordinates of a grid's samples, ``(1, 3, x, y, z)`` float32, mm."""
    axes = [
        origin + step * torch.arange(n, device=device, dtype=torch.float32)
        for origin, step, n in zip(grid.origin, grid.step, shape, strict=True)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def look_up(field: Tensor, grid: Grid, points: Tensor) -> Tensor:
    """Trilinear values of a field at points; beyond its border the border's value.

    Parameters
    ----------
    field
        ``(c, x, y, z)``, or ``(n, c, x, y, z)`` with one field per row of ``points``.
    grid
        Where the field's samples lie.
    points
        ``(n, 3, x', y', z')`` world coordinates, mm.

    Returns
    -------
    Tensor
        ``(n, c, x', y', z')``.
    """
    shaped = (1, 3, 1, 1, 1)
    device = points.device
    origin = torch.tensor(grid.origin, dtype=torch.float32, device=device).view(shaped)
    sides = [step * (n - 1) for step, n in zip(grid.step, field.shape[-3:], strict=True)]
    extent = torch.tensor(sides, dtype=torch.float32, device=device).view(shaped)
    relative = (points - origin) * (2 / extent) - 1
    where = relative.flip(1).permute(0, 2, 3, 4, 1)  # grid_sample names the last axis first
    many = field if field.dim() == 5 else field.expand(len(points), *field.shape)
    return F.grid_sample(many, where, padding_mode="border", align_corners=True)


def exponential(
    velocity: Tensor, grid: Grid, time: Tensor, *, squarings: int = 4, steps: int = 8
) -> Tensor:
    """Displacements after flowing along a stationary velocity field.

    Scaling and squaring gives the flow over a short time; points are then carried along it step by
    step, which keeps strong contractions free of folds where squaring alone does not.

    Parameters
    ----------
    velocity
        ``(3, x, y, z)``, mm per unit of time.
    grid
        Where its samples lie.
    time
        ``(n,)``; negative flows backwards.
    squarings, steps
        The flow over ``time / steps`` is squared up from ``time / steps / 2**squarings``.

    Returns
    -------
    Tensor
        ``(n, 3, x, y, z)`` displacements, mm; ``x + displacement(x)`` is a diffeomorphism.

    References
    ----------
    Arsigny et al., "A Log-Euclidean Framework for Statistics on Diffeomorphisms", MICCAI 2006.
    """
    shape = (velocity.shape[1], velocity.shape[2], velocity.shape[3])
    here = positions(grid, shape, velocity.device)
    step = velocity * (time / steps / 2**squarings).view(-1, 1, 1, 1, 1)
    for _ in range(squarings):
        step = step + look_up(step, grid, here + step)
    moved = step
    for _ in range(steps - 1):
        moved = moved + look_up(step, grid, here + moved)
    return moved


def spread(knots: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """A cubic B-spline field through a box: knots ``(n, c, i, j, k)`` to ``(n, c, *shape)``.

    White unit knots give a field with a standard deviation of about 0.35. Weighted sums of four
    knots, not matrix products: those differ in the last bit with the number of threads.
    """
    for axis, n in reversed(list(enumerate(shape, start=2))):
        knots = _through(knots, n, axis)
    return knots


def _through(knots: Tensor, n: int, axis: int) -> Tensor:
    """The spline at ``n`` evenly spaced points of one axis."""
    first, weights = _basis(n, knots.shape[axis])
    aligned = [-1 if dim == axis else 1 for dim in range(knots.dim())]
    parts = (
        knots.index_select(axis, (first + offset).to(knots.device)).mul_(
            weight.to(knots).view(aligned)
        )
        for offset, weight in enumerate(weights.unbind(1))
    )
    return reduce(Tensor.add_, parts)


def _basis(n: int, knots: int) -> tuple[Tensor, Tensor]:
    """First of the four knots that bear on each of ``n`` points, ``(n,)``; weights, ``(n, 4)``."""
    at = torch.linspace(0, knots - 3, n, dtype=torch.float64)
    first = at.floor().clamp(max=knots - 4)
    u = at - first
    weights = [(1 - u) ** 3, 3 * u**3 - 6 * u**2 + 4, -3 * u**3 + 3 * u**2 + 3 * u + 1, u**3]
    return first.long(), torch.stack(weights, dim=1) / 6
