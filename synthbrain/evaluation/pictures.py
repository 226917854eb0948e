"""Volumes as pictures that stand in the report's page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from synthbrain.sheet import PLANES, cut

if TYPE_CHECKING:
    from synthbrain.evaluation.sets import VolumeSet

_SLICES = (2.0, -18.0, 16.0)
"""Where pictures cut the sagittal, coronal and axial plane, mm."""

SHOWN = 6
"""Pictures of one kind."""


def strip(volumes: VolumeSet) -> str:
    """The first volumes of a set, with their ids."""
    pictures = "".join(
        f"<figure>{_picture(volumes, place)}<figcaption>{html.escape(volumes.ids[place])}"
        "</figcaption></figure>"
        for place in range(min(SHOWN, len(volumes)))
    )
    return f"<h3>{html.escape(volumes.name)}</h3><div class=strip>{pictures}</div>"


def pair(match: Mapping[str, Any], synthetic: VolumeSet, training: VolumeSet) -> str:
    """A synthetic volume and the training volume it is most like, side by side.

    Parameters
    ----------
    match
        One of ``worst`` of :func:`synthbrain.evaluation.memorisation.memorisation`.
    synthetic, training
        What its places are in.
    """
    made, known = match["places"]
    return (
        f"<figure class=pair>{_picture(synthetic, made)}{_picture(training, known)}"
        f"<figcaption>{html.escape(match['synthetic'])} (synthetic) and "
        f"{html.escape(match['training'])} (training): correlation {match['similarity']:.3f}, "
        f"found in {html.escape(', '.join(match['found_in']))}</figcaption></figure>"
    )


def _picture(volumes: VolumeSet, place: int) -> str:
    """Three slices side by side, as an image in the page."""
    from PIL import Image

    volume = volumes[place][0].numpy()
    cuts = [
        cut(volume, volumes.affine, plane, at) for plane, at in zip(PLANES, _SLICES, strict=True)
    ]
    height = max(len(one) for one in cuts)
    padded = [np.pad(one, ((height - len(one), 0), (0, 3))) for one in cuts]
    grey = (np.concatenate(padded, axis=1).clip(0, 1) ** 0.8 * 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(grey).save(out, "JPEG", quality=85)
    data = base64.b64encode(out.getvalue()).decode()
    return f'<img alt="{html.escape(volumes.ids[place])}" src="data:image/jpeg;base64,{data}">'
