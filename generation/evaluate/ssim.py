"""Structural similarity of volumes: SSIM and MS-SSIM.

Sources: Wang, Bovik, Sheikh & Simoncelli 2004 (SSIM) and Wang, Simoncelli & Bovik 2003 (MS-SSIM),
with the window of Pinaya et al. 2022's group: 7 voxels, standard deviation 1.5.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from generation.evaluate.multiscale import (
    WEIGHTS,
    WINDOW,
    Moments,
    MultiScale,
    Window,
    over_scales,
)


class Ssim(MultiScale[Moments]):
    """SSIM and MS-SSIM, computed together.

    MS-SSIM is the mean of contrast times structure of all scales but the coarsest, and the mean of
    all three terms of that, raised to their weights and multiplied. Negative means count as 0.

    Parameters
    ----------
    weights
        Exponents of the scales, finest first; their number is the number of scales.
    window
        The Gaussian window.
    data_range
        Difference of the largest and the smallest intensity there may be.

    Raises
    ------
    EvaluationError
        There are no weights, or the range is not above 0.
    """

    names = ("ssim", "ms-ssim")

    def __init__(
        self,
        weights: Sequence[float] = WEIGHTS,
        window: Window = WINDOW,
        data_range: float = 1.0,
    ) -> None:
        super().__init__(weights, window, data_range)

    @property
    def settings(self) -> str:
        """All that the values depend on, as text."""
        window = [self.window.size, self.window.sigma]
        return json.dumps(["ssim", 1, self.weights, window, self.data_range])

    def _level(self, image: Tensor) -> Moments:
        return self.window.moments(image)

    def _values(self, first: list[Moments], second: list[Moments]) -> dict[str, Tensor]:
        last = self.n_scales - 1
        means = [
            self._means(x, y, luminance=scale in (0, last))
            for scale, (x, y) in enumerate(zip(first, second, strict=True))
        ]
        terms = [part for _, part in means[:-1]] + [means[-1][0]]
        return {"ssim": means[0][0], "ms-ssim": over_scales(terms, self.weights)}

    def _means(self, x: Moments, y: Moments, *, luminance: bool) -> tuple[Tensor, Tensor]:
        """Means ``(n,)`` of all three terms, where wanted, and of contrast times structure."""
        c1, c2 = (0.01 * self.data_range) ** 2, (0.03 * self.data_range) ** 2
        full = torch.zeros(len(x.image), dtype=torch.float64, device=x.image.device)
        part = torch.zeros_like(full)
        for slab in self.window.slabs(x.image):
            inner = slab.inner
            terms = self.window.covariance(x, y, slab).mul_(2).add_(c2)
            terms /= (x.variance[:, inner] + y.variance[:, inner]).add_(c2)
            part += terms.sum((1, 2, 3), dtype=torch.float64)
            if luminance:
                mx, my = x.mean[:, inner], y.mean[:, inner]
                terms *= (mx * my).mul_(2).add_(c1)
                terms /= (mx.square() + my.square()).add_(c1)
                full += terms.sum((1, 2, 3), dtype=torch.float64)
        voxels = x.mean[0].numel()
        return full / voxels, part / voxels


def ssim(
    first: Tensor,
    second: Tensor,
    *,
    window: Window = WINDOW,
    data_range: float = 1.0,
) -> Tensor:
    """Structural similarity (Wang et al. 2004), the mean over all voxels.

    Parameters
    ----------
    first, second
        ``(n, 1, x, y, z)`` floats; symmetric in them.
    window, data_range
        As in :class:`Ssim`.

    Returns
    -------
    Tensor
        ``(n,)`` float32, -1 to 1.

    Raises
    ------
    EvaluationError
        Shapes differ or are too small, or voxels are not finite.
    """
    measure = Ssim((1.0,), window, data_range)
    return measure.compare(measure.prepare(first), measure.prepare(second))["ssim"]


def ms_ssim(
    first: Tensor,
    second: Tensor,
    *,
    window: Window = WINDOW,
    data_range: float = 1.0,
    weights: Sequence[float] = WEIGHTS,
) -> Tensor:
    """Multi-scale structural similarity (Wang et al. 2003).

    Parameters
    ----------
    first, second
        ``(n, 1, x, y, z)`` floats; symmetric in them.
    window, data_range, weights
        As in :class:`Ssim`.

    Returns
    -------
    Tensor
        ``(n,)`` float32, 0 to 1.

    Raises
    ------
    EvaluationError
        Shapes differ or are too small, or voxels are not finite.
    """
    measure = Ssim(weights, window, data_range)
    return measure.compare(measure.prepare(first), measure.prepare(second))["ms-ssim"]
