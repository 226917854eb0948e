"""The head the phantoms are warped from: fields derived once from the MNI152 template.

nilearn ships the ICBM 2009a nonlinear symmetric T1 template, skull-stripped, with its grey and
white matter maps (Fonov et al., NeuroImage 54, 2011). From these three images come a tissue map
free of CSF, signed distances to the pial surface and to the wall of the lateral ventricles, a field
along which the ventricles grow, and, since the template has no head, a procedural skull, scalp,
face and neck.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from generation.head import inner_skull, outer_head

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Field = NDArray[np.floating[Any]]

VERSION = 1
"""Raise it whenever a line of this file changes what the fields hold."""

TEMPLATE_FILES = {
    tissue: f"mni_icbm152_{tissue}_tal_nlin_sym_09a_converted.nii.gz"
    for tissue in ("t1", "gm", "wm")
}

ORIGIN = (-98.0, -134.0, -72.0)
"""World position (mm, RAS) of the first voxel of the template; its voxels are 1 mm."""

HEAD_ORIGIN = (-104.0, -152.0, -80.0)
HEAD_SHAPE = (209, 277, 205)

GROWTH_STEP = 3
"""Spacing of the growth field, in template voxels (mm)."""

GREY, WHITE = 165.0, 224.0
"""Median intensities of pure grey and pure white matter in the template."""


@dataclass(frozen=True)
class Atlas:
    """Fields of the template head; x runs left to right, y back to front, z upwards.

    Distances are in mm of the template, which is about 1.09 times the size of a living head.
    """

    tissue: Field
    """0 in grey and 1 in white matter, carried on into the CSF from the nearest tissue."""
    pial: Field
    """Signed distance to the pial surface, positive inside; ventricles count as inside.

    Up to twice the distance where atrophy spares the brain: deep structures and the cerebellum."""
    ventricle: Field
    """Signed distance to the wall of the lateral ventricles, negative inside."""
    skull: Field
    """Signed distance to the inner face of the skull, negative inside."""
    head: Field
    """T1-weighted intensity of all that lies outside the inner face of the skull."""
    growth: Field
    """Velocity ``(3, x, y, z)`` in mm that adds 100 ml to the ventricles per unit of time."""
    brain_origin: NDArray[np.float64]
    """World position of the first voxel of ``tissue``, ``pial`` and ``ventricle``."""


def template_folder() -> Path:
    """Where nilearn keeps its template, found without importing nilearn.

    Raises
    ------
    FileNotFoundError
        nilearn is not installed, or its files are not where they were.
    """
    spec = importlib.util.find_spec("nilearn")
    folder = Path(spec.origin).parent / "datasets" / "data" if spec and spec.origin else Path()
    if spec is None or not all((folder / name).is_file() for name in TEMPLATE_FILES.values()):
        raise FileNotFoundError(
            "the phantom generator needs the MNI152 template that nilearn ships, expected at "
            f"{folder / TEMPLATE_FILES['t1']}; install it with: pip install nilearn"
        )
    return folder


def template_images() -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """T1-weighted intensity, and shares of grey and of white matter, in the template's own voxels.

    Each ``(x, y, z)``, 1 mm, RAS, the first voxel at :data:`ORIGIN`; shares are 0 to 1.

    Raises
    ------
    FileNotFoundError
        As :func:`template_folder`.
    """
    import nibabel

    images: list[Any] = [nibabel.load(template_folder() / n) for n in TEMPLATE_FILES.values()]
    t1, grey, white = (np.asarray(image.dataobj, dtype=np.float32) for image in images)
    return t1, grey / np.float32(255), white / np.float32(255)


def digest() -> str:
    """Hex SHA-256 of the template's files and of :data:`VERSION`."""
    sha = hashlib.sha256(f"atlas {VERSION}".encode())
    for name in TEMPLATE_FILES.values():
        sha.update((template_folder() / name).read_bytes())
    return sha.hexdigest()


