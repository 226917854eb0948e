"""From a T1w scan of a head to a volume as the generators know them: registered, cropped, scaled.

Registration is rigid, by mutual information (Mattes et al., IEEE TMI 22, 2003) inside and around
the brain of the MNI152 template that nilearn ships, and needs SimpleITK. Scans are interpolated
once, from their own voxels to the grid, and keep skull and scalp.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from generation.atlas import ORIGIN, TEMPLATE_FILES, template_folder

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Image = NDArray[np.float32]
    Matrix = NDArray[np.float64]
    Mask = NDArray[np.bool_]

VERSION = 1
"""Raise it whenever a line of this file changes a volume or a measure."""

VOXEL_MM = (0.3, 6.0)
PERCENTILES = (0.1, 99.9)
"""Of the head's intensities: what becomes 0 and what becomes 1."""

MIN_SIMILARITY = 1.04
MIN_CORRELATION = 0.3
MIN_CONTRAST = 0.4
MIN_COVERAGE = 0.95
MAX_CUT = 0.7
"""Limits of :class:`Measures`; docs/prepare.md says what they were measured on."""

LEVELS = (8.0, 4.0, 2.0)
"""Voxels that scans are registered at, mm, one level after the other."""

_LARGEST = 2**29
_SAMPLES = 100_000
_SMOOTH_MM = 2.0
_RIM_MM = 8
"""How far around the brain images are compared: skull and scalp tell size and place."""
_HEAD_MM = 150.0
"""Below this from the vertex is neck, which would drag the centre of mass down."""
_FLIP = np.diag((-1.0, -1.0, 1.0, 1.0))
"""RAS, as nibabel has it, to LPS, as ITK has it, and back."""
_TURNS = (0.0, 20.0, -20.0)
"""Degrees about each axis that registration starts from."""


class ScanError(ValueError):
    """A scan that cannot be used, and why."""


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


@dataclass(frozen=True, eq=False)
class Template:
    """The MNI152 template on a grid.

    Parameters
    ----------
    t1, grey, white
        Intensity, and share of grey and of white matter, of the grid's shape.
    brain, rim
        The brain, and what lies within 8 mm of it.
    """

    t1: Image
    grey: Image
    white: Image
    brain: Mask
    rim: Mask


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
        Whatever its quality: :meth:`Measures.problem` judges it.

    Raises
    ------
    ScanError
        Not a three-dimensional, finite, varying image with voxels of 0.3 to 6 mm.

    Notes
    -----
    The same scan gives the same volume: registration runs on one thread and samples regularly.
    """
    checked = check(voxels, affine)
    matrix = np.asarray(affine, dtype=np.float64)
    grid = np.asarray(grid, dtype=np.float64)
    with _one_thread():
        transform = register(checked, matrix)
        values = resample(checked, matrix, shape, grid, transform)
    head = head_mask(values)
    low, high = (float(v) for v in np.percentile(values[head], PERCENTILES))
    if not high > low:
        raise ScanError("the head has no contrast once registered; look at the scan")
    volume = np.clip((values - low) / (high - low), 0, 1).astype(np.float32)
    measures = _measure(volume, checked, matrix, grid, transform, low=low, high=high)
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


def register(voxels: Image, affine: Matrix) -> Matrix:
    """Rigid transform from the template's world to the scan's, ``(4, 4)``, mm, RAS.

    Parameters
    ----------
    voxels
        ``(x, y, z)`` as :func:`check` returns them.
    affine
        ``(4, 4)`` voxel to world, mm, RAS.
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
    """The scan on a grid by cubic B-splines, zero outside of it.

    Parameters
    ----------
    voxels, affine
        The scan, and its voxel to world, mm.
    shape, grid
        As in :func:`prepare`.
    transform
        World of the grid to world of the scan, mm, RAS.
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


@lru_cache(maxsize=2)
def template(shape: tuple[int, int, int], grid: tuple[tuple[float, ...], ...]) -> Template:
    """The template on a grid; arguments as in :func:`prepare`, the affine as tuples."""
    from scipy import ndimage

    step = np.array(grid)
    inverse = np.linalg.inv(_own_affine()) @ step
    t1, grey, white = (
        ndimage.affine_transform(image, inverse, output_shape=shape, order=1).astype(np.float32)
        for image in _images()
    )
    brain = grey + white > 0.5
    reach = max(round(_RIM_MM / float(np.linalg.norm(step[:3, 0]))), 1)
    rim = ndimage.binary_dilation(t1 > 0, iterations=reach)
    return Template(t1, grey, white, brain, rim)


def _images() -> tuple[Image, Image, Image]:
    """Template, grey and white matter in the template's own voxels, 1 mm, RAS."""
    import nibabel

    files = (template_folder() / TEMPLATE_FILES[tissue] for tissue in ("t1", "gm", "wm"))
    t1, grey, white = (np.asarray(nibabel.load(f).dataobj, dtype=np.float32) for f in files)  # type: ignore[attr-defined]
    return t1, grey / np.float32(255), white / np.float32(255)


