"""Rigid registration of a head to the MNI152 template, and its resampling; needs SimpleITK.

By mutual information (Mattes et al., IEEE TMI 22, 2003) inside and around the brain of the
template that nilearn ships.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from generation.atlas import template_images
from generation.template import own_affine, template

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from generation.template import Image, Mask, Matrix

PERCENTILES = (0.1, 99.9)
"""Of intensities: what lies outside of them is clipped."""

LEVELS = (8.0, 4.0, 2.0)
"""Voxels that scans are registered at, mm, one level after the other."""

_SAMPLES = 100_000
_HEAD_MM = 150.0
"""Below this from the vertex is neck, which would drag the centre of mass down."""
_FLIP = np.diag((-1.0, -1.0, 1.0, 1.0))
"""RAS, as nibabel has it, to LPS, as ITK has it, and back."""
_TURNS = (0.0, 20.0, -20.0)
"""Degrees about each axis that registration starts from."""


def register(voxels: Image, affine: Matrix) -> Matrix:
    """Rigid transform from the template's world to the scan's, ``(4, 4)``, mm, RAS.

    Parameters
    ----------
    voxels
        ``(x, y, z)`` finite intensities of a T1-weighted head, in any orientation.
    affine
        ``(4, 4)`` voxel to world, mm, RAS, with axes at right angles.
    """
    low, high = np.percentile(voxels[::2, ::2, ::2], PERCENTILES)
    moving = _pyramid(to_itk(np.clip(voxels, float(low), float(high)), affine))
    fixed, mask, centre = _fixed()

    def refine(level: int, turns: list[Any]) -> list[Any]:
        both = fixed[level], moving[level]
        found = [_optimise(*both, mask, turn, LEVELS[level] / 2) for turn in turns]
        return [turn for _, turn in sorted(found, key=lambda pair: pair[0])]

    coarse = refine(0, _turned(_start(voxels, affine, centre)))
    found = refine(2, refine(1, coarse[:3])[:1])[0]
    lps = np.eye(4)
    lps[:3, :3] = np.reshape(found.GetMatrix(), (3, 3))
    lps[:3, 3] = np.array(found.TransformPoint((0.0, 0.0, 0.0)))
    return np.asarray(_FLIP @ lps @ _FLIP)


def resample(
    voxels: Image,
    affine: Matrix,
    shape: tuple[int, int, int],
    grid: Matrix,
    transform: Matrix,
) -> Image:
    """The scan on a grid by cubic B-splines; 0 outside of it, or its minimum if that is negative.

    Parameters
    ----------
    voxels, affine
        ``(x, y, z)`` intensities of the scan, and its ``(4, 4)`` voxel to world, mm, RAS.
    shape, grid
        Shape of the grid, and its ``(4, 4)`` voxel to world, mm, RAS.
    transform
        ``(4, 4)`` world of the grid to world of the scan, mm, RAS.
    """
    import SimpleITK

    rigid = SimpleITK.AffineTransform(3)
    lps = _FLIP @ transform @ _FLIP
    rigid.SetMatrix(lps[:3, :3].ravel().tolist())
    rigid.SetTranslation(lps[:3, 3].tolist())
    filter_ = SimpleITK.ResampleImageFilter()
    filter_.SetReferenceImage(to_itk(np.zeros(shape, np.uint8), grid))
    filter_.SetTransform(rigid)
    filter_.SetInterpolator(SimpleITK.sitkBSpline)
    filter_.SetOutputPixelType(SimpleITK.sitkFloat32)
    filter_.SetDefaultPixelValue(float(min(voxels.min(), 0)))
    return SimpleITK.GetArrayFromImage(filter_.Execute(to_itk(voxels, affine))).T


def to_itk(voxels: NDArray[Any], affine: Matrix) -> Any:
    """An array and its affine as a SimpleITK image.

    Parameters
    ----------
    voxels
        ``(x, y, z)``.
    affine
        ``(4, 4)`` voxel to world, mm, RAS, with axes at right angles.
    """
    import SimpleITK

    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(voxels.T))
    lps = _FLIP @ affine
    sizes = np.linalg.norm(lps[:3, :3], axis=0)
    left, _, right = np.linalg.svd(lps[:3, :3] / sizes)  # headers round; ITK wants right angles
    image.SetSpacing(sizes.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((left @ right).ravel().tolist())
    return image


def head_mask(values: Image) -> Mask:
    """The head with all it encloses: what is not dark, filled; never empty.

    Parameters
    ----------
    values
        ``(x, y, z)`` intensities.
    """
    from scipy import ndimage

    small = values[::2, ::2, ::2]
    low, high = np.percentile(small, (1.0, 99.0))
    bright = ndimage.binary_opening(small > low + 0.15 * (high - low))
    shut = ndimage.binary_closing(np.pad(bright, 4), iterations=4)[4:-4, 4:-4, 4:-4]
    filled = ndimage.binary_fill_holes(shut)
    labels, count = ndimage.label(filled)
    if count == 0:
        return np.ones(values.shape, dtype=bool)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    head = np.repeat(labels == sizes.argmax(), 2, 0).repeat(2, 1).repeat(2, 2)
    return np.asarray(head[tuple(slice(n) for n in values.shape)])


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep ITK to one thread: sums in another order would give another volume."""
    from SimpleITK import ProcessObject

    threads = ProcessObject.GetGlobalDefaultNumberOfThreads()
    ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        ProcessObject.SetGlobalDefaultNumberOfThreads(threads)