def load_atlas(cache: Path | None = None) -> Atlas:
    """The atlas: from ``cache`` if a former call left it there, else derived anew (about 20 s).

    Parameters
    ----------
    cache
        Folder to keep it in (about 75 MB); without one nothing is written.
    """
    names = [field.name for field in fields(Atlas)]
    kept = remembered(cache, f"atlas-{digest()[:16]}", names, _derive)
    fields_: dict[str, Any] = {name: _single(array) for name, array in kept.items()}
    return Atlas(**fields_)


def remembered(
    cache: Path | None,
    name: str,
    arrays: Sequence[str],
    derive: Callable[[], dict[str, NDArray[Any]]],
) -> dict[str, NDArray[Any]]:
    """Arrays from a file that a former call left, else derived anew and left there.

    Parameters
    ----------
    cache
        Folder of the file; without one, or where it cannot be written to, nothing is left.
    name
        Of the file: must change with all that the arrays depend on.
    arrays
        Their names.
    derive
        Makes them.
    """
    if cache is None:
        return derive()
    path = cache / f"{name}.npz"
    kept = _read(path, arrays)
    if kept is None:
        kept = derive()
        _keep(path, kept)
    return kept


def _single(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _read(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]] | None:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile):
        return None  # RuntimeError: damage that makes an archive look encrypted, or of the future


