"""Sample sheets: what a network makes at some step, as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

_SCALE = 2
_GAP = 6
_LINE = 18


class Picture(NamedTuple):
    """A volume to look at, ``(x, y, z)`` in [0, 1], and what it is."""

    caption: str
    volume: torch.Tensor


def draw_sheet(pictures: Sequence[Picture], path: Path, title: str) -> None:
    """Draw the three middle slices of volumes, one volume a row, as a PNG.

    Parameters
    ----------
    pictures
        Volumes ``(x, y, z)`` of one shape, in [0, 1], with captions.
    path
        Of the file; written in one step.
    title
        First line.
    """
    from PIL import Image, ImageDraw

    if not pictures:
        return
    rows = [_slices(picture.volume) for picture in pictures]
    height, width = rows[0].shape
    page = Image.new("L", (width + 2 * _GAP, _LINE + len(rows) * (height + _LINE + _GAP)), 12)
    pen = ImageDraw.Draw(page)
    pen.text((_GAP, 3), title, fill=230)
    for number, (row, picture) in enumerate(zip(rows, pictures, strict=True)):
        top = _LINE + number * (height + _LINE + _GAP)
        pen.text((_GAP, top + 3), picture.caption, fill=160)
        page.paste(Image.fromarray(row), (_GAP, top + _LINE))
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    page.save(scratch, format="PNG")
    scratch.replace(path)


def _slices(volume: torch.Tensor) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Sagittal, coronal and axial middle, side by side, up is up."""
    values = (volume.detach().float().cpu().clamp(0, 1) * 255).round().byte().numpy()
    cuts = [np.take(values, values.shape[axis] // 2, axis=axis).T[::-1] for axis in range(3)]
    height = max(cut.shape[0] for cut in cuts)
    padded = [np.pad(cut, ((0, height - cut.shape[0]), (0, _GAP))) for cut in cuts]
    return np.kron(np.hstack(padded), np.ones((_SCALE, _SCALE), np.uint8))
