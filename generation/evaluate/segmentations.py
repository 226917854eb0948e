"""Ventricular and brain volume from label maps, and what everything that measures volumes is.

Labels are FreeSurfer's (FreeSurferColorLUT), as SynthSeg, FastSurfer and recon-all write them. The
ventricular volume is what Pinaya et al. 2022 summed: both lateral ventricles with their inferior
horns. :mod:`generation.evaluate.segmenters` runs the programs that make such maps.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from generation import volumetry
from generation.errors import EvaluationError
from generation.volumetry import REFERENCE_ICV

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

VENTRICLES = (4, 5, 43, 44)
"""Left and right lateral ventricle, and their inferior horns."""

BRAIN = (
    *(2, 41, 77, 78, 79),  # cerebral white matter, and its hypointensities
    *(3, 42),  # cerebral cortex
    *(7, 46, 8, 47),  # cerebellar white matter and cortex
    *(10, 49, 11, 50, 12, 51, 13, 52),  # thalamus, caudate, putamen, pallidum
    *(17, 53, 18, 54, 26, 58, 28, 60),  # hippocampus, amygdala, accumbens, ventral diencephalon
    *(16, 85),  # brain stem, optic chiasm
    *range(251, 256),  # corpus callosum
    *range(1000, 1036),  # cortex of the left hemisphere, parcellated (Desikan-Killiany)
    *range(2000, 2036),  # and of the right
)
"""Grey and white matter. Choroid plexus, vessels and all fluid are left out."""

CSF = 24
"""Fluid about the brain. Maps that have it, such as SynthSeg's, fill the skull with labels."""

MEASURED = ("ventricular_volume", "brain_volume")
"""What a measurer tells, in mm³."""

ENDINGS = (".nii", ".nii.gz", ".mgz", ".mgh")
"""Of files that hold maps."""


@runtime_checkable
class Measurer(Protocol):
    """Tells volumes of one head."""

    @property
    def name(self) -> str:
        """Short name, as reports print it."""
        ...

    @property
    def version(self) -> str:
        """Of what measures."""
        ...

    def measure(self, volume: NDArray[np.float32], affine: ArrayLike) -> Mapping[str, float]:
        """Measure one head.

        Parameters
        ----------
        volume
            ``(x, y, z)`` intensities in [0, 1].
        affine
            ``(4, 4)``, voxel indices to mm.

        Returns
        -------
        Mapping
            ``ventricular_volume`` and ``brain_volume`` in mm³, the second normalised for head size;
            NaN for one that it does not measure.

        Raises
        ------
        EvaluationError
            This head cannot be measured; others may.
        """
        ...


