"""The ways to deliver volumes that ``loading.py`` times, each reading the same voxels.

A factory writes what its library reads, once, and gives a :class:`Reader`. Factories import their
library themselves, so that a missing one only costs its own row.
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from volumes import Box, Volumes, scaled

from synthbrain import SynthBrainDataset
from synthbrain.quantise import Array

Pass = Callable[[Sequence[int]], Iterator[tuple[int, Tensor]]]
"""Delivers each of the volumes asked for, as (number, tensor); streams do so in their own order."""

PatchPass = Callable[[Sequence[int], Sequence[Box]], Iterator[tuple[int, Tensor]]]
"""The same for one box of each volume; boxes are numbered like volumes."""


@dataclass(frozen=True)
class Reader:
    """One way to get volumes from disk as float32 tensors ``(1, x, y, z)`` in [0, 1].

    Parameters
    ----------
    stored, compressed, files
        What lies on disk, whether it is compressed when it is read, and all its files.
    whole, patches
        Deliver whole volumes and patches; without ``patches`` whole volumes are cropped.
    how
        How patches are read.
    """

    stored: str
    compressed: bool
    files: Sequence[Path]
    whole: Pass
    patches: PatchPass | None = None
    how: str = "loads all, crops"

    def crops(self, order: Sequence[int], boxes: Sequence[Box]) -> Iterator[tuple[int, Tensor]]:
        """Patches, by the library's own means or by cropping."""
        if self.patches is not None:
            yield from self.patches(order, boxes)
            return
        for i, image in self.whole(order):
            yield i, image[(slice(None), *boxes[i])].contiguous()


def each(read: Callable[[int], Tensor]) -> Pass:
    """A pass that reads one volume after the other."""
    return lambda order: ((i, read(i)) for i in order)


def each_box(read: Callable[[int, Box], Tensor]) -> PatchPass:
    """A pass that reads one box after the other."""
    return lambda order, boxes: ((i, read(i, boxes[i])) for i in order)