@lru_cache(maxsize=1)
def _fixed() -> tuple[list[Any], Any, Matrix]:
    """Pyramid and rim of the template for ITK, and the middle of the brain, mm, RAS."""
    half = own_affine() @ np.diag((2.0, 2.0, 2.0, 1.0))
    found = template((99, 117, 95), half)
    middle = half @ [*np.argwhere(found.brain).mean(axis=0), 1.0]
    mask = to_itk(found.rim.astype(np.uint8), half)
    return _pyramid(to_itk(template_images()[0], own_affine())), mask, middle[:3]


def _pyramid(image: Any) -> list[Any]:
    """The image with voxels of about each of :data:`LEVELS`."""
    import SimpleITK

    levels = []
    for size in reversed(LEVELS):
        blur = [max(0.42 * math.sqrt(max(size**2 - s**2, 0)), 0.05) for s in image.GetSpacing()]
        smooth = SimpleITK.SmoothingRecursiveGaussian(image, blur)
        image = SimpleITK.Shrink(smooth, [max(round(size / s), 1) for s in image.GetSpacing()])
        levels.append(image)
    return levels[::-1]


def _start(voxels: Image, affine: Matrix, centre: Matrix) -> Any:
    """Euler transform that puts the middle of the head, without the neck, onto the brain's."""
    import SimpleITK

    head = head_mask(voxels)
    every = 4 if head[::4, ::4, ::4].any() else 1
    places = np.argwhere(head[::every, ::every, ::every]) * float(every)
    world = places @ affine[:3, :3].T + affine[:3, 3]
    top = np.percentile(world[:, 2], 99.8)
    middle = world[world[:, 2] > top - _HEAD_MM].mean(axis=0)
    start = SimpleITK.Euler3DTransform()
    start.SetCenter((_FLIP[:3, :3] @ centre).tolist())
    shift = _FLIP[:3, :3] @ (middle - centre)
    start.SetTranslation(shift.round(2).tolist())  # sums differ in their last bits between runs
    return start


def _turned(start: Any) -> list[Any]:
    """The start, and the start turned about each axis."""
    import SimpleITK

    turns = {tuple(angle * (axis == k) for k in range(3)) for axis in range(3) for angle in _TURNS}
    found = []
    for turn in sorted(turns):
        copy = SimpleITK.Euler3DTransform(start)
        copy.SetRotation(*np.radians(turn).tolist())
        found.append(copy)
    return found


def _optimise(fixed: Any, moving: Any, mask: Any, start: Any, step: float) -> tuple[float, Any]:
    """One level: the metric reached (less is better), and the transform."""
    import SimpleITK

    method = SimpleITK.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    method.SetMetricFixedMask(mask)
    many = fixed.GetNumberOfPixels() > _SAMPLES
    method.SetMetricSamplingStrategy(method.REGULAR if many else method.NONE)
    method.SetMetricSamplingPercentage(min(_SAMPLES / fixed.GetNumberOfPixels(), 1.0), 1)
    method.SetInterpolator(SimpleITK.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(step, 0.005, 100, relaxationFactor=0.6)
    method.SetOptimizerScalesFromPhysicalShift()
    found = SimpleITK.Euler3DTransform(start)
    method.SetInitialTransform(found, inPlace=True)
    method.Execute(fixed, moving)
    return float(method.GetMetricValue()), found
