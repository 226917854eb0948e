"""From a T1w scan of a head to a volume as the generators know them: registered, cropped, scaled.

Scans are interpolated once, from their own voxels to the grid, and keep skull and scalp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from generation.quality import Measures, measure
from generation.registration import PERCENTILES, head_mask, one_thread, register, resample

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from generation.template import Image, Matrix

VERSION = 1
"""Raise it whenever a line of this file, of ``registration.py``, of ``template.py`` or of
``quality.py`` changes a volume or a measure."""

VOXEL_MM = (0.3, 6.0)

_LARGEST = 2**29


class ScanError(ValueError):
    """A scan that cannot be used, and why."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A scan on the grid.

    Parameters
    ----------
    volume
        The grid's shape, intensities in [0, 1].
    transform
        ``(4, 4)`` world of the template to world of the scan, mm, RAS; rigid.
    measures
        Quality.
    """

    volume: Image
    transform: Matrix
    measures: Measures


def prepare(
    voxels: ArrayLike, affine: ArrayLike, shape: tuple[int, int, int], grid: ArrayLike
) -> Prepared:
    """Register a scan to the template and bring it onto a grid.

    Parameters
    ----------
    voxels
        ``(x, y, z)`` or ``(x, y, z, 1)`` intensities of a T1-weighted head, in any orientation.
    affine
        ``(4, 4)`` voxel to world of the scan, mm, RAS.
    shape, grid
        Shape of the grid, and its voxel to world, mm, RAS, in the template's space.

    Returns
    -------
    Prepared
        Whatever its quality: :meth:`generation.quality.Measures.problem` judges it.

    Raises
    ------
    ScanError
        Not a three-dimensional, finite, varying image with voxels of 0.3 to 6 mm, or nothing in it
        that could be registered.

    Notes
    -----
    The same scan gives the same volume: registration runs on one thread and samples regularly.
    """
    checked = check(voxels, affine)
    matrix = np.asarray(affine, dtype=np.float64)
    grid = np.asarray(grid, dtype=np.float64)
    try:
        with one_thread():
            transform = register(checked, matrix)
            values = resample(checked, matrix, shape, grid, transform)
    except RuntimeError as error:  # ITK's own, of many lines
        reason = " ".join(str(error).split()).rpartition("ERROR: ")[2][:200]
        raise ScanError(f"cannot be registered: {reason}") from None
    volume, low, high = _scaled(values)
    measures = measure(volume, checked, matrix, grid, transform, low=low, high=high)
    return Prepared(volume, transform, measures)


def check(voxels: ArrayLike, affine: ArrayLike) -> Image:
    """The voxels as ``(x, y, z)`` float32, if they can be a scan.

    Raises
    ------
    ScanError
        As :func:`prepare`.
    """
    array = np.asarray(voxels)
    matrix = np.asarray(affine, dtype=np.float64)
    check_shape(array.shape)
    if array.ndim == 4:
        array = array[..., 0]
    if not np.isfinite(matrix).all() or matrix.shape != (4, 4):
        raise ScanError("the affine is not 4 x 4 finite numbers; repair the header")
    sizes = np.linalg.norm(matrix[:3, :3], axis=0)
    if sizes.min() < VOXEL_MM[0] or sizes.max() > VOXEL_MM[1]:
        raise ScanError(
            f"voxels measure {' x '.join(f'{s:.3g}' for s in sizes)} mm, expected "
            f"{VOXEL_MM[0]} to {VOXEL_MM[1]}; repair the header"
        )
    axes = matrix[:3, :3] / sizes
    if not np.allclose(axes.T @ axes, np.eye(3), atol=1e-2):
        raise ScanError("the affine is sheared, expected right angles; resample the scan")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise ScanError(f"{bad:,} voxels are NaN or infinite, expected none; repair the scan")
    if array.min() == array.max():
        raise ScanError(f"every voxel is {array.flat[0]:g}, expected a head; leave the file out")
    return array


def check_shape(shape: tuple[int, ...]) -> None:
    """Refuse shapes no single scan has, before their voxels are read.

    Raises
    ------
    ScanError
        As :func:`prepare`.
    """
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] != 1):
        raise ScanError(f"has shape {shape}, expected one volume of three axes; split the file")
    if min(shape[:3]) < 16 or math.prod(shape) > _LARGEST:
        raise ScanError(f"has shape {shape}, expected 16 voxels or more an axis, 2^29 in all")


def _scaled(values: Image) -> tuple[Image, float, float]:
    """Intensities in [0, 1], and what became 0 and 1: percentiles of the head."""
    low, high = (float(v) for v in np.percentile(values[head_mask(values)], PERCENTILES))
    if not high > low:
        raise ScanError("the head has no contrast once registered; look at the scan")
    return np.clip((values - low) / (high - low), 0, 1).astype(np.float32), low, high
