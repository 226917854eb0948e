"""Contact sheets: a cohort at a glance, as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

Array = np.ndarray[Any, np.dtype[Any]]
Plane = Literal["sagittal", "coronal", "axial"]
Box = tuple[int, int, int, int]

PLANES: tuple[Plane, ...] = ("sagittal", "coronal", "axial")

_BACKGROUND = (9, 11, 15)
_TEXT = (236, 238, 242)
_QUIET = (134, 143, 157)
_ACCENT = (122, 190, 255)
_WHITE_POINT = 99.7  # percentile
_GAMMA = 1.2
_VISIBLE = 0.06
_BORDER = 3  # voxels around the heads


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """What a contact sheet says around its pictures.

    Parameters
    ----------
    title, subtitle, footer
        Lines above and below.
    rows, columns
        Labels of the grid's rows and columns.
    column_title
        What the columns vary.
    captions
        One short line a picture, row by row.
    plane, position
        Which slice is shown: the plane, and where it cuts, in mm of the world.
    scale
        Pixels per voxel.
    """

    title: str
    subtitle: str
    rows: Sequence[str]
    columns: Sequence[str]
    column_title: str
    captions: Sequence[str]
    footer: str = ""
    plane: Plane = "axial"
    position: float = 16.0
    scale: float = 2.0


def contact_sheet(volumes: Sequence[Array], affine: ArrayLike, sheet: Sheet) -> Image:
    """Lay a grid of heads out on one dark page.

    All pictures share one intensity window and one crop, so that they can be compared.

    Parameters
    ----------
    volumes
        ``len(sheet.rows) * len(sheet.columns)`` volumes ``(x, y, z)`` in [0, 1], row by row.
    affine
        ``(4, 4)`` voxel to world, mm.
    sheet
        Labels and layout.

    Returns
    -------
    PIL.Image.Image
        An RGB image.

    Raises
    ------
    ValueError
        The number of volumes does not fill the grid.
    """
    from PIL import Image, ImageDraw

    if len(volumes) != len(sheet.rows) * len(sheet.columns):
        raise ValueError(
            f"{len(volumes)} volumes do not fill {len(sheet.rows)} rows of {len(sheet.columns)}"
        )
    slices = [cut(volume, affine, sheet.plane, sheet.position) for volume in volumes]
    pictures = [_picture(pixels, sheet.scale) for pixels in _windowed(_cropped(slices))]
    page = _Page.of(sheet, pictures[0].size)
    image = Image.new("RGB", page.size, _BACKGROUND)
    for number, picture in enumerate(pictures):
        image.paste(picture, page.corner(*divmod(number, len(sheet.columns))))
    _write_labels(ImageDraw.Draw(image), page, sheet)
    return image


def cut(volume: Array, affine: ArrayLike, plane: Plane, position: float) -> Array:
    """A slice as one looks at it: up is up or front, the left of the head is on the right.

    Parameters
    ----------
    volume
        ``(x, y, z)``, in any orientation.
    affine
        ``(4, 4)`` voxel to world, mm.
    plane
        Which way to cut.
    position
        Where: mm along the world axis that the plane is perpendicular to; clipped to the volume.

    Returns
    -------
    numpy.ndarray
        ``(rows, columns)``, the volume's type.
    """
    from nibabel import orientations

    affine = np.asarray(affine, dtype=float)
    las = orientations.axcodes2ornt(("L", "A", "S"))
    turn = orientations.ornt_transform(orientations.io_orientation(affine), las)
    turned = orientations.apply_orientation(volume, turn)
    world = affine @ orientations.inv_ornt_aff(turn, volume.shape)
    axis = PLANES.index(plane)
    index = round((position - world[axis, 3]) / world[axis, axis])
    pixels = np.take(turned, int(np.clip(index, 0, turned.shape[axis] - 1)), axis=axis)
    return pixels.T[::-1]


def _cropped(slices: Sequence[Array]) -> list[Array]:
    """Slices without the dark margin that all of them have."""
    visible = np.max(slices, axis=0) > _VISIBLE
    if not visible.any():
        return list(slices)
    spans = []
    for axis in (1, 0):
        found = np.flatnonzero(visible.any(axis=axis))
        spans.append(slice(max(found[0] - _BORDER, 0), found[-1] + 1 + _BORDER))
    return [pixels[tuple(spans)] for pixels in slices]


def _windowed(slices: Sequence[Array]) -> list[Array]:
    """Slices as bytes, all with the same window."""
    white = max(float(np.percentile(np.asarray(slices), _WHITE_POINT)), 1e-3)
    return [
        (np.clip(pixels / white, 0, 1) ** _GAMMA * 255).round().astype(np.uint8)
        for pixels in slices
    ]


def _picture(pixels: Array, scale: float) -> Image:
    """A grey slice as a picture whose black is the page's background."""
    from PIL import Image, ImageOps

    height, width = pixels.shape
    size = (round(width * scale), round(height * scale))
    grey = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
    return ImageOps.colorize(grey, black=_BACKGROUND, white=(250, 250, 247))


