"""A procedural skull, scalp, face and neck around a skull-stripped brain template.

Everything is drawn with signed distances in millimetres of the template: the skull is a shell
around the brain's hull, the head a smooth union of that shell with a face and a neck. It resembles
a T1-weighted image of a person in layout and intensities, so that skull-stripping, cropping and
intensity normalisation have something to work on. It is not an anatomical atlas.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Field = NDArray[np.floating[Any]]

AIR, BONE, MARROW, MUSCLE, SKIN, FAT = 0.0, 0.04, 0.42, 0.40, 0.46, 0.86
VITREOUS, LENS = 0.16, 0.38
"""Intensities of a T1-weighted image whose brightest fat is just below 1."""


def inner_skull(
    brain: NDArray[np.bool_],
    brain_origin: tuple[float, float, float],
    origin: tuple[float, float, float],
    shape: tuple[int, int, int],
) -> Field:
    """Signed distance (mm, negative inside) to a smooth hull of the brain, on a larger grid.

    Parameters
    ----------
    brain
        Mask of the skull-stripped template, 1 mm voxels.
    brain_origin, origin
        World position of the first voxel of ``brain`` and of the result; they differ by whole mm.
    shape
        Voxels of the result.
    """
    from scipy import ndimage

    mask = np.zeros(shape, dtype=bool)
    start = np.subtract(brain_origin, origin).astype(int)
    mask[tuple(slice(a, a + n) for a, n in zip(start, brain.shape, strict=True))] = brain
    bottom = int(start[2])
    mask[:, :, :bottom] = mask[:, :, bottom : bottom + 1]  # the spinal cord goes on downwards
    reach = 8.0
    grown = ndimage.distance_transform_edt(~mask) < reach
    closed = ndimage.distance_transform_edt(grown) > reach
    hull = closed | mask
    signed = np.where(
        hull,
        0.5 - ndimage.distance_transform_edt(hull),
        ndimage.distance_transform_edt(~hull) - 0.5,
    )
    return np.asarray(ndimage.gaussian_filter(signed, 1.5) - 1.5, dtype=np.float32)


def outer_head(skull: Field, origin: tuple[float, float, float]) -> Field:
    """T1-weighted intensities outside the inner face of the skull (and bone's inside it).

    Parameters
    ----------
    skull
        Result of :func:`inner_skull`.
    origin
        World position of its first voxel.
    """
    axes = [
        np.arange(n, dtype=np.float32) + np.float32(o)
        for n, o in zip(skull.shape, origin, strict=True)
    ]
    x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
    waves = _waves(skull.shape)
    surface = _surface(skull, x, y, z)
    image = _soft_tissue(surface, skull, waves, y, z)
    image = _face(image, surface, waves, x, y, z)
    image = _vault(image, skull, waves, y, z)  # last: whatever the face holds, the skull is closed
    return _mix(image, AIR, _step(surface)).astype(np.float32)


def _surface(skull: Field, x: Field, y: Field, z: Field) -> Field:
    """Signed distance to the skin, negative inside."""
    scalp = skull - 12.8 - 1.5 * np.exp(-(((z + 20) / 40) ** 2))
    face = _ellipsoid(x, y, z, (0, 50, -48), (64, 52, 84))
    nose = _ellipsoid(x, y, z, (0, 106, -52), (13, 17, 24))
    brow = _ellipsoid(x, y, z, (0, 76, -18), (50, 18, 16))
    neck = _ellipsoid(x, y, z, (0, -38, -110), (66, 72, 92))
    sockets = [_ellipsoid(x, y, z, (side * 33, 101, -36), (14, 11, 10)) for side in (-1, 1)]
    head: Field = scalp
    for part, blend in ((face, 14.0), (neck, 16.0), (brow, 8.0), (nose, 7.0)):
        head = _union(head, part, blend)
    for socket in sockets:
        head = -_union(-head, socket, 8.0)
    return head


def _soft_tissue(surface: Field, skull: Field, waves: Field, y: Field, z: Field) -> Field:
    """Skin, fat below it, and muscle wherever there is more than that."""
    depth = -surface
    fascia = 0.5 + 0.5 * np.tanh(6 * (waves - 0.35))  # streaks of fat between muscles
    deep = MUSCLE + (FAT - MUSCLE) * 0.75 * fascia
    image = FAT + (deep - FAT) * _step(depth - 5.5 - 2.0 * waves)
    vault = _step((z + 15) / 6)
    muscle = _step(depth - 6.5) * vault
    image = _mix(image, MUSCLE + 0.05 * waves, muscle)
    return _mix(image, SKIN, _step(1.6 - depth))


def _vault(image: Field, skull: Field, waves: Field, y: Field, z: Field) -> Field:
    """Inner table, marrow and outer table, thicker at the back and thin at the temples."""
    table = 3.2
    roof = 2.4 * _step((y - 35) / 12) * _step((-18 - z) / 8)  # of the orbits: no marrow
    thickness = 7.4 - roof + 1.2 * np.tanh((-y - 40) / 40) + 0.5 * waves
    marrow = np.minimum(skull - table, thickness - 1.7 - skull)
    bone = thickness - skull  # and all that lies inside, for the brain to be put there
    image = _mix(image, BONE, _step(bone))
    return _mix(image, MARROW * (1 + 0.35 * waves), _step(marrow) * _step((z + 45) / 10))


def _face(image: Field, surface: Field, waves: Field, x: Field, y: Field, z: Field) -> Field:
    """Orbits with their eyes, the nasal cavity, and the larger sinuses."""
    a = abs(x)
    nasal = _ellipsoid(x, y, z, (0, 70, -58), (15, 34, 22))
    maxilla = _ellipsoid(a, y, z, (30, 66, -66), (15, 17, 17))
    frontal = _ellipsoid(a, y, z, (10, 84, -16), (11, 5, 9))
    sphenoid = _ellipsoid(a, y, z, (6, 26, -42), (8, 13, 8))
    airway = _ellipsoid(x, y, z, (0, 18, -76), (13, 10, 26))
    wall = 1.3
    for cavity in (nasal, maxilla, frontal, sphenoid, airway):
        cavity = np.maximum(cavity, surface + 5.0)
        image = _mix(image, BONE, _step(wall - cavity))
        image = _mix(image, AIR, _step(-cavity))
    for height in (-50, -59, -69):
        shelf = _ellipsoid(a, y, z - 0.35 * a, (6, 68, height), (4.5, 24, 3.0))
        image = _mix(image, FAT * 0.75, _step(-np.maximum(shelf, nasal)))
    septum = np.maximum(a - 1.0, nasal)
    image = _mix(image, MUSCLE, _step(-septum))
    orbit = _ellipsoid(a, y, z, (31, 66, -37), (19, 24, 18))
    image = _mix(image, FAT * 0.92, _step(-orbit) * _step(-surface - 1.5))
    along = (y - 42) / 32
    axis = 22 + 11 * along
    cone = np.hypot(a - axis, (z + 37)) - 7 * np.clip(along + 0.4, 0.25, 1.0)
    muscles = (1.2 - abs(cone)) * 1.0
    image = _mix(image, MUSCLE, _step(muscles) * _step(np.minimum(y - 38, 70 - y)))
    nerve = 2.2 - np.hypot(a - axis, (z + 37))
    image = _mix(image, 0.55, _step(nerve) * _step(np.minimum(y - 34, 66 - y)))
    eye = _ellipsoid(a, y, z, (33, 77, -37), (13.5, 13.5, 13.5))
    image = _mix(image, SKIN, _step(1.0 - eye) * _step(-surface))
    image = _mix(image, VITREOUS, _step(-eye))
    lens = _ellipsoid(a, y, z, (33, 87, -37), (5.0, 2.6, 5.0))
    return _mix(image, LENS, _step(-lens))


def _ellipsoid(
    x: Field,
    y: Field,
    z: Field,
    centre: tuple[float, float, float],
    axes: tuple[float, float, float],
) -> Field:
    """Approximate signed distance to an ellipsoid, exact at its surface to first order."""
    p = [(v - c) / r for v, c, r in zip((x, y, z), centre, axes, strict=True)]
    radius = np.sqrt(sum(v * v for v in p))
    slope = np.sqrt(sum((v / r) ** 2 for v, r in zip(p, axes, strict=True)))
    return np.asarray(radius * (radius - 1) / np.maximum(slope, 1e-3), dtype=np.float32)


def _union(a: Field, b: Field, blend: float) -> Field:
    """Smooth minimum of two distances (polynomial, Quilez)."""
    h: Field = np.clip(0.5 + 0.5 * (b - a) / blend, 0, 1)
    return np.asarray(b + (a - b) * h - blend * h * (1 - h), dtype=np.float32)


def _step(distance: Field) -> Field:
    """A step one voxel wide: 0 below, 1 above."""
    return np.clip(distance + 0.5, 0, 1)


def _mix(image: Field, value: Field | float, amount: Field) -> Field:
    return image + (value - image) * amount


def _waves(shape: tuple[int, ...]) -> Field:
    """Fixed smooth noise in about [-1, 1], features of 12 mm."""
    from scipy import ndimage

    coarse = np.random.default_rng(20220915).standard_normal([n // 6 + 2 for n in shape])
    coarse = ndimage.gaussian_filter(coarse, 0.9)
    coarse /= 2 * coarse.std()
    fine = ndimage.zoom(coarse, 6, order=3)[tuple(slice(n) for n in shape)]
    return np.asarray(np.clip(fine, -1, 1), dtype=np.float32)
