"""Intensities of one set of volumes brought to those of another (Nyúl & Udupa 2000)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from synthbrain.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PERCENTILES = (1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 99)


@dataclass(frozen=True, eq=False)
class Landmarks:
    """Intensities that an image's histogram is moved to, piece by piece.

    Landmarks are the lowest value, percentiles 1, 10, 20 … 90, 99 of the voxels above the image's
    mean, which are mostly head, and the highest value. An image's own are mapped to these,
    linearly in between (Nyúl, Udupa & Zhang, "New variants of a method of MRI scale
    standardization", IEEE TMI 2000). Background stays the background of real images, and no voxel
    leaves their range.

    Parameters
    ----------
    values
        The 13 landmarks, ascending.

    Examples
    --------
    >>> bright = Landmarks.of([torch.linspace(0, 1, 1001) ** 0.5])
    >>> round(float(bright(torch.linspace(0, 1, 1001))[640]), 1)
    0.8
    """

    values: NDArray[np.float64]

    @classmethod
    def of(cls, images: Iterable[torch.Tensor]) -> Landmarks:
        """The mean landmarks of some images.

        Percentiles 10 to 90 are averaged on a common scale, where every image's percentiles 1 and
        99 are the mean ones.

        Raises
        ------
        UsageError
            No images, or not of a floating type.
        """
        each = np.array([_landmarks(image) for image in images])
        if not len(each):
            raise UsageError("landmarks take at least one image, found none")
        mean = each.mean(0)
        ends = mean[[1, -2]]
        mean[2:-2] = np.mean([np.interp(one[2:-2], one[[1, -2]], ends) for one in each], axis=0)
        return cls(mean)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """The image with its landmarks moved; of the same shape and type, a tensor of its own.

        Raises
        ------
        UsageError
            The image is not of a floating type.
        """
        own, group = np.unique(_landmarks(image), return_inverse=True)
        targets = np.bincount(group, self.values) / np.bincount(group)
        targets[0] = self.values[0]  # what is black stays so, all of an empty image too
        matched = np.interp(_values(image), own, targets)
        return image.clone().copy_(torch.from_numpy(matched))


def _landmarks(image: torch.Tensor) -> NDArray[np.float64]:
    values = _values(image)
    head = values[values > values.mean()]
    inner = np.percentile(head if len(head) else values, _PERCENTILES)
    return np.array([values.min(), *inner, values.max()], dtype=np.float64)


def _values(image: torch.Tensor) -> NDArray[np.float32]:
    if not image.is_floating_point():
        raise UsageError(
            f"intensities are matched as floats, found {image.dtype}; use dtype='float32'"
        )
    return torch.as_tensor(image.detach()).cpu().float().numpy()
