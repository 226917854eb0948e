"""4-G-R-SSIM: structural similarity of gradients, pooled over four kinds of region.

Gradients after Chen, Yang & Xie 2006; regions after Li & Bovik 2010 (in the form of the authors'
code: a voxel whose gradient is strong in one volume only is a changed edge); r and "star" forms
after Rouse & Hemami 2008. Pinaya et al. 2022 print neither the form nor whether scales are
combined, so that all six are here, under names that say which they are.

The first volume is the reference: its strongest gradient sets the thresholds of the regions. The
measure is therefore not symmetric.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from generation.errors import EvaluationError
from generation.evaluate.multiscale import (
    WEIGHTS,
    WINDOW,
    Moments,
    MultiScale,
    Slab,
    Window,
    over_scales,
)

Form = Literal["kcl-star", "star", "r"]
Scales = Literal["single", "multi"]

FORMS: tuple[Form, ...] = ("kcl-star", "star", "r")
SCALES: tuple[Scales, ...] = ("single", "multi")

_Pair = tuple[Tensor, Tensor]
"""Local mean and variance."""

_STRONG, _WEAK = 0.12, 0.06
_REGIONS = 4
_CONSTANT = 1e-6
_KCL_EPSILON = 1e-5


class Level(NamedTuple):
    """A volume at one scale: intensity mean, gradient and its moments, strongest gradient."""

    luminance: Tensor
    gradient: Moments
    strongest: Tensor


def gradient(image: Tensor) -> Tensor:
    """Sum over the axes of the absolute central difference (Chen et al. 2006, equation 1, in 3-D).

    Differences of voxels two apart are averaged over the 3 x 3 plane across the axis, the middle
    counting twice, and halved: a slope of 1 per voxel along one axis gives 1.

    Parameters
    ----------
    image
        ``(n, x, y, z)``.

    Returns
    -------
    Tensor
        ``(n, x - 2, y - 2, z - 2)``, not below 0.
    """
    total = torch.zeros_like(image[:, 1:-1, 1:-1, 1:-1])
    for axis in (1, 2, 3):
        step = image.narrow(axis, 2, image.shape[axis] - 2)
        step = step - image.narrow(axis, 0, image.shape[axis] - 2)
        plane = step
        for other in {1, 2, 3} - {axis}:
            length = step.shape[other] - 2
            plane = sum(plane.narrow(other, k, length) for k in range(3))  # type: ignore[assignment]
            step = step.narrow(other, 1, length)
        total += (plane + step).abs_()
    return total.mul_(0.05)


class GradientSsim(MultiScale[Level]):
    """4-G-R-SSIM in several variants, computed together.

    Forms:

    - ``"kcl-star"``: luminance, contrast and structure with their constants, as in SSIM; structure
      is 0 where the gradient vanishes in exactly one of the windows. The form of the code of
      Pinaya et al.'s group, with its ``1e-5`` of the mean square under the root of the deviations.
    - ``"star"``: the same terms without constants (Rouse & Hemami 2008, equations 6 to 8). A term
      whose denominator is 0 is 1; structure is 0 where exactly one window is constant.
    - ``"r"``: structure of the star form alone.

    ``"single"`` is the mean at full size. ``"multi"`` is the product over scales, raised to the
    weights of MS-SSIM, without luminance at all scales but the coarsest.

    The score of a scale is the mean over regions of the mean inside each; regions without voxels
    do not count, and scores below 0 count as 0. A window whose gradients vary by less than 0.1 %
    of their root mean square counts as constant in the star forms: float32 cannot tell.

    Parameters
    ----------
    variants
        Which, as (scales, form).
    window
        The Gaussian window.
    weights
        Exponents of the scales of ``"multi"``, finest first.
    data_range
        Difference of the largest and the smallest intensity there may be.

    Raises
    ------
    EvaluationError
        A variant is unknown, there is none, there are no weights, or the range is not above 0.
    """

    lost = 2

    def __init__(
        self,
        variants: Sequence[tuple[Scales, Form]] = tuple(product(SCALES, FORMS)),
        *,
        window: Window = WINDOW,
        weights: Sequence[float] = WEIGHTS,
        data_range: float = 1.0,
    ) -> None:
        known = set(product(SCALES, FORMS))
        if not variants or not set(variants) <= known:
            raise EvaluationError(
                f"found variants {list(variants)}, expected some of {sorted(known)}"
            )
        super().__init__(weights, window, data_range)
        self.variants = tuple(variants)
        self.names = tuple(name(scales, form) for scales, form in self.variants)
        self._forms = tuple(form for form in FORMS if any(form == f for _, f in self.variants))

    @property
    def n_scales(self) -> int:
        """How many: one if no variant is of several."""
        return len(self.weights) if any(scales == "multi" for scales, _ in self.variants) else 1

    @property
    def settings(self) -> str:
        """All that the values depend on, as text."""
        window = [self.window.size, self.window.sigma]
        return json.dumps(["4-g-r-ssim", 1, self.names, window, self.weights, self.data_range])

    def _level(self, image: Tensor) -> Level:
        steep = gradient(image)
        luminance = self.window.moments(image[:, 1:-1, 1:-1, 1:-1]).mean
        return Level(luminance, self.window.moments(steep), steep.amax((1, 2, 3)))

    def _values(self, first: list[Level], second: list[Level]) -> dict[str, Tensor]:
        scores = [self._scores(x, y) for x, y in zip(first, second, strict=True)]
        return {
            name(scales, form): self._combined(scores, scales, form)
            for scales, form in self.variants
        }

    def _combined(self, scores: list[dict[str, Tensor]], scales: Scales, form: Form) -> Tensor:
        whole = [score[form] for score in scores]
        if scales == "single":
            return whole[0]
        parts = [score[f"{form} without luminance"] for score in scores]
        return over_scales([*parts[:-1], whole[-1]], self.weights)

    def _scores(self, x: Level, y: Level) -> dict[str, Tensor]:
        """Scores ``(n,)`` of one scale, with and without luminance."""
        device = x.luminance.device
        sums: dict[str, Tensor] = {}
        counts = torch.zeros(len(x.luminance), _REGIONS, dtype=torch.float64, device=device)
        for slab in self.window.slabs(x.gradient.image):
            regions = self._regions(x, y, slab.inner)
            counts += regions.sum((2, 3, 4), dtype=torch.float64)
            for key, values in self._maps(x, y, slab).items():
                found = (values[:, None] * regions).sum((2, 3, 4), dtype=torch.float64)
                sums[key] = sums[key] + found if key in sums else found
        there = (counts > 0).sum(1)
        return {
            key: ((total / counts.clamp(min=1)).sum(1) / there).clamp(min=0)
            for key, total in sums.items()
        }

    def _regions(self, x: Level, y: Level, planes: slice) -> Tensor:
        """Preserved edges, changed edges, smooth parts, texture ``(n, 4, x, y, z)``."""
        half = self.window.size // 2
        _, depth, *across = x.luminance.shape
        start, stop, _ = planes.indices(depth)
        rows, columns = (slice(half, half + side) for side in across)
        box = (slice(None), slice(start + half, stop + half), rows, columns)
        gx, gy = x.gradient.image[box], y.gradient.image[box]
        strongest = x.strongest[:, None, None, None]
        strong_x, strong_y = gx > _STRONG * strongest, gy > _STRONG * strongest
        preserved, changed = strong_x & strong_y, strong_x ^ strong_y
        smooth = (gx < _WEAK * strongest) & ~strong_y
        texture = ~(preserved | changed | smooth)
        return torch.stack([preserved, changed, smooth, texture], 1)

    def _maps(self, x: Level, y: Level, slab: Slab) -> dict[str, Tensor]:
        """What is pooled, by form."""
        inner, xy = slab.inner, self.window.covariance(x.gradient, y.gradient, slab)
        found: dict[str, Tensor] = {}
        light = (x.luminance[:, inner], y.luminance[:, inner])
        moment_x = (x.gradient.mean[:, inner], x.gradient.variance[:, inner])
        moment_y = (y.gradient.mean[:, inner], y.gradient.variance[:, inner])
        if "kcl-star" in self._forms:
            c1, c2 = (0.01 * self.data_range) ** 2, (0.03 * self.data_range) ** 2
            part = _kcl_terms(moment_x, moment_y, xy, c2=c2)
            found["kcl-star without luminance"] = part
            found["kcl-star"] = part * _likeness(*light, c1)
        if "star" in self._forms or "r" in self._forms:
            sx, sy = _deviation(*moment_x), _deviation(*moment_y)
            r = _star(xy, sx * sy).clamp_(-1, 1)
            r = torch.where((sx == 0) & (sy == 0), 1.0, torch.where(sx * sy == 0, 0.0, r))
            if "r" in self._forms:
                found["r"] = found["r without luminance"] = r
            if "star" in self._forms:
                found["star without luminance"] = part = _likeness(sx, sy, 0.0) * r
                found["star"] = part * _likeness(*light, 0.0)
        return found


def name(scales: Scales, form: Form) -> str:
    """What a variant is called: ``4-g-r-ssim/multi/star``."""
    return f"4-g-r-ssim/{scales}/{form}"


def gradient_ssim(
    reference: Tensor,
    other: Tensor,
    *,
    scales: Scales,
    form: Form,
    window: Window = WINDOW,
    weights: Sequence[float] = WEIGHTS,
    data_range: float = 1.0,
) -> Tensor:
    """4-G-R-SSIM of volumes in one variant; see :class:`GradientSsim`.

    Parameters
    ----------
    reference
        ``(n, 1, x, y, z)`` floats; its gradients set the regions.
    other
        The same shape. Not symmetric in the two.
    scales, form, window, weights, data_range
        As in :class:`GradientSsim`.

    Returns
    -------
    Tensor
        ``(n,)`` float32 in [0, 1].

    Raises
    ------
    EvaluationError
        Shapes differ or are too small, voxels are not finite, or the variant is unknown.
    """
    measure = GradientSsim([(scales, form)], window=window, weights=weights, data_range=data_range)
    values = measure.compare(measure.prepare(reference), measure.prepare(other))
    return values[name(scales, form)]


def _kcl_terms(x: _Pair, y: _Pair, xy: Tensor, *, c2: float) -> Tensor:
    """Contrast times structure, with constants; 0 where one gradient vanishes and one does not."""
    sx, sy = _raised(*x), _raised(*y)
    contrast = (2 * sx * sy + c2) / (x[1] + y[1] + c2)
    structure = (xy + c2 / 2) / (sx * sy + c2 / 2)
    return contrast * structure * ((sx == 0) == (sy == 0))


def _raised(mean: Tensor, variance: Tensor) -> Tensor:
    """Deviation with a part of the mean square under the root."""
    return (variance + _KCL_EPSILON * (variance + 2 * mean.square()) / 2).sqrt()


def _deviation(mean: Tensor, variance: Tensor) -> Tensor:
    """Deviation, exactly 0 where the window is constant."""
    return torch.where(variance <= _CONSTANT * (variance + mean.square()), 0.0, variance).sqrt()


def _likeness(a: Tensor, b: Tensor, constant: float) -> Tensor:
    """``(2ab + C) / (a² + b² + C)``; 1 where the denominator is 0."""
    below = a.square() + b.square() + constant
    return _star(2 * a * b + constant, below) if constant == 0 else (2 * a * b + constant) / below


def _star(above: Tensor, below: Tensor) -> Tensor:
    """A quotient that is 1 where the denominator is 0."""
    zero = below == 0
    return torch.where(zero, 1.0, above / torch.where(zero, 1.0, below))
