"""What similarities of volumes share: a Gaussian window, local moments, several scales.

What depends on one volume alone, such as its local means and variances at all scales, is computed
once (:meth:`MultiScale.prepare`); a pair then costs a single filter per scale. Filters are sums of
shifted slabs that stay in the cache: an order of magnitude faster than ``conv3d`` on a processor,
and float32 on a GPU, where convolutions would round to TF32.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from generation.errors import EvaluationError

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the scales, finest first (Wang et al. 2003, section 3.2)."""

_SLAB = 1 << 18
_FEWEST_PLANES = 8

_Level = TypeVar("_Level")


class Moments(NamedTuple):
    """A volume ``(n, x, y, z)``, and its local mean and variance where the window fits."""

    image: Tensor
    mean: Tensor
    variance: Tensor


class Slab(NamedTuple):
    """Planes of a filtered volume, and the planes of the volume they are made from."""

    inner: slice
    outer: slice


@dataclass(frozen=True)
class Window:
    """A Gaussian window.

    Parameters
    ----------
    size
        Voxels along each axis; odd.
    sigma
        Standard deviation, voxels.

    Raises
    ------
    EvaluationError
        The size is even or below 1, or the standard deviation is not above 0.
    """

    size: int = 7
    sigma: float = 1.5

    def __post_init__(self) -> None:
        if self.size < 1 or self.size % 2 == 0 or not self.sigma > 0:
            raise EvaluationError(
                f"a window of size {self.size} and sigma {self.sigma} cannot be: "
                "the size must be odd and sigma above 0"
            )

    def weights(self) -> list[float]:
        """What the voxels along one axis count; they sum to 1."""
        half = self.size // 2
        values = [math.exp(-(k**2) / (2 * self.sigma**2)) for k in range(-half, half + 1)]
        return [value / sum(values) for value in values]

    def slabs(self, image: Tensor) -> Iterator[Slab]:
        """Planes of the filtered volume, and the planes of ``image`` they are made from.

        On a processor few at a time, so that they stay in the cache.
        """
        halo = self.size - 1
        depth = image.shape[1] - halo
        plane = image.shape[0] * image.shape[2] * image.shape[3]
        step = max(_FEWEST_PLANES, _SLAB // plane) if image.device.type == "cpu" else depth
        for start in range(0, depth, step):
            stop = min(start + step, depth)
            yield Slab(slice(start, stop), slice(start, stop + halo))

    def smooth(self, image: Tensor) -> Tensor:
        """Weighted mean around each voxel whose whole window lies inside.

        Parameters
        ----------
        image
            ``(n, x, y, z)``.

        Returns
        -------
        Tensor
            ``(n, x - size + 1, y - size + 1, z - size + 1)``.
        """
        weights = self.weights()
        for axis in (1, 2, 3):
            length = image.shape[axis] - self.size + 1
            total = image.narrow(axis, 0, length) * weights[0]
            for k in range(1, self.size):
                total.add_(image.narrow(axis, k, length), alpha=weights[k])
            image = total
        return image

    def moments(self, image: Tensor) -> Moments:
        """Local mean and variance of volumes ``(n, x, y, z)``; the variance is never below 0."""
        sides = [side - self.size + 1 for side in image.shape[1:]]
        mean = image.new_empty((len(image), *sides))
        variance = torch.empty_like(mean)
        for inner, outer in self.slabs(image):
            part = image[:, outer]
            mean[:, inner] = self.smooth(part)
            square = self.smooth(part * part)
            variance[:, inner] = square.sub_(mean[:, inner].square()).clamp_(min=0)
        return Moments(image, mean, variance)

    def covariance(self, first: Moments, second: Moments, slab: Slab) -> Tensor:
        """Local covariance of two volumes on a slab of :meth:`slabs`."""
        inner, outer = slab
        product = self.smooth(first.image[:, outer] * second.image[:, outer])
        return product.sub_(first.mean[:, inner] * second.mean[:, inner])


WINDOW = Window()
"""Seven voxels, standard deviation 1.5."""


@dataclass(frozen=True)
class Prepared(Generic[_Level]):
    """What depends on volumes of one shape alone, finest scale first."""

    shape: tuple[int, ...]
    levels: list[_Level]


class MultiScale(ABC, Generic[_Level]):
    """A similarity of volumes at several scales: each volume alone, then pairs.

    Parameters
    ----------
    weights
        Exponents of the scales, finest first.
    window
        The Gaussian window.
    data_range
        Difference of the largest and the smallest intensity there may be.

    Raises
    ------
    EvaluationError
        There are no weights, or the range is not above 0.
    """

    lost = 0
    """Voxels along each axis that something else takes before the window."""

    def __init__(self, weights: Sequence[float], window: Window, data_range: float) -> None:
        if not weights or not data_range > 0:
            raise EvaluationError(
                f"found {len(weights)} weights and data range {data_range:g}, expected a weight a "
                "scale and a range above 0"
            )
        self.weights, self.window, self.data_range = tuple(weights), window, data_range

    @property
    def n_scales(self) -> int:
        """How many."""
        return len(self.weights)

    def prepare(self, volumes: Tensor) -> Prepared[_Level]:
        """What depends on one volume alone, by scale.

        Parameters
        ----------
        volumes
            ``(n, 1, x, y, z)`` floats. About four times as much is kept.

        Raises
        ------
        EvaluationError
            The volumes have another number of axes or channels, or are too small.
        """
        levels = pyramid(volumes, self.n_scales, self.window, lost=self.lost)
        return Prepared(tuple(volumes.shape), [self._level(image) for image in levels])

    def compare(self, first: Prepared[_Level], second: Prepared[_Level]) -> dict[str, Tensor]:
        """All values of prepared volumes; the first ones are the reference, if there is one.

        Returns
        -------
        dict
            ``(n,)`` float32 by name, at most 1.

        Raises
        ------
        EvaluationError
            The volumes differ in shape, or hold voxels that are not finite.
        """
        if first.shape != second.shape:
            raise EvaluationError(
                f"cannot compare volumes of shapes {first.shape} and {second.shape}; "
                "bring them onto one grid"
            )
        values = self._values(first.levels, second.levels)
        for name, value in values.items():
            if not value.isfinite().all():
                raise EvaluationError(
                    f"{name} is not finite: a volume holds NaN or infinite voxels; remove it"
                )
        return {name: value.float() for name, value in values.items()}

    @abstractmethod
    def _level(self, image: Tensor) -> _Level:
        """What depends on volumes ``(n, x, y, z)`` at one scale."""

    @abstractmethod
    def _values(self, first: list[_Level], second: list[_Level]) -> dict[str, Tensor]:
        """Values ``(n,)`` by name."""


def pyramid(volumes: Tensor, scales: int, window: Window, *, lost: int = 0) -> list[Tensor]:
    """Volumes at all scales, each the mean over 2 x 2 x 2 voxels of the one before.

    Parameters
    ----------
    volumes
        ``(n, 1, x, y, z)`` floats.
    scales
        How many.
    window
        Must fit into the coarsest.
    lost
        Voxels along each axis that something else takes before the window.

    Returns
    -------
    list of Tensor
        ``(n, x, y, z)`` float32, finest first.

    Raises
    ------
    EvaluationError
        The volumes have another number of axes or channels, or are too small.
    """
    if volumes.ndim != 5 or volumes.shape[1] != 1:
        raise EvaluationError(
            f"found volumes of shape {tuple(volumes.shape)}, expected (n, 1, x, y, z); "
            "add the axes that are missing"
        )
    least = (window.size + lost) * 2 ** (scales - 1)
    if min(volumes.shape[2:]) < least:
        raise EvaluationError(
            f"volumes of {tuple(volumes.shape[2:])} voxels are too small for {scales} scales and "
            f"a window of {window.size}: every side needs at least {least}; use fewer scales or "
            "a smaller window"
        )
    levels = [volumes[:, 0].float()]
    while len(levels) < scales:
        levels.append(F.avg_pool3d(levels[-1][:, None], 2)[:, 0])
    return levels


def over_scales(terms: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Product of the terms of all scales, raised to their weights; below 0 they count as 0."""
    powers = [term.clamp(min=0) ** weight for term, weight in zip(terms, weights, strict=True)]
    return torch.stack(powers).prod(0)
