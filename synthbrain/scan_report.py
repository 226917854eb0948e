"""What became of scans: a record and a picture of each, and the report that lists them."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from generation.preprocess import VERSION
from generation.template import template
from synthbrain.files import write
from synthbrain.header import Geometry
from synthbrain.quantise import Array
from synthbrain.sheet import PLANES, cut

_SLICES = (2.0, -18.0, 16.0)
"""Where the report cuts the sagittal, coronal and axial plane, mm."""
_EDGE = (122, 190, 255)


@dataclass(frozen=True, kw_only=True)
class Record:
    """What became of a scan.

    Parameters
    ----------
    id, source
        The scan's id, and the path of its file.
    key
        Name of its files in ``scans/``; empty where the file was not read.
    reason
        Why it is left out; empty where it is not.
    measures
        :class:`generation.quality.Measures`; empty where it did not come so far.
    """

    id: str
    source: str
    key: str = ""
    reason: str = ""
    measures: dict[str, float]

    def kept(self, folder: Path, suffix: str) -> Path:
        """Its file in ``scans/``: ``.json``, ``.shard`` or ``.jpg``."""
        return folder / f"{self.key}{suffix}"


def picture(volume: Array, geometry: Geometry) -> bytes:
    """Three slices side by side with the outline of the template's brain, as a JPEG.

    Parameters
    ----------
    volume
        ``(x, y, z)`` intensities in [0, 1].
    geometry
        Its grid.
    """
    from PIL import Image
    from scipy import ndimage

    brain = template(geometry.shape, geometry.affine).brain.astype(np.uint8)
    strips = []
    for plane, position in zip(PLANES, _SLICES, strict=True):
        grey = (cut(volume, geometry.affine, plane, position) ** 0.8 * 255).astype(np.uint8)
        inside = cut(brain, geometry.affine, plane, position) > 0
        coloured = np.repeat(grey[..., None], 3, axis=2)
        coloured[inside & ~ndimage.binary_erosion(inside)] = _EDGE
        strips.append(np.pad(coloured, ((geometry.shape[1] - len(grey), 0), (0, 4), (0, 0))))
    out = io.BytesIO()
    Image.fromarray(np.concatenate(strips, axis=1)).save(out, "JPEG", quality=85)
    return out.getvalue()


def write_report(out: Path, records: Sequence[Record]) -> None:
    """Write ``report.json`` and ``report.html``, which needs nothing beside it.

    Parameters
    ----------
    out
        Folder to write to; pictures are those in its ``scans/``.
    records
        One a scan.

    Raises
    ------
    StoreError
        The folder cannot be written to.
    """
    found = {"version": VERSION, "scans": [asdict(record) for record in records]}
    write(out / "report.json", (json.dumps(found, indent=2) + "\n").encode())
    used = sum(not record.reason for record in records)
    figures = sorted(records, key=lambda record: not record.reason)  # what is left out comes first
    body = "\n".join(_figure(out / "scans", record) for record in figures)
    title = f"{used:,} of {len(records):,} scans prepared"
    write(out / "report.html", _PAGE.format(title=title, body=body).encode())


def _figure(folder: Path, record: Record) -> str:
    path = record.kept(folder, ".jpg")
    shown = ""
    if record.key and path.exists():
        data = base64.b64encode(path.read_bytes()).decode()
        shown = f'<img alt="{html.escape(record.id)}" src="data:image/jpeg;base64,{data}">'
    reason = f'<p class="out">left out: {html.escape(record.reason)}</p>' if record.reason else ""
    cells = (f"{html.escape(k)} {v:.4g}" for k, v in record.measures.items())
    return (
        f"<figure>{shown}<figcaption><b>{html.escape(record.id)}</b> "
        f"{html.escape(record.source)}{reason}<p>{' · '.join(cells)}</p></figcaption></figure>"
    )


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ background: #090b0f; color: #eceef2; font: 14px system-ui, sans-serif; margin: 2em; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(32em, 1fr)); gap: 2em; }}
figure {{ margin: 0; }}
img {{ width: 100%; }}
p {{ color: #868f9d; margin: .3em 0; }}
p.out {{ color: #ff9d7a; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>Sagittal, coronal and axial; the line is the brain of the template.</p>
<main>
{body}
</main>
</body>
</html>
"""
