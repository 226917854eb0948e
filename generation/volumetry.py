"""Ventricular, brain and intracranial volume of a T1-weighted head, from the image alone.

A small classical pipeline: intensity classes, bias correction on white matter, connected
components, partial volumes. It knows nothing of how a volume was made, and so tells whether a
generator honours the volumes it was asked for. It relies on a closed skull and on ventricles walled
off from the cisterns, as the phantoms have them; it is no substitute for SynthSeg or SIENAX on
scans of people.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Image = NDArray[np.float32]
    Mask = NDArray[np.bool_]

REFERENCE_ICV = 2_050_000.0
"""Intracranial volume, mm³, that brain volumes are normalised to: the template's head has it."""

_CENTRE = (80, 112, 72)
_SMALLEST = 200
"""Voxels a dark region must have to be taken for a ventricle."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Volumes in mm³.

    Parameters
    ----------
    ventricular_volume
        Both lateral ventricles, in this head.
    brain_volume
        Grey and white matter, scaled to a head of :data:`REFERENCE_ICV`, in the manner of UK
        Biobank field 25009.
    intracranial_volume
        All that lies inside the skull.
    """

    ventricular_volume: float
    brain_volume: float
    intracranial_volume: float


def measure(volume: ArrayLike) -> Measurement:
    """Measure one head.

    Parameters
    ----------
    volume
        ``(160, 224, 160)`` or ``(1, 160, 224, 160)`` intensities in [0, 1], 1 mm, LAS.

    Returns
    -------
    Measurement
        Volumes in mm³.

    Raises
    ------
    ValueError
        The volume has another shape, or no ventricles were found in it.
    """
    image = np.asarray(volume, dtype=np.float32)
    if image.shape[-3:] != (160, 224, 160) or image.size != 160 * 224 * 160:
        raise ValueError(f"expected one volume of (160, 224, 160) voxels, found {image.shape}")
    image = image.reshape(image.shape[-3:])
    csf, grey, white = _classes(image)
    image = image / _shading(image, grey, white)
    csf, grey, _ = _classes(image)
    skull = _inside_skull(image, csf)
    brain = _above((image - csf) / (grey - csf)) * skull
    ventricles = _ventricles(image, csf, (image > (csf + grey) / 2), skull)
    intracranial = float(skull.sum(dtype=np.float64))
    return Measurement(
        ventricular_volume=float(ventricles.sum(dtype=np.float64)),
        brain_volume=float(brain.sum(dtype=np.float64)) * REFERENCE_ICV / intracranial,
        intracranial_volume=intracranial,
    )


def _classes(image: Image) -> tuple[float, float, float]:
    """Commonest intensity of CSF, grey and white matter, by k-means around the brain's middle."""
    from scipy import ndimage

    box = tuple(slice(c - r, c + r) for c, r in zip(_CENTRE, (42, 56, 40), strict=True))
    counts, edges = np.histogram(image[box], bins=256, range=(0.0, 1.0))
    counts = ndimage.gaussian_filter1d(counts.astype(np.float64), 2.0)
    values = (edges[1:] + edges[:-1]) / 2
    means = np.array((0.16, 0.5, 0.72))
    for _ in range(30):
        nearest = abs(values[:, None] - means).argmin(axis=1)
        mass = np.bincount(nearest, counts, 3)
        means = np.bincount(nearest, counts * values, 3) / np.maximum(mass, 1)
    csf, grey, white = (float(values[(counts * (nearest == k)).argmax()]) for k in range(3))
    return csf, grey, white


def _shading(image: Image, grey: float, white: float) -> Image:
    """Smooth gain that explains the spread of the white matter's intensities."""
    from scipy import ndimage

    small = image[::4, ::4, ::4]
    weight = ((small > (grey + white) / 2) & (small < white * 1.25)).astype(np.float32)
    box = tuple(slice(c // 4 - r, c // 4 + r) for c, r in zip(_CENTRE, (15, 20, 14), strict=True))
    inner = np.zeros_like(weight)
    inner[box] = weight[box]
    total = ndimage.gaussian_filter(inner, 6.0) + 1e-4
    gain = (ndimage.gaussian_filter(inner * small / white, 6.0) + 1e-4) / total
    return np.asarray(ndimage.zoom(gain, 4, order=1, grid_mode=True, mode="nearest"))


def _inside_skull(image: Image, csf: float) -> Mask:
    """What the dark inner table of the skull encloses."""
    from scipy import ndimage

    bright = image > 0.6 * csf
    core = ndimage.binary_erosion(bright, iterations=2)  # shuts what pinholes noise makes
    labels, _ = ndimage.label(core)
    inside = labels == labels[_CENTRE] if labels[_CENTRE] else labels == _commonest(labels)
    return np.asarray(ndimage.binary_dilation(inside, iterations=2, mask=bright))


def _ventricles(image: Image, csf: float, tissue: Mask, skull: Mask) -> Image:
    """Part of each voxel that lies in a lateral ventricle."""
    from scipy import ndimage

    dark = skull & ~tissue
    inner = next((found for shut in range(3) if (found := _lateral(dark, shut)).any()), None)
    if inner is None:
        raise ValueError("found no lateral ventricles: is this a head with a closed skull?")
    core = ndimage.binary_erosion(inner)
    rim = ndimage.binary_dilation(inner) & ~core & ~(dark & ~inner)
    around = ndimage.maximum_filter(image, size=5)
    return np.where(core, 1, _above((around - image) / np.maximum(around - csf, 0.05)) * rim)


def _lateral(dark: Mask, shut: int) -> Mask:
    """The lateral ventricles among dark regions, after shutting holes ``2 * shut`` voxels wide."""
    from scipy import ndimage

    narrow = ndimage.binary_erosion(dark, iterations=shut) if shut else dark
    labels, count = ndimage.label(narrow)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    candidates = [label for label in range(1, count + 1) if sizes[label] >= _SMALLEST]
    places = ndimage.center_of_mass(labels > 0, labels, candidates)
    chosen = [
        label
        for label, place in zip(candidates, places, strict=True)
        if _is_lateral(place, labels == label)
    ]
    largest = sorted(chosen, key=lambda label: -sizes[label])[:2]
    found = np.isin(labels, largest)
    if shut and found.any():
        found = ndimage.binary_dilation(found, iterations=shut, mask=dark)
    return np.asarray(found)


def _is_lateral(place: tuple[float, ...], region: Mask) -> bool:
    """Near the middle, not only on the midline, and not open to the outside of the brain."""
    x, y, z = (p - c for p, c in zip(place, _CENTRE, strict=True))
    if not (abs(x) < 30 and abs(y) < 30 and abs(z) < 28):
        return False
    width = np.flatnonzero(region.any(axis=(1, 2)))
    return bool(abs(x) > 5 or width[-1] - width[0] > 20) and bool(width[-1] - width[0] < 120)


def _commonest(labels: NDArray[Any]) -> int:
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return int(sizes.argmax())


def _above(share: Image) -> Image:
    """A threshold at one half, softened so that noise does not shift it."""
    return np.clip((share - 0.25) / 0.5, 0, 1)