@dataclass(frozen=True)
class PhantomMeasurer:
    """:func:`generation.volumetry.measure`, for phantoms and models trained on them only.

    It relies on a closed skull and knows no labels. It is no segmenter of scans of people.
    """

    name: str = "volumetry"
    version: str = "1"

    def measure(self, volume: NDArray[np.float32], affine: ArrayLike) -> Mapping[str, float]:
        """As in :class:`Measurer`; 1 mm volumes of (160, 224, 160) voxels, stored LAS."""
        spacing = np.linalg.norm(np.asarray(affine, dtype=np.float64)[:3, :3], axis=0)
        if not np.allclose(spacing, 1, atol=1e-3):
            raise EvaluationError(f"{self.name} measures 1 mm voxels, found {_sides(spacing)} mm")
        try:
            found = volumetry.measure(volume)
        except ValueError as error:
            raise EvaluationError(str(error)) from None
        return {name: getattr(found, name) for name in MEASURED}


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What became of some volumes.

    Parameters
    ----------
    values
        By id: volumes in mm³.
    failures
        By id: why there are none.
    """

    values: Mapping[str, Mapping[str, float]]
    failures: Mapping[str, str]

    def column(self, name: str, ids: Iterable[str]) -> NDArray[np.float64]:
        """One volume of each id, ``(n,)`` in mm³; NaN where it failed."""
        absent: Mapping[str, float] = {}
        return np.array(
            [self.values.get(key, absent).get(name, np.nan) for key in ids], dtype=np.float64
        )


def measure_labels(
    labels: ArrayLike, affine: ArrayLike, *, scaling: float | None = None
) -> dict[str, float]:
    """Volumes of one label map.

    Parameters
    ----------
    labels
        ``(x, y, z)`` whole numbers, FreeSurfer's labels.
    affine
        ``(4, 4)``, voxel indices to mm.
    scaling
        What the brain volume is multiplied by to normalise it for head size, such as SIENAX's;
        without one :data:`~generation.volumetry.REFERENCE_ICV` over the intracranial volume.

    Returns
    -------
    dict
        ``ventricular_volume``, ``brain_volume`` (normalised) and ``intracranial_volume`` in mm³.
        The last is the sum of all labels, as SynthSeg has it; NaN where the map does not label the
        fluid about the brain. The brain volume is then NaN too unless a scaling is given: the
        head's size is not known.

    Raises
    ------
    EvaluationError
        The map is not one of labels, or holds no brain.
    """
    found = np.asarray(labels)
    if found.ndim != 3:
        raise EvaluationError(f"a label map has three axes, found shape {found.shape}")
    if found.dtype.kind not in "iu":
        rounded = np.rint(found)
        if not np.array_equal(rounded, found) or abs(rounded).max(initial=0) > 2**31:
            raise EvaluationError("a label map holds whole numbers, found fractions; see its type")
        found = rounded.astype(np.int64)
    keys, counts = np.unique(found, return_counts=True)
    voxel = abs(float(np.linalg.det(np.asarray(affine, dtype=np.float64)[:3, :3])))
    if not (np.isfinite(voxel) and voxel > 0):
        raise EvaluationError("the label map's affine gives its voxels no volume; see its header")
    volumes = dict(zip(keys.tolist(), (counts * voxel).tolist(), strict=True))
    brain = sum(volumes.get(label, 0.0) for label in BRAIN)
    if not brain:
        shown = ", ".join(str(label) for label in sorted(set(volumes) - {0})[:8]) or "0 alone"
        raise EvaluationError(f"no brain in the label map: found labels {shown}")
    whole = sum(v for label, v in volumes.items() if label > 0) if CSF in volumes else np.nan
    return {
        "ventricular_volume": float(sum(volumes.get(label, 0.0) for label in VENTRICLES)),
        "brain_volume": float(brain * _scaling(scaling, whole)),
        "intracranial_volume": float(whole),
    }


def measure_tissues(
    tissues: ArrayLike, affine: ArrayLike, *, scaling: float | None = None
) -> dict[str, float]:
    """Volumes of one map of tissues, as deepmriprep and CAT12 write them (``p0``).

    Parameters
    ----------
    tissues
        ``(x, y, z)``, 0 outside, 1 fluid, 2 grey and 3 white matter; values between are mixtures.
    affine, scaling
        As in :func:`measure_labels`.

    Returns
    -------
    dict
        As in :func:`measure_labels`; the ventricular volume is NaN, it cannot be told.

    Raises
    ------
    EvaluationError
        The map is not one of tissues, or holds no brain.
    """
    found = np.asarray(tissues, dtype=np.float64)
    bad = found.ndim != 3 or not np.isfinite(found).all() or found.min() < -0.1 or found.max() > 3.1
    if bad:
        raise EvaluationError(f"a map of tissues holds 0 to 3 in three axes, found {found.shape}")
    voxel = abs(float(np.linalg.det(np.asarray(affine, dtype=np.float64)[:3, :3])))
    brain = float(np.clip(found - 1, 0, 1).sum()) * voxel
    whole = float(np.clip(found, 0, 1).sum()) * voxel
    if not brain:
        raise EvaluationError("no brain in the map of tissues: nothing is above 1")
    return {
        "ventricular_volume": np.nan,
        "brain_volume": brain * _scaling(scaling, whole),
        "intracranial_volume": whole,
    }


def read_map(path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A map and its affine from a NIfTI or MGH file.

    Raises
    ------
    EvaluationError
        It cannot be read.
    """
    import nibabel

    try:
        image: Any = nibabel.load(path)
        return np.asanyarray(image.dataobj), np.asarray(image.affine)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise EvaluationError(
            f"cannot read {path.name} ({type(error).__name__}: {reason})"
        ) from None