def stream(rows: Callable[[], Iterable[Array]]) -> Pass:
    """A pass over what has no random access: always from the start to the end."""

    def whole(_: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        for i, values in enumerate(rows()):
            yield i, scaled(values) if values.dtype == np.uint8 else torch.from_numpy(values)[None]

    return whole


def memory_map(volumes: Volumes) -> Reader:
    """Raw bytes, mapped, copied and cast: the limit."""
    paths = volumes.write("raw/{}.raw", lambda path, i: volumes.codes[i].tofile(path))

    def mapped(i: int) -> Array:
        return np.memmap(paths[i], np.uint8, "r", shape=volumes.shape)

    return Reader(
        "raw uint8", False, paths, each(lambda i: scaled(mapped(i))),
        each_box(lambda i, box: scaled(mapped(i)[box])), "maps the box",
    )  # fmt: skip


def ours(volumes: Volumes, batch: int = 1) -> Reader:
    """``ds[i]``, or ``ds.__getitems__`` as a DataLoader calls it; patches with ``patch_size=``."""
    ds = volumes.dataset()

    def read(ds: SynthBrainDataset, order: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        if batch == 1:
            yield from ((i, ds[i]["image"]) for i in order)
            return
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            yield from zip(rows, [row["image"] for row in ds.__getitems__(rows)], strict=True)

    return Reader(
        "our store (uint8, zstd, crc32c)", True, _shards(ds), lambda order: read(ds, order),
        lambda order, _: read(volumes.patches, order), "decodes touched chunks",
    )  # fmt: skip


def _shards(ds: SynthBrainDataset) -> list[Path]:
    return [ds.resolver.path(i) for i in range(len(ds))]


def zarr_python(volumes: Volumes) -> Reader:
    """zarr-python on our very store, the block kept open."""
    return _zarr(volumes, {})


def zarr_rust(volumes: Volumes) -> Reader:
    """The same through the Rust codecs of zarrs."""
    import zarrs  # noqa: F401

    return _zarr(volumes, {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})


def _zarr(volumes: Volumes, options: dict[str, str]) -> Reader:
    import zarr

    paths = _shards(volumes.dataset())
    with zarr.config.set(options):
        block: Any = zarr.open_array(paths[0].parent, mode="r")
    slots = [int(path.name.split(".")[1]) for path in paths]
    return Reader(
        "our store", True, paths, each(lambda i: scaled(block[slots[i]])),
        each_box(lambda i, box: scaled(block[(slots[i], *box)])), "decodes touched chunks",
    )  # fmt: skip


def nibabel(volumes: Volumes, kind: str = "float32") -> Reader:
    """``nibabel.load``; patches by slicing ``dataobj``.

    ``kind`` is ``"float32"`` for the generator's values, ``"levels"`` for float32 files that hold
    only 256 values and compress better, or ``"uint8"``.
    """
    import nibabel as nib

    paths = volumes.nifti(kind)
    load: Callable[[Path], Any] = nib.load
    tensor = scaled if kind == "uint8" else lambda values: torch.from_numpy(values)[None]
    return Reader(
        {"levels": "float32 of 256 levels"}.get(kind, kind) + " .nii.gz", True, paths,
        each(lambda i: tensor(np.asarray(load(paths[i]).dataobj))),
        each_box(lambda i, box: tensor(np.ascontiguousarray(load(paths[i]).dataobj[box]))),
        "slices dataobj: decompresses up to the box",
    )  # fmt: skip


def monai_load(volumes: Volumes) -> Reader:
    """``LoadImaged`` and ``EnsureChannelFirstd``."""
    paths = volumes.nifti("float32")
    load = _monai_load()
    whole = each(lambda i: _plain(load({"image": str(paths[i])})["image"]))
    return Reader("float32 .nii.gz", True, paths, whole)


def monai_persistent(volumes: Volumes) -> Reader:
    """``PersistentDataset`` of the same, its cache warm."""
    from monai.data import PersistentDataset  # type: ignore[attr-defined]

    items = [{"image": str(path)} for path in volumes.nifti("float32")]
    cache = volumes.folder / "persistent"
    ds = PersistentDataset(items, _monai_load(), cache_dir=cache)
    for i in range(volumes.count):
        ds[i]
    whole = each(lambda i: _plain(ds[i]["image"]))
    return Reader("float32 .pt, the cache", False, sorted(cache.glob("*.pt")), whole)


def _monai_load() -> Any:
    from monai import transforms

    modules: Any = transforms
    return modules.Compose([modules.LoadImaged("image"), modules.EnsureChannelFirstd("image")])


def _plain(image: Any) -> Tensor:
    return image.as_tensor() if hasattr(image, "as_tensor") else image


def torchio(volumes: Volumes) -> Reader:
    """A ``Subject`` with a ``ScalarImage``; patches by ``Crop``."""
    import torchio as tio

    paths = volumes.nifti("float32")

    def patch(i: int, box: Box) -> Tensor:
        margins = [
            m for s, n in zip(box, volumes.shape, strict=True) for m in (s.start, n - s.stop)
        ]
        return tio.Crop(tuple(margins))(subject(i))["image"].data.contiguous()

    def subject(i: int) -> Any:
        return tio.Subject(image=tio.ScalarImage(paths[i]))

    whole = each(lambda i: subject(i)["image"].data)
    return Reader("float32 .nii.gz", True, paths, whole, each_box(patch), "loads all, Crop")


def hf_arrow(volumes: Volumes) -> Reader:
    """Hugging Face ``datasets``, map-style: an ``Array4D`` column of uint8, memory-mapped Arrow."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import datasets  # type: ignore[import-untyped]

    datasets.disable_progress_bars()
    folder = volumes.folder / "arrow"
    if not folder.exists():
        features = datasets.Features({"image": datasets.Array4D((1, *volumes.shape), "uint8")})
        rows = {"image": [np.asarray(codes)[None] for codes in volumes.codes]}
        datasets.Dataset.from_dict(rows, features).save_to_disk(str(folder))
    ds = datasets.load_from_disk(str(folder)).with_format("numpy", dtype=np.uint8)
    whole = each(lambda i: scaled(ds[i]["image"][0]))
    return Reader("Arrow, Array4D of uint8", False, sorted(folder.glob("*.arrow")), whole)


def hf_parquet(volumes: Volumes) -> Reader:
    """Hugging Face ``datasets``, streaming a binary column of zstd-compressed Parquet."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import datasets  # type: ignore[import-untyped]
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = volumes.folder / "volumes.parquet"
    if not path.exists():
        table = pa.table({"image": pa.array([c.tobytes() for c in volumes.codes], pa.binary())})
        pq.write_table(table, path, compression="zstd", row_group_size=1, use_dictionary=False)
    ds = datasets.load_dataset(
        "parquet", data_files=str(path), split="train", streaming=True,
        cache_dir=str(volumes.folder / "hf"),
    )  # fmt: skip

    def rows() -> Iterator[Array]:
        return (np.frombuffer(row["image"], np.uint8).reshape(volumes.shape) for row in ds)

    return Reader("Parquet, binary column of uint8, zstd", True, [path], stream(rows))


def webdataset(volumes: Volumes, kind: str = "npy") -> Reader:
    """``WebDataset`` on one tar of ``"npy"`` or ``"npy.gz"`` (uint8), or ``"nii.gz"`` (float32)."""
    import webdataset as wds  # type: ignore[import-untyped]

    path = volumes.folder / f"{kind}.tar"
    if not path.exists():
        with tarfile.open(path, "w") as tar:
            for i in range(volumes.count):
                data = _encode(volumes, kind, i)
                info = tarfile.TarInfo(f"{i:06d}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    def rows() -> Iterator[Array]:
        for (data,) in wds.WebDataset(str(path), shardshuffle=False).to_tuple(kind):
            yield _decode(data, kind)

    stored = f"tar of {'float32' if kind == 'nii.gz' else 'uint8'} .{kind}"
    return Reader(stored, kind != "npy", [path], stream(rows))


def _encode(volumes: Volumes, kind: str, i: int) -> bytes:
    if kind == "nii.gz":
        return volumes.nifti("float32")[i].read_bytes()
    buffer = io.BytesIO()
    np.save(buffer, volumes.codes[i])
    return gzip.compress(buffer.getvalue(), 1) if kind == "npy.gz" else buffer.getvalue()


def _decode(data: bytes, kind: str) -> Array:
    data = gzip.decompress(data) if kind.endswith(".gz") else data
    if not kind.startswith("nii"):
        return np.load(io.BytesIO(data))
    import nibabel as nib

    return np.asarray(nib.Nifti1Image.from_bytes(data).dataobj)


LIMIT, OURS, NIBABEL = "copy and cast (limit)", "synthbrain, `ds[i]`", "nibabel"

READERS: dict[str, Callable[[Volumes], Reader]] = {
    LIMIT: memory_map,
    OURS: ours,
    "synthbrain, batches of 4": partial(ours, batch=4),
    "zarr-python": zarr_python,
    "zarr-python with zarrs": zarr_rust,
    NIBABEL: nibabel,
    "nibabel, 256 levels": partial(nibabel, kind="levels"),
    "nibabel, uint8 files": partial(nibabel, kind="uint8"),
    "MONAI LoadImaged": monai_load,
    "MONAI PersistentDataset": monai_persistent,
    "TorchIO Subject": torchio,
    "Hugging Face datasets, map-style": hf_arrow,
    "Hugging Face datasets, streaming": hf_parquet,
    "WebDataset, .npy": webdataset,
    "WebDataset, .npy.gz": partial(webdataset, kind="npy.gz"),
    "WebDataset, .nii.gz": partial(webdataset, kind="nii.gz"),
}
"""Every method by the name of its row."""


def open_readers(volumes: Volumes) -> dict[str, Reader | None]:
    """All readers, their files written; None where the library is not installed."""
    readers: dict[str, Reader | None] = {}
    for name, factory in READERS.items():
        try:
            readers[name] = factory(volumes)
        except ImportError:
            readers[name] = None
    return readers