def _own_affine() -> Matrix:
    matrix = np.eye(4)
    matrix[:3, 3] = ORIGIN
    return matrix


@lru_cache(maxsize=1)
def _fixed() -> tuple[list[Any], Any, Matrix]:
    """Pyramid and rim of the template for ITK, and the middle of the brain, mm, RAS."""
    half = _own_affine() @ np.diag((2.0, 2.0, 2.0, 1.0))
    found = template((99, 117, 95), tuple(map(tuple, half.tolist())))
    middle = half @ [*np.argwhere(found.brain).mean(axis=0), 1.0]
    mask = to_itk(found.rim.astype(np.uint8), half)
    return _pyramid(to_itk(_images()[0], _own_affine())), mask, middle[:3]


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

    places = np.argwhere(head_mask(voxels)[::4, ::4, ::4]) * 4.0
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


def _measure(
    volume: Image,
    voxels: Image,
    affine: Matrix,
    grid: Matrix,
    transform: Matrix,
    *,
    low: float,
    high: float,
) -> Measures:
    found = template(volume.shape, tuple(map(tuple, grid.tolist())))  # type: ignore[arg-type]
    ours, theirs = (_smooth(image, grid) for image in (volume, found.t1))
    inside = found.t1 > 0
    turn = np.trace(transform[:3, :3])
    middle = grid @ [*np.divide(volume.shape, 2), 1.0]
    cut = 1 - _inside(
        _sparse(head_mask(voxels)), affine, np.linalg.inv(transform), grid, volume.shape
    )
    values = {
        "similarity": _similarity(ours[found.rim], theirs[found.rim]),
        "correlation": float(np.corrcoef(ours[inside], theirs[inside])[0, 1]),
        "contrast": _contrast(volume, found),
        "coverage": _inside(np.argwhere(found.brain), grid, transform, affine, voxels.shape),
        "cut": cut,
        "low": low,
        "high": high,
        "rotation": math.degrees(math.acos(float(np.clip((turn - 1) / 2, -1, 1)))),
        "shift": float(np.linalg.norm((transform @ middle - middle)[:3])),
    }
    return Measures(**{name: round(value, 6) for name, value in values.items()})


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep ITK to one thread: sums in another order would give another volume."""
    from SimpleITK import ProcessObject

    threads = ProcessObject.GetGlobalDefaultNumberOfThreads()
    ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        ProcessObject.SetGlobalDefaultNumberOfThreads(threads)


def _smooth(image: Image, grid: Matrix) -> Image:
    """Without most of the noise, which would hide how well two images fit."""
    from scipy import ndimage

    sigmas = _SMOOTH_MM / np.linalg.norm(grid[:3, :3], axis=0)
    return np.asarray(ndimage.gaussian_filter(image, sigmas))


def _sparse(mask: Mask) -> NDArray[np.intp]:
    return np.argwhere(mask[::3, ::3, ::3]) * 3


def _inside(
    places: NDArray[np.intp], place: Matrix, transform: NDArray[Any], other: Matrix, shape: Any
) -> float:
    """Part of some voxels that lies inside another image."""
    chain = np.linalg.inv(other) @ transform @ place
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