@dataclass(frozen=True)
class _Page:
    """Where everything lies, in pixels."""

    cell: tuple[int, int]
    gap: tuple[int, int]
    left: int
    top: int
    margin: int
    size: tuple[int, int]
    unit: float

    @classmethod
    def of(cls, sheet: Sheet, cell: tuple[int, int]) -> _Page:
        """The page of a sheet whose pictures measure ``cell``; type grows with them."""
        unit = cell[0] / 16
        margin, gap = round(2.6 * unit), (round(1.2 * unit), round(2.6 * unit))
        left, top = margin + round(5.2 * unit), margin + round(11.5 * unit)
        across, down = len(sheet.columns), len(sheet.rows)
        width = left + across * (cell[0] + gap[0]) - gap[0] + margin
        height = top + down * (cell[1] + gap[1]) + round(2.2 * unit) + margin
        return cls(cell, gap, left, top, margin, (width, height), unit)

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """Top left of a picture."""
        return (
            self.left + column * (self.cell[0] + self.gap[0]),
            self.top + row * (self.cell[1] + self.gap[1]),
        )


def _write_labels(draw: ImageDraw, page: _Page, sheet: Sheet) -> None:
    unit, (width, height) = page.unit, page.cell

    def write(at: tuple[float, float], text: str, size: float, colour: Any, anchor: str) -> None:
        draw.text(at, text, font=_font(round(size * unit)), fill=colour, anchor=anchor)

    write((page.margin, page.margin), sheet.title, 3.0, _TEXT, "lt")
    write((page.margin, page.margin + 4.3 * unit), sheet.subtitle, 1.25, _QUIET, "lt")
    for column, label in enumerate(sheet.columns):
        x, y = page.corner(0, column)
        write((x + width / 2, y - 3.3 * unit), sheet.column_title, 1.05, _QUIET, "mb")
        write((x + width / 2, y - 1.3 * unit), label, 1.7, _ACCENT, "mb")
    for row, label in enumerate(sheet.rows):
        x, y = page.corner(row, 0)
        word, _, value = label.partition(" ")
        write((page.margin, y + height / 2 - 0.4 * unit), word, 1.05, _QUIET, "lb")
        write((page.margin, y + height / 2 + 0.2 * unit), value, 1.7, _ACCENT, "lt")
    for number, caption in enumerate(sheet.captions):
        x, y = page.corner(*divmod(number, len(sheet.columns)))
        write((x + width / 2, y + height + 0.7 * unit), caption, 0.95, _QUIET, "mt")
    write((page.margin, page.size[1] - page.margin), sheet.footer, 0.95, _QUIET, "lb")


@cache
def _font(size: int) -> FreeTypeFont | ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)
