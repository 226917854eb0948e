"""The MNI152 template on a grid: intensities, tissues, the brain and its rim."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from generation.atlas import ORIGIN, template_images

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Image = NDArray[np.float32]
Matrix = NDArray[np.float64]
Mask = NDArray[np.bool_]

_RIM_MM = 8
"""How far around the brain images are compared: skull and scalp tell size and place."""


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


def template(shape: tuple[int, ...], grid: ArrayLike) -> Template:
    """The template on a grid; the last two grids are kept.

    Parameters
    ----------
    shape
        ``(x, y, z)`` voxels of the grid.
    grid
        ``(4, 4)`` voxel to world of the grid, mm, RAS.
    """
    rows = np.asarray(grid, dtype=np.float64).tolist()
    return _template(shape, tuple(map(tuple, rows)))


def own_affine() -> Matrix:
    """``(4, 4)`` voxel to world, mm, RAS, of :func:`generation.atlas.template_images`."""
    matrix = np.eye(4)
    matrix[:3, 3] = ORIGIN
    return matrix


@lru_cache(maxsize=2)
def _template(shape: tuple[int, ...], grid: tuple[tuple[float, ...], ...]) -> Template:
    from scipy import ndimage

    step = np.array(grid)
    inverse = np.linalg.inv(own_affine()) @ step
    t1, grey, white = (
        ndimage.affine_transform(image, inverse, output_shape=shape, order=1).astype(np.float32)
        for image in template_images()
    )
    brain = grey + white > 0.5
    reach = max(round(_RIM_MM / float(np.linalg.norm(step[:3, 0]))), 1)
    rim = ndimage.binary_dilation(t1 > 0, iterations=reach)
    return Template(t1, grey, white, brain, rim)