def _keep(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        draft.replace(path)
    except OSError:  # a full or read-only disk costs time, nothing else
        with contextlib.suppress(OSError):
            draft.unlink()


def _derive() -> dict[str, NDArray[Any]]:
    t1, grey, white = template_images()
    ventricles = _lateral_ventricles(t1, grey + white)
    ventricle = -_signed_distance(ventricles, smooth=0.6)
    near_ventricle = ventricle < 3.0
    tissue = _tissue(t1, grey + white, near_ventricle)
    brain = (np.minimum(grey + white, (t1 - 80.0) / 70.0) > 0.5) | near_ventricle
    skull = inner_skull(t1 > 0, ORIGIN, HEAD_ORIGIN, HEAD_SHAPE)
    near_skull = _crop(skull, t1.shape)
    pial = _signed_distance(_largest(brain), smooth=0.5) * _firmness(near_skull)
    growth = _growth(ventricle, near_skull)
    box = _bounding_box(pial > -8.0)
    half = np.float16
    return {
        "tissue": tissue[box].astype(half),
        "pial": pial[box].clip(-12, 12).astype(half),
        "ventricle": ventricle[box].clip(-20, 40).astype(half),
        "skull": skull.clip(-60, 30).astype(half),
        "head": outer_head(skull, HEAD_ORIGIN).astype(half),
        "growth": growth.astype(half),
        "brain_origin": np.add(ORIGIN, [side.start for side in box]),
    }


def _lateral_ventricles(t1: Field, matter: Field) -> NDArray[np.bool_]:
    """Left and right lateral ventricles with their horns, as one mask."""
    from scipy import ndimage

    x, y, z = _world(t1.shape, ORIGIN)
    deep = ndimage.distance_transform_edt(t1 > 0) > 10
    dark = (matter < 0.5) & (t1 < 150) & deep & (t1 > 0)
    body = dark & (abs(x) > 1.5) & (abs(x) < 42) & (y > -62) & (y < 45) & (z > -28) & (z < 32)
    body &= ~((abs(x) < 5) & (z < 6) & (y < 12))  # third ventricle
    body &= ~((abs(x) < 14) & (y < -36 + 0.9 * (z - 6)))  # cistern of the great vein
    body &= (z > 0) | ((abs(x) > 22) & (y > -48) & (y < -2))  # below: the temporal horns only
    labels, _ = ndimage.label(body)
    seeds = np.unique(labels[(abs(x) > 6) & (abs(x) < 14) & (abs(y - 10) < 8) & (z > 8) & (z < 18)])
    wanted = [label for label in seeds if label and (labels == label).sum() > 1000]
    core = np.isin(labels, wanted)
    return np.asarray(ndimage.binary_closing(core, iterations=1) | core)


def _tissue(t1: Field, matter: Field, near_ventricle: NDArray[np.bool_]) -> Field:
    from scipy import ndimage

    pure = (matter > 0.9) & (t1 > 150) & ~near_ventricle
    nearest = ndimage.distance_transform_edt(~pure, return_distances=False, return_indices=True)
    filled = t1[tuple(nearest)]
    smooth = ndimage.gaussian_filter(filled, 1.0)
    filled = np.where(pure, filled, smooth)
    crisp = filled + 1.0 * (filled - ndimage.gaussian_filter(filled, 1.5))
    level = (crisp - GREY) / (WHITE - GREY)
    return np.asarray(np.clip(level, -0.1, 1.15), dtype=np.float32)


def _growth(ventricle: Field, skull: Field) -> Field:
    """A smooth flow out of the ventricles that comes to rest at the skull.

    The potential flow of a uniform source inside the ventricles and a uniform sink in the rest of
    the brain: a Poisson equation, solved by cosine transform.
    """
    from scipy import fft, ndimage

    step = (slice(None, None, GROWTH_STEP),) * 3
    x, _, _ = _world(ventricle.shape, ORIGIN)
    beside_septum = np.clip((abs(x) - 1.0) / 4.0, 0.0, 1.0)  # or the septum would swell too
    # A source much narrower than the flow it feeds would fold on any grid.
    inside = ndimage.gaussian_filter((ventricle < 5.0) * beside_septum, 5.0)[step]
    brain = np.clip(-ndimage.gaussian_filter(skull, 2.0)[step] / 6.0, 0.0, 1.0)
    source = inside / inside.sum() - brain / brain.sum()
    waves = [np.pi * np.arange(n) / n for n in source.shape]
    per_axis = np.meshgrid(*[2 - 2 * np.cos(wave) for wave in waves], indexing="ij")
    eigenvalues = np.sum(per_axis, axis=0)
    eigenvalues[0, 0, 0] = 1.0
    spectrum = fft.dctn(source, type=2, norm="ortho") / eigenvalues
    spectrum[0, 0, 0] = 0.0
    potential = fft.idctn(spectrum, type=2, norm="ortho")
    flow = -np.stack(np.gradient(potential))  # per grid step, of a source of one grid cell
    flow *= 100_000.0 / GROWTH_STEP**3 * GROWTH_STEP
    rest = np.clip(-skull[step] / 10.0, 0.0, 1.0)
    return np.asarray(flow * (rest * rest * (3 - 2 * rest)), dtype=np.float32)


def _firmness(skull: Field) -> Field:
    """1 at the convexity to 2.2 in the depth of the brain and below the tentorium."""
    _, y, z = _world(skull.shape, ORIGIN)
    deep = np.clip((-skull - 22.0) / 12.0, 0, 1)
    below = np.clip((-12.0 - z - 0.25 * (y + 40)) / 10.0, 0, 1) * np.clip((-14.0 - y) / 10.0, 0, 1)
    return 1 + 1.2 * np.maximum(deep, below)


def _signed_distance(mask: NDArray[np.bool_], *, smooth: float) -> Field:
    """Distance to the border of a mask, mm, positive inside."""
    from scipy import ndimage

    inner = ndimage.distance_transform_edt(mask) - 0.5
    outer = 0.5 - ndimage.distance_transform_edt(~mask)
    signed = np.where(mask, inner, outer).astype(np.float32)
    return np.asarray(ndimage.gaussian_filter(signed, smooth))


def _largest(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    from scipy import ndimage

    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return np.asarray(labels == sizes.argmax())


def _crop(skull: Field, shape: tuple[int, ...]) -> Field:
    start = np.subtract(ORIGIN, HEAD_ORIGIN).astype(int)
    return skull[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]


def _bounding_box(mask: NDArray[np.bool_]) -> tuple[slice, ...]:
    corners = [np.flatnonzero(mask.any(tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    return tuple(slice(int(edge[0]), int(edge[-1]) + 1) for edge in corners)


def _world(
    shape: tuple[int, ...], origin: tuple[float, float, float]
) -> tuple[Field, Field, Field]:
    axes = [
        np.arange(n, dtype=np.float32) + np.float32(o) for n, o in zip(shape, origin, strict=True)
    ]
    x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
    return x, y, z
