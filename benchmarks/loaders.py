"""The DataLoaders that ``workers.py`` times, each of the same volumes in its library's own format.

A factory writes what its library reads, once, and gives a :class:`Way`. Factories import their
library themselves, so that a missing one only costs its own row.
"""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate
from volumes import Box, Volumes

from synthbrain import SynthBrainDataset
from synthbrain.quantise import Array, as_float
from synthbrain.sampling import SharedGenerator

BATCH = 4
"""Volumes in a batch, and in a file of the libraries that keep several in one."""

Batches = Iterable[dict[str, Any]]
Decode = Callable[[dict[str, Any]], tuple[int, Array]]


@dataclass(frozen=True)
class Way:
    """One way to have batches through a DataLoader.

    Parameters
    ----------
    stored
        What lies on disk.
    folder
        Where that lies.
    loader
        Opens it: takes the number of workers and whether patches are wanted, gives what yields
        batches with ``row``, ``(n,)``, and ``image``, ``(n, 1, x, y, z)`` float32 in [0, 1].
    forget
        Removes what the library unpacks for itself, so that an epoch is its first one again.
    """

    stored: str
    folder: Path
    loader: Callable[[int, bool], Batches]
    forget: Callable[[], None] = lambda: None

    @property
    def files(self) -> list[Path]:
        """Everything below the folder."""
        return [path for path in sorted(self.folder.rglob("*")) if path.is_file()]


@dataclass(frozen=True)
class Collate:
    """Decodes and crops in the worker, and leaves casting to the process that trains.

    This is the best a user of these libraries can do: a quarter of the bytes of float32 crosses.
    """

    decode: Decode
    boxes: Sequence[Box] | None

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        decoded = [self._sample(*self.decode(sample)) for sample in samples]
        return dict(default_collate(decoded))

    def _sample(self, row: int, values: Array) -> dict[str, Any]:
        box = ... if self.boxes is None else self.boxes[row]
        return {"row": row, "image": torch.from_numpy(np.array(values[box])[None])}


class Cast:
    """Batches of a loader of bytes, as float32 in [0, 1]."""

    def __init__(self, loader: Batches) -> None:
        self.loader = loader

    def __iter__(self) -> Any:
        for batch in self.loader:
            yield {**batch, "image": as_float(batch["image"])}


def options(workers: int) -> dict[str, Any]:
    """What all DataLoaders are given."""
    chosen: dict[str, Any] = {"batch_size": BATCH, "num_workers": workers}
    if workers:
        chosen |= {"persistent_workers": True, "multiprocessing_context": "fork", "timeout": 120}
    return chosen


def ours(volumes: Volumes, *, plain: bool = False, generator: Any = None) -> Way:
    """``ds.loader()``, or a plain DataLoader, with a generator that nothing is missing for."""

    def opened(workers: int, patches: bool) -> Batches:
        ds = SynthBrainDataset(
            volumes.manifest, store=volumes.folder / "store",
            generator=generator, made_by=None if generator else volumes.maker,
            patch_size=volumes.patch if patches else None,
        )  # fmt: skip
        rows = {id: row for row, id in enumerate(volumes.manifest.table.index)}
        make = partial(DataLoader, ds) if plain else ds.loader
        return Numbered(make(shuffle=True, **options(workers)), rows)

    return Way("our store (uint8, zstd, crc32c)", volumes.folder / "store", opened)


class Numbered:
    """Batches with the numbers of their rows besides the ids."""

    def __init__(self, loader: Batches, rows: dict[str, int]) -> None:
        self.loader, self.rows = loader, rows

    def __iter__(self) -> Any:
        for batch in self.loader:
            yield {**batch, "row": torch.tensor([self.rows[id] for id in batch["id"]])}


def mosaic(volumes: Volumes, compression: str | None = None) -> Way:
    """MosaicML Streaming; compressed shards are unpacked to disk when they are first needed."""
    import streaming

    folder = volumes.folder / f"mds-{compression}"
    columns = {"row": "int", "image": f"ndarray:uint8:{','.join(map(str, volumes.shape))}"}
    if not folder.exists():
        size = BATCH * (volumes.codes[0].nbytes + 100)
        with streaming.MDSWriter(
            out=str(folder), columns=columns, compression=compression, size_limit=size
        ) as out:
            for row in range(volumes.count):
                out.write(_item(volumes, row))

    def opened(workers: int, patches: bool) -> Batches:
        ds = streaming.StreamingDataset(
            local=str(folder), batch_size=BATCH, shuffle=True, num_canonical_nodes=1
        )
        return Cast(
            streaming.StreamingDataLoader(
                ds, collate_fn=_collate(volumes, patches), **options(workers)
            )
        )

    def forget() -> None:
        for packed in folder.glob("*.zstd"):
            packed.with_suffix("").unlink(missing_ok=True)

    stored = "MDS of uint8" if compression is None else "MDS of uint8, zstd; unpacked on first use"
    return Way(stored, folder, opened, forget)


def litdata(volumes: Volumes, compression: str | None = None) -> Way:
    """LitData, each volume by itself where they are compressed."""
    import litdata as lit

    folder = volumes.folder / f"litdata-{compression}"
    if not folder.exists():
        lit.optimize(
            partial(_item, volumes), list(range(volumes.count)), output_dir=str(folder),
            chunk_size=BATCH, num_workers=1, compression=compression, verbose=False,
            compression_level="sample" if compression else None, start_method="fork",
            optimize_dns=False,
        )  # fmt: skip

    def opened(workers: int, patches: bool) -> Batches:
        cache = str(volumes.folder / "litdata-cache")
        ds = lit.StreamingDataset(str(folder), cache_dir=cache, shuffle=True)
        return Cast(
            lit.StreamingDataLoader(ds, collate_fn=_collate(volumes, patches), **options(workers))
        )

    packed = "" if compression is None else ", zstd"
    return Way(f"chunks of uint8{packed}", folder, opened)


