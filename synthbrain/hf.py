"""Between synthbrain and Hugging Face ``datasets``, in both directions.

:func:`to_hf` gives a cohort to code that expects a ``datasets.Dataset``; :func:`from_hf` gives what
``load_dataset`` reads of a published set to code that expects a
:class:`synthbrain.SynthBrainDataset`'s samples. A published row holds its voxels, or points at the
bytes of its shard in a pack; the bytes are then read where the pack lies, and checked.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

import synthbrain
from generation.covariates import NAMES
from synthbrain.errors import DamagedShardError, UsageError
from synthbrain.header import Geometry, Header
from synthbrain.manifest import Manifest
from synthbrain.publish.tables import POINTER, VOLUME, describe, voxel_features, voxel_row
from synthbrain.quantise import Array, intensities
from synthbrain.rows import PUBLISHED
from synthbrain.shard import ShardLayout
from synthbrain.sources.extents import Bytes, Extent
from synthbrain.sources.url import open_bytes

if TYPE_CHECKING:
    import pyarrow as pa

    from synthbrain.dataset import Sample, SynthBrainDataset
    from synthbrain.resolver import Resolver

DType = Literal["float32", "float16", "uint8"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "uint8": torch.uint8}
_COMMON = ("id", "made_by", *NAMES)
_BATCH = 8
_AHEAD = 4


def to_hf(
    dataset: SynthBrainDataset,
    *,
    image: Literal["uint8", "float32"] = "uint8",
    streaming: bool = False,
) -> Any:
    """A dataset's volumes as a Hugging Face dataset.

    Parameters
    ----------
    dataset
        Whose rows; volumes its generator or sources can give are had as they are reached.
    image
        ``"uint8"`` as stored, or ``"float32"`` in [0, 1].
    streaming
        Give an ``IterableDataset``, which copies nothing; otherwise all volumes are written into
        the cache of ``datasets``.

    Returns
    -------
    datasets.Dataset or datasets.IterableDataset
        With the voxels as ``volume`` ``(x, y, z)``, ``scale`` (intensity = volume × scale),
        ``affine`` (voxel to world, mm), ``id``, normalised and natural covariates and ``seed``.

    Raises
    ------
    UsageError
        The dataset is one of latents, or its volumes are not stored as bytes.
    MissingVolumeError
        While iterating: a volume can neither be read nor made.
    """
    datasets = _datasets()
    geometry, header = dataset.manifest.header.geometry, dataset.manifest.header
    _check_kind(dataset, image)
    dtype = image if image == "float32" else geometry.dtype
    features = datasets.Features.from_dict(voxel_features(geometry, header.conditional, dtype))
    rows = list(range(len(dataset)))
    batches = [rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)]
    arguments = {"dataset": dataset, "image": image, "batches": batches}
    if streaming:
        made = datasets.IterableDataset.from_generator(_rows, features, gen_kwargs=arguments)
    else:
        made = datasets.Dataset.from_generator(
            _rows, features, gen_kwargs=arguments, fingerprint=_fingerprint(dataset, dtype)
        )
    made.info.description = header.description
    made.info.license = header.licence.name
    made.info.citation = "\n".join(header.citations)
    return made


def from_hf(
    ds: Any,
    *,
    repo: str | os.PathLike[str] | None = None,
    manifest: Manifest | str | os.PathLike[str] | None = None,
    dtype: DType = "float32",
) -> Volumes | VolumeStream:
    """The samples of a published set, from what ``load_dataset`` read of it.

    Parameters
    ----------
    ds
        A ``datasets.Dataset`` or ``IterableDataset`` of pointers or voxels: either configuration
        of a published set, filtered and shuffled as you like, or what :func:`to_hf` gave.
    repo
        Where the packs lie that pointers lead into: ``ORG/NAME`` or ``ORG/NAME@REVISION`` on the
        Hub, the address of the published folder (``https://...``), or the folder itself.
    manifest
        Whose volumes these are; by default read from ``repo``.
    dtype
        Type of ``image``, as in :class:`synthbrain.SynthBrainDataset`.

    Returns
    -------
    Volumes or VolumeStream
        Map-style where ``ds`` is, else iterable; both are PyTorch datasets of dicts with
        ``image`` ``(1, x, y, z)``, the normalised covariates, ``id`` and ``made_by``.

    Raises
    ------
    UsageError
        The rows are neither pointers nor voxels, or pointers and no ``repo`` is given.
    SourceError
        The packs cannot be reached.
    DamagedShardError
        While iterating: bytes do not match their row's sha256.
    """
    if dtype not in _DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(_DTYPES)}; found {dtype!r}")
    wanted: tuple[str, ...]
    columns = list(ds.column_names or next(iter(ds), {}))
    if VOLUME in columns:
        wanted, read = (VOLUME, "scale"), _voxels
    elif set(POINTER) <= set(columns):
        wanted, read = POINTER, _pointed(repo, manifest)
    else:
        raise UsageError(
            f"rows hold neither {VOLUME!r} nor {', '.join(POINTER)}, found {', '.join(columns)}; "
            "pass the rows of a published set"
        )
    kept = [name for name in (*_COMMON, *wanted) if name in columns]
    rows = ds.select_columns(kept).with_format("arrow")
    kind = VolumeStream if isinstance(ds, _datasets().IterableDataset) else Volumes
    return kind(rows, _Reader(read, dtype))


class Volumes(torch.utils.data.Dataset[Any]):
    """Rows of a published set as samples; see :func:`from_hf`."""

    def __init__(self, rows: Any, reader: _Reader) -> None:
        self.rows, self.reader = rows, reader

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        """The sample at ``index``."""
        return self.reader.sample(self.rows[index])


class VolumeStream(torch.utils.data.IterableDataset[Any]):
    """Rows of a published set as samples, the next ones read ahead; see :func:`from_hf`."""

    def __init__(self, rows: Any, reader: _Reader) -> None:
        self.rows, self.reader = rows, reader

    def __iter__(self) -> Iterator[Sample]:
        pending: deque[Future[Sample]] = deque()
        with ThreadPoolExecutor(_AHEAD, thread_name_prefix="synthbrain-hf") as pool:
            for row in self.rows:
                pending.append(pool.submit(self.reader.sample, row))
                if len(pending) > _AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch a shuffled stream is shuffled for."""
        self.rows.set_epoch(epoch)


Stored = tuple[Array, float]
"""Values as stored, and the scale that makes intensities of them."""


@dataclass(frozen=True)
class _Reader:
    """Makes samples of rows, given as Arrow tables of one row: nothing else keeps all types."""

    read: Callable[[pa.Table], Stored]
    dtype: DType

    def sample(self, row: pa.Table) -> Sample:
        stored, scale = self.read(row)
        if self.dtype == "uint8":
            if stored.dtype != np.uint8:
                raise UsageError(f"volumes are {stored.dtype}, not bytes; use dtype='float32'")
            values = stored.copy()
        else:
            values = np.multiply(stored, np.float32(scale), dtype=np.float32)
        image = torch.from_numpy(values).to(_DTYPES[self.dtype]).unsqueeze(0)
        told = {name: _cell(row, name) for name in _COMMON if name in row.column_names}
        covariates = {name: np.float32(told.pop(name)) for name in NAMES if name in told}
        return {"image": image, **covariates, **told}


@dataclass(frozen=True)
class _Packs:
    """Reads the volumes that pointers lead to."""

    base: str
    geometry: Geometry
    files: dict[str, Bytes] = field(default_factory=dict, repr=False)

    @cached_property
    def layout(self) -> ShardLayout:
        return ShardLayout(self.geometry.shape, self.geometry.chunks, self.geometry.dtype)

    def __call__(self, row: pa.Table) -> Stored:
        pack, offset, size, sha256 = (_cell(row, name) for name in POINTER)
        if pack not in self.files:
            self.files[pack] = open_bytes(f"{self.base}/{pack}")
        ((_, shard),) = self.files[pack].read([Extent(offset, size)])
        found = hashlib.sha256(shard).hexdigest()
        if found != sha256:
            raise DamagedShardError(
                f"{pack} at {self.base} gave other bytes for {_cell(row, 'id')!r}: sha256 "
                f"{found[:12]}, expected {sha256[:12]}; load the rows and the packs of the same "
                "revision, or report it to the publisher"
            )
        scale = self.geometry.scale if self.layout.dtype == "uint8" else 1.0
        return self.layout.decode(shard), scale


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise UsageError(
            "Hugging Face datasets are not installed here; `pip install datasets`"
        ) from None
    return datasets


def _pointed(
    repo: str | os.PathLike[str] | None, manifest: Manifest | str | os.PathLike[str] | None
) -> _Packs:
    if repo is None:
        raise UsageError(
            "these rows point into packs; say where the packs lie: from_hf(ds, repo='ORG/NAME'), "
            "or load the configuration 'volumes'"
        )
    base = _base(repo)
    if manifest is None:
        file = open_bytes(f"{base}/manifest.json")
        ((_, text),) = file.read([Extent(0, file.size)])
        header = Header.parse(text.decode("utf-8", "replace"), file.name)
    else:
        opened = manifest if isinstance(manifest, Manifest) else Manifest.open(manifest)
        header = opened.header
    return _Packs(base, header.geometry)


def _base(repo: str | os.PathLike[str]) -> str:
    text = os.fspath(repo).rstrip("/")
    if "://" in text or (Path(text) / "manifest.json").is_file():
        return text
    return f"hf://datasets/{text}"


def _voxels(row: pa.Table) -> Stored:
    return _cell(row, VOLUME), _cell(row, "scale")


def _cell(row: pa.Table, name: str) -> Any:
    """The value of a column in a table of one row; nested lists as an array, without copying."""
    import pyarrow as pa

    values = row.column(name).combine_chunks()
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    if not pa.types.is_list(values.type):
        return values[0].as_py()
    counts = [len(values)]
    while pa.types.is_list(values.type):
        values = values.flatten()
        counts.append(len(values))
    shape = [inner // outer for outer, inner in pairwise(counts)]
    return values.to_numpy().reshape(shape)


def _rows(
    dataset: SynthBrainDataset, image: str, batches: Sequence[Sequence[int]]
) -> Iterator[dict[str, Any]]:
    manifest, resolver = dataset.manifest, dataset.resolver
    geometry = manifest.header.geometry
    for batch in batches:
        for index, stored in zip(batch, resolver.volumes(batch), strict=True):
            row = voxel_row(stored, geometry)
            if image == "float32":
                row |= {VOLUME: intensities(stored, geometry), "scale": 1.0}
            yield row | describe(manifest, index, resolver.maker_of(index))


def _check_kind(dataset: SynthBrainDataset, image: str) -> None:
    if dataset.representation != "image":
        raise UsageError("to_hf gives volumes; open the dataset with representation='image'")
    if image not in ("uint8", "float32"):
        raise UsageError(f"image must be 'uint8' or 'float32'; found {image!r}")
    stored = dataset.manifest.header.geometry.dtype
    if image == "uint8" and stored != "uint8":
        raise UsageError(f"volumes are stored as {stored}, not as bytes; use image='float32'")


def _fingerprint(dataset: SynthBrainDataset, dtype: str) -> str:
    """Names the copy in the cache of ``datasets``: the same volumes are not copied twice."""
    header = dataset.manifest.header
    facts = [
        synthbrain.__version__, header.rows_digest, dataset.resolver.made_by, dtype,
        header.geometry.model_dump(), header.conditional, dataset.manifest.positions.tolist(),
        header.content_digest or _published_files(dataset.resolver),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _published_files(resolver: Resolver) -> list[tuple[str, int]]:
    """Files of published volumes and their times: other than recipes, rows do not tell them."""
    rows = np.flatnonzero(resolver.manifest.table["origin"] == PUBLISHED)
    paths = [resolver.path(row) for row in rows.tolist()]
    return [(str(path.absolute()), path.stat().st_mtime_ns) for path in paths if path.exists()]
