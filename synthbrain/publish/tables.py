"""The Parquet tables of a published set: pictures with pointers, and voxels.

Their types are also told in the way Hugging Face ``datasets`` reads them, so that the Hub's pages
show pictures, and ``load_dataset`` gives arrays, without synthbrain.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from generation.covariates import NAMES, SEXES
from synthbrain.files import aside
from synthbrain.manifest import NATURAL_COLUMNS
from synthbrain.quantise import Array, intensities
from synthbrain.sheet import PLANES, cut

if TYPE_CHECKING:
    import pyarrow as pa

    from synthbrain.header import Geometry
    from synthbrain.manifest import Manifest

T = TypeVar("T")
Row = dict[str, Any]
Features = dict[str, dict[str, Any]]

VOLUME = "volume"
"""Column of voxels."""
POINTER = ("pack", "offset", "size", "sha256")
"""Columns that say where a volume's shard lies: a file, bytes of it, and their hash."""

PREVIEW_PIXELS = 128
"""Previews are shrunk until no side of a slice is longer: a page of them should load at once."""

_BYTES = [".".join((VOLUME, *("list", "element") * 3))]
_FINGERPRINT = b"synthbrain"
_VERSION = "1"


@dataclass(frozen=True)
class Table:
    """A kind of Parquet file.

    Parameters
    ----------
    folder
        Where its files lie in the published folder.
    features
        Columns as ``datasets`` describes them.
    rows, group
        Most rows of a file, and of a row group: what a reader holds at once.
    """

    folder: str
    features: Features
    rows: int
    group: int


def previews(conditional: bool) -> Table:
    """Pictures with covariates, and where each volume lies."""
    pointer = {"pack": "string", "offset": "int64", "size": "int64", "sha256": "string"}
    features = _columns(conditional) | {name: _value(kind) for name, kind in pointer.items()}
    return Table("data", {"image": {"_type": "Image"}, **features}, rows=2000, group=100)


def voxels(geometry: Geometry, conditional: bool) -> Table:
    """Whole volumes, with their scale and affine in every row."""
    return Table("volumes", voxel_features(geometry, conditional), rows=200, group=4)


def voxel_features(geometry: Geometry, conditional: bool, dtype: str | None = None) -> Features:
    """Columns of a row with voxels; ``dtype`` of the voxels as stored by default."""
    return {
        VOLUME: {"shape": list(geometry.shape), "dtype": dtype or geometry.dtype,
                 "_type": "Array3D"},
        "scale": _value("float64"),
        "affine": {"shape": [4, 4], "dtype": "float64", "_type": "Array2D"},
        **_columns(conditional),
    }  # fmt: skip


def describe(manifest: Manifest, index: int, made_by: str) -> Row:
    """What every table says of a row: covariates, seed and origin."""
    row = manifest.table.iloc[index]
    told: Row = {"id": str(manifest.table.index[index]), "split": row["split"]}
    told |= {name: float(row[name]) for name in NAMES}
    if manifest.header.conditional:
        told["sex_label"] = list(SEXES)[int(row["sex"] > 0.5)]
        told |= {
            name: float(covariate.denormalise(row[covariate.name]))
            for name, covariate in NATURAL_COLUMNS.items()
        }
    seed = None if row["origin"] == "published" else int(row["seed"])
    position = int(manifest.positions[index])
    return told | {
        "seed": seed, "origin": row["origin"], "made_by": made_by, "position": position,
    }  # fmt: skip


def voxel_row(volume: Array, geometry: Geometry) -> Row:
    """The voxels of a row, and what makes millimetres and intensities of them."""
    scale = geometry.scale if geometry.dtype == "uint8" else 1.0
    return {VOLUME: volume, "scale": scale, "affine": np.array(geometry.affine)}