def webdataset(volumes: Volumes, kind: str) -> Way:
    """``WebDataset`` on tars of ``"npy"`` or ``"npy.gz"``, shared out among workers."""
    import webdataset as wds

    folder = volumes.folder / f"webdataset-{kind}"
    for number, rows in _shards(volumes, folder):
        with tarfile.open(folder / f"{number:04d}.tar", "w") as tar:
            for row in rows:
                data = _packed(volumes.codes[row], kind)
                info = tarfile.TarInfo(f"{row:06d}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    def decode(sample: dict[str, Any]) -> tuple[int, Array]:
        data = gzip.decompress(sample[kind]) if kind.endswith(".gz") else sample[kind]
        return int(sample["__key__"]), np.load(io.BytesIO(data))

    def opened(workers: int, patches: bool) -> Batches:
        paths = [str(path) for path in sorted(folder.glob("*.tar"))]
        ds = wds.WebDataset(paths, shardshuffle=len(paths), empty_check=False)
        collate = _collate(volumes, patches, decode)
        return Cast(DataLoader(ds, collate_fn=collate, **options(workers)))

    return Way(f"tars of uint8 .{kind}", folder, opened)


def arrow(volumes: Volumes) -> Way:
    """Hugging Face ``datasets``, map-style: memory-mapped Arrow files."""
    import datasets

    datasets.disable_progress_bars()
    folder = volumes.folder / "arrow"
    if not folder.exists():
        features = datasets.Features(
            {"row": datasets.Value("int64"), "image": datasets.Array3D(volumes.shape, "uint8")}
        )
        rows = [_item(volumes, row) for row in range(volumes.count)]
        table = {name: [row[name] for row in rows] for name in features}
        datasets.Dataset.from_dict(table, features).save_to_disk(str(folder))

    def opened(workers: int, patches: bool) -> Batches:
        ds = datasets.load_from_disk(str(folder)).with_format(
            "numpy", columns=["image"], output_all_columns=True, dtype=np.uint8
        )
        collate = _collate(volumes, patches)
        return Cast(DataLoader(ds, shuffle=True, collate_fn=collate, **options(workers)))

    return Way("Arrow, Array3D of uint8", folder, opened)


def parquet(volumes: Volumes) -> Way:
    """Hugging Face ``datasets``, streaming binary columns of zstd-compressed Parquet files."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = volumes.folder / "parquet"
    for number, rows in _shards(volumes, folder):
        images = pa.array([volumes.codes[row].tobytes() for row in rows], pa.binary())
        pq.write_table(
            pa.table({"row": rows, "image": images}), folder / f"{number:04d}.parquet",
            compression="zstd", row_group_size=1, use_dictionary=False,
        )  # fmt: skip

    def decode(sample: dict[str, Any]) -> tuple[int, Array]:
        return sample["row"], np.frombuffer(sample["image"], np.uint8).reshape(volumes.shape)

    def opened(workers: int, patches: bool) -> Batches:
        ds = datasets.load_dataset(
            "parquet", data_files=[str(path) for path in sorted(folder.glob("*.parquet"))],
            split="train", streaming=True, cache_dir=str(volumes.folder / "hf"),
        )  # fmt: skip
        collate = _collate(volumes, patches, decode)
        return Cast(DataLoader(ds, collate_fn=collate, **options(workers)))

    return Way("Parquet, binary column of uint8, zstd", folder, opened)


def _item(volumes: Volumes, row: int) -> dict[str, Any]:
    return {"row": row, "image": np.array(volumes.codes[row])}


def _shards(volumes: Volumes, folder: Path) -> Iterable[tuple[int, range]]:
    """Numbers and rows of the files to write; none where the folder is there already."""
    if folder.exists():
        return
    folder.mkdir()
    for number, start in enumerate(range(0, volumes.count, BATCH)):
        yield number, range(start, min(start + BATCH, volumes.count))


def _packed(values: Array, kind: str) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return gzip.compress(buffer.getvalue(), 1) if kind == "npy.gz" else buffer.getvalue()


def _collate(volumes: Volumes, patches: bool, decode: Decode | None = None) -> Collate:
    decode = decode or (lambda sample: (int(sample["row"]), np.asarray(sample["image"])))
    return Collate(decode, volumes.boxes() if patches else None)


LOADER, PLAIN = "synthbrain, `ds.loader()`", "synthbrain, plain DataLoader (float32 hand-over)"
NAMED = "synthbrain, `ds.loader()`, generator by name"
SHARED = "synthbrain, `ds.loader()`, `SharedGenerator`"


def ways(generator: str) -> dict[str, Callable[[Volumes], Way]]:
    """Factories by the name of their row; ``generator`` is the name of who made the volumes."""
    return {
        LOADER: ours,
        PLAIN: partial(ours, plain=True),
        NAMED: partial(ours, generator=generator),
        SHARED: partial(ours, generator=SharedGenerator(generator, idle=5)),
        "MosaicML Streaming": mosaic,
        "MosaicML Streaming, zstd": partial(mosaic, compression="zstd:1"),
        "LitData": litdata,
        "LitData, zstd": partial(litdata, compression="zstd:1"),
        "WebDataset, .npy": partial(webdataset, kind="npy"),
        "WebDataset, .npy.gz": partial(webdataset, kind="npy.gz"),
        "Hugging Face datasets, map-style": arrow,
        "Hugging Face datasets, streaming": parquet,
    }
