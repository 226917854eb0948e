"""How good a prepared scan is: measures against the MNI152 template, and their limits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from generation.registration import head_mask
from generation.template import template

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from generation.template import Image, Matrix, Template

MIN_SIMILARITY = 1.04
MIN_CORRELATION = 0.3
MIN_CONTRAST = 0.4
MIN_COVERAGE = 0.95
MAX_CUT = 0.7
"""Limits of :class:`Measures`; docs/prepare.md says what they were measured on."""

_SMOOTH_MM = 2.0


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What is known of a prepared scan.

    Parameters
    ----------
    similarity
        Normalised mutual information with the template in and around the brain, 1 (none) to 2.
        For this and the next both are smoothed (sigma 2 mm).
    correlation
        Pearson's, with the template, inside its outline.
    contrast
        White minus grey matter, in units of the spread of both; negative when not T1-weighted.
    coverage
        Part of the template's brain that lies inside the scan, 0 to 1.
    cut
        Part of the head that lies outside the grid, 0 to 1; neck and ears always do.
    low, high
        Intensities of the scan that became 0 and 1.
    rotation
        Degrees the head was turned by.
    shift
        Millimetres the middle of the grid was moved by.
    """

    similarity: float
    correlation: float
    contrast: float
    coverage: float
    cut: float
    low: float
    high: float
    rotation: float
    shift: float

    def problem(self) -> str | None:
        """Why the scan should not be used, or None."""
        limits = (
            ("coverage of the brain", self.coverage, MIN_COVERAGE),
            ("similarity to the template", self.similarity, MIN_SIMILARITY),
            ("correlation with the template", self.correlation, MIN_CORRELATION),
            ("contrast of white and grey matter", self.contrast, MIN_CONTRAST),
        )
        for what, found, least in limits:
            if not found >= least:
                return f"{what} is {found:.3f}, expected at least {least}; look at the scan"
        if self.cut > MAX_CUT:
            return f"{self.cut:.0%} of the head is outside the grid, expected at most {MAX_CUT:.0%}"
        return None


def measure(
    volume: Image,
    voxels: Image,
    affine: Matrix,
    grid: Matrix,
    transform: Matrix,
    *,
    low: float,
    high: float,
) -> Measures:
    """Measure a scan and what it became.

    Parameters
    ----------
    volume, grid
        The scan on the grid, ``(x, y, z)`` in [0, 1]; its ``(4, 4)`` voxel to world, mm, RAS.
    voxels, affine
        The scan as it came, ``(x, y, z)``; its ``(4, 4)`` voxel to world, mm, RAS.
    transform
        ``(4, 4)`` world of the template to world of the scan, mm, RAS; rigid.
    low, high
        Intensities of the scan that became 0 and 1.
    """
    found = template(volume.shape, grid)
    ours, theirs = (_smooth(image, grid) for image in (volume, found.t1))
    inside = found.t1 > 0
    middle = grid @ [*np.divide(volume.shape, 2), 1.0]
    head = np.argwhere(head_mask(voxels)[::3, ::3, ::3]) * 3
    values = {
        "similarity": _similarity(ours[found.rim], theirs[found.rim]),
        "correlation": float(np.corrcoef(ours[inside], theirs[inside])[0, 1]),
        "contrast": _contrast(volume, found),
        "coverage": _inside(np.argwhere(found.brain), grid, transform, affine, voxels.shape),
        "cut": 1 - _inside(head, affine, np.linalg.inv(transform), grid, volume.shape),
        "low": low,
        "high": high,
        "rotation": _angle(transform),
        "shift": float(np.linalg.norm((transform @ middle - middle)[:3])),
    }
    return Measures(**{name: round(value, 6) for name, value in values.items()})


def _smooth(image: Image, grid: Matrix) -> Image:
    """Without most of the noise, which would hide how well two images fit."""
    from scipy import ndimage

    sigmas = _SMOOTH_MM / np.linalg.norm(grid[:3, :3], axis=0)
    return np.asarray(ndimage.gaussian_filter(image, sigmas))


def _angle(transform: Matrix) -> float:
    """Degrees that a rigid transform turns by."""
    turn = np.trace(transform[:3, :3])
    return math.degrees(math.acos(float(np.clip((turn - 1) / 2, -1, 1))))


def _inside(
    places: NDArray[np.intp],
    affine: Matrix,
    transform: NDArray[np.floating[Any]],
    other: Matrix,
    shape: tuple[int, ...],
) -> float:
    """Part of some voxels ``(n, 3)`` that lies inside another image."""
    chain = np.linalg.inv(other) @ transform @ affine
    found = places @ chain[:3, :3].T + chain[:3, 3]
    return float(((found > -0.5) & (found < np.array(shape) - 0.5)).all(axis=1).mean())


def _similarity(one: Image, other: Image) -> float:
    """Normalised mutual information (Studholme et al., Pattern Recognition 32, 1999)."""
    counts, _, _ = np.histogram2d(one, other, bins=48)
    joint = counts / counts.sum()
    apart = _entropy(joint.sum(axis=0)) + _entropy(joint.sum(axis=1))
    return apart / max(_entropy(joint), 1e-12)


def _entropy(shares: NDArray[np.float64]) -> float:
    some = shares[shares > 0]
    return float(-(some * np.log(some)).sum())


def _contrast(volume: Image, found: Template) -> float:
    grey, white = volume[found.grey > 0.8], volume[found.white > 0.9]
    spread = math.sqrt((float(grey.var()) + float(white.var())) / 2)
    return (float(np.median(white)) - float(np.median(grey))) / max(spread, 1e-6)