def picture(volume: Array, geometry: Geometry) -> bytes:
    """The three middle slices of a volume side by side, as a PNG."""
    from PIL import Image

    values = (intensities(volume, geometry) * 255).round().astype(np.uint8)
    affine, middle = np.array(geometry.affine), (np.array(geometry.shape) - 1) / 2
    centre = affine[:3, :3] @ middle + affine[:3, 3]
    slices = [cut(values, affine, plane, at) for plane, at in zip(PLANES, centre, strict=True)]
    page = np.zeros((max(map(len, slices)), sum(s.shape[1] for s in slices)), np.uint8)
    left = 0
    for pixels in slices:
        page[: len(pixels), left : left + pixels.shape[1]] = pixels
        left += pixels.shape[1]
    longest = max(max(pixels.shape) for pixels in slices)
    file = io.BytesIO()
    Image.fromarray(page).reduce(-(-longest // PREVIEW_PIXELS)).save(file, "png", optimize=True)
    return file.getvalue()


def split_files(manifest: Manifest, table: Table) -> dict[str, list[int]]:
    """The files of a table, each with the rows of the manifest it holds, split by split."""
    splits: dict[str, list[int]] = {}
    for index, name in enumerate(manifest.table["split"]):
        splits.setdefault(hub_split(name), []).append(index)
    files = {}
    for name, rows in splits.items():
        count = -(-len(rows) // table.rows)
        for number in range(count):
            path = f"{table.folder}/{name}-{number:05d}-of-{count:05d}.parquet"
            files[path] = rows[number * table.rows : (number + 1) * table.rows]
    return files


def hub_split(name: str) -> str:
    """A split's name as the Hub allows it.

    Examples
    --------
    >>> hub_split("hold-out")
    'hold_out'
    """
    return re.sub(r"\W", "_", name)


def write_parquet(path: Path, table: Table, pointers: Sequence[Row], rows: Iterable[Row]) -> bool:
    """Write one file of a table, unless it is there; returns whether it was written.

    Parameters
    ----------
    path
        The file.
    table
        Its columns.
    pointers
        What each row is a row of; with the columns it decides whether a file is the right one.
    rows
        Dicts of the columns; taken only where the file has to be written.
    """
    import pyarrow.parquet as pq

    text = json.dumps([_VERSION, table.features, *pointers], sort_keys=True)
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    if _fingerprint(path) == fingerprint:
        return False
    schema = _schema(table.features, fingerprint)
    with aside(path) as scratch:
        # Parquet keeps bytes as four; as numbers of a dictionary of 256 they take one.
        options: dict[str, Any] = {"compression": "zstd", "use_dictionary": _BYTES}
        with pq.ParquetWriter(scratch, schema, **options) as writer:
            for group in _groups(rows, table.group):
                writer.write_table(_batch(group, table.features, schema))
    return True


def _fingerprint(path: Path) -> str | None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowInvalid):
        return None
    return metadata[_FINGERPRINT].decode() if _FINGERPRINT in metadata else None


def _columns(conditional: bool) -> Features:
    kinds = {"id": "string", "split": "string", **dict.fromkeys(NAMES, "float64")}
    if conditional:
        kinds |= {"sex_label": "string", **dict.fromkeys(NATURAL_COLUMNS, "float64")}
    kinds |= {"seed": "int64", "origin": "string", "made_by": "string", "position": "int64"}
    return {name: _value(kind) for name, kind in kinds.items()}


def _value(dtype: str) -> dict[str, Any]:
    return {"dtype": dtype, "_type": "Value"}


def _schema(features: Features, fingerprint: str) -> pa.Schema:
    import pyarrow as pa

    told = json.dumps({"info": {"features": features}})
    metadata = {b"huggingface": told.encode(), _FINGERPRINT: fingerprint.encode()}
    fields = [
        pa.field(name, _type(feature), metadata=_extension(feature))
        for name, feature in features.items()
    ]
    return pa.schema(fields, metadata=metadata)


def _type(feature: Mapping[str, Any]) -> pa.DataType:
    import pyarrow as pa

    if feature["_type"] == "Image":
        return pa.struct({"bytes": pa.binary(), "path": pa.string()})
    dtype = {"float16": "halffloat", "float64": "double"}.get(feature["dtype"], feature["dtype"])
    kind = pa.type_for_alias(dtype)
    for _ in feature.get("shape", ()):
        kind = pa.list_(kind)
    return kind


def _extension(feature: Mapping[str, Any]) -> dict[str, str] | None:
    """What makes Arrow take nested lists for the arrays of ``datasets``, which need not be here."""
    if "shape" not in feature:
        return None
    return {
        "ARROW:extension:name": f"datasets.features.features.{feature['_type']}ExtensionType",
        "ARROW:extension:metadata": json.dumps([feature["shape"], feature["dtype"]]),
    }


def _batch(rows: Sequence[Row], features: Features, schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    columns = []
    for name, feature in features.items():
        values = [row[name] for row in rows]
        kind = schema.field(name).type
        nested = "shape" in feature
        columns.append(_nested(np.stack(values)) if nested else pa.array(values, kind))
    return pa.Table.from_arrays(columns, schema=schema)


def _nested(arrays: Array) -> pa.Array:
    """``(n, *shape)`` as lists of lists, without a Python object per voxel."""
    import pyarrow as pa

    nested = pa.array(arrays.reshape(-1))
    for axis in range(arrays.ndim - 1, 0, -1):
        count = int(np.prod(arrays.shape[:axis]))
        offsets = np.arange(count + 1, dtype=np.int32) * arrays.shape[axis]
        nested = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), nested)
    return nested


def _groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group