def find_map(folder: Path, key: str) -> Path:
    """The map of a volume in a folder: ``<id>*.nii[.gz]``, ``.mgz``, or BIDS ``…_dseg.nii.gz``.

    Parameters
    ----------
    folder
        Where; folders named after the subject in it are looked through too.
    key
        The volume's id, with or without BIDS's ``sub-``. ``s1`` does not find ``s10.nii``.

    Raises
    ------
    EvaluationError
        There is none, or more than one.
    """
    plain = re.escape(key.removeprefix("sub-"))
    named = re.compile(rf"(sub-)?{plain}(?![A-Za-z0-9]).*")
    places = [folder, *(path for path in sorted(folder.glob("*")) if named.fullmatch(path.name))]
    found = sorted(
        path
        for place in places
        for path in (place.rglob("*") if place != folder else folder.glob("*"))
        if path.is_file() and named.fullmatch(path.name) and path.name.endswith(ENDINGS)
    )
    found = [path for path in found if "_dseg." in path.name] or found
    if len(found) == 1:
        return found[0]
    shown = ", ".join(path.name for path in found[:4])
    raise EvaluationError(
        f"{len(found)} label maps of {key} in {folder} ({shown}); leave one"
        if found
        else f"no label map of {key} in {folder}, expected {key}*.nii.gz"
    )


def measure_folder(
    folder: Path, ids: Iterable[str], *, scalings: Mapping[str, float] | None = None
) -> Measurements:
    """Volumes of label maps that are already there.

    Parameters
    ----------
    folder
        Where they are, named as in :func:`find_map`.
    ids
        Of the volumes.
    scalings
        By id, as in :func:`measure_labels`.

    Raises
    ------
    EvaluationError
        There is no such folder. A map that is not there or cannot be measured is a failure.
    """
    if not folder.is_dir():
        raise EvaluationError(f"there is no folder {folder}; give the one that holds label maps")
    values: dict[str, Mapping[str, float]] = {}
    failures: dict[str, str] = {}
    for key in ids:
        try:
            scaling = (scalings or {}).get(key)
            values[key] = measure_labels(*read_map(find_map(folder, key)), scaling=scaling)
        except EvaluationError as error:
            failures[key] = str(error)
    return Measurements(values=values, failures=failures)


def measure_each(
    measurer: Measurer, volumes: Iterable[tuple[str, NDArray[np.float32], ArrayLike]]
) -> Measurements:
    """Volumes of heads, one after the other; those that cannot be measured are told.

    Parameters
    ----------
    measurer
        What measures.
    volumes
        Id, ``(x, y, z)`` or ``(1, x, y, z)`` intensities in [0, 1], and affine of each.
    """
    values: dict[str, Mapping[str, float]] = {}
    failures: dict[str, str] = {}
    for key, volume, affine in volumes:
        try:
            values[key] = measurer.measure(np.asarray(volume).reshape(volume.shape[-3:]), affine)
        except EvaluationError as error:
            failures[key] = str(error)
    return Measurements(values=values, failures=failures)


def _scaling(given: float | None, intracranial: float) -> float:
    if given is not None:
        if not (np.isfinite(given) and given > 0):
            raise EvaluationError(f"scaling must be a positive number, found {given}")
        return given
    return REFERENCE_ICV / intracranial


def _sides(spacing: NDArray[np.float64]) -> str:
    return " x ".join(f"{side:.3g}" for side in spacing)
