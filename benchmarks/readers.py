"""The ways to deliver volumes that ``loading.py`` times, each reading the same voxels.

A factory writes what its library reads, once, and gives a :class:`Reader`. Factories import their
library themselves, so that a missing one only costs its own row.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from synthbrain import Manifest, SynthBrainDataset
from synthbrain.quantise import quantise

Box = tuple[slice, slice, slice]
SCALE = np.float32(1 / 255)


@dataclass(frozen=True)
class Reader:
    """One way to get a volume from disk as a float32 tensor ``(1, x, y, z)`` in [0, 1].

    Parameters
    ----------
    stored
        What lies on disk.
    compressed
        Whether that is compressed when it is read.
    whole
        Delivers volume ``i``; streams deliver the next one, in order.
    patch
        Delivers a box of volume ``i``.
    partial
        Whether ``patch`` leaves the rest of the volume unread; else it loads and crops.
    files
        The files of all volumes, to weigh them.
    each
        How many volumes one call of ``whole`` delivers (the first is returned).
    """

    stored: str
    compressed: bool
    files: Sequence[Path]
    whole: Callable[[int], Tensor] | None
    patch: Callable[[int, Box], Tensor] | None = None
    partial: bool = False
    each: int = 1


@dataclass(frozen=True)
class Volumes:
    """The volumes all readers share: their values, and a folder for their files."""

    folder: Path
    manifest: Manifest
    maker: str
    patch: int

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.manifest)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels of one volume."""
        return self.manifest.header.geometry.shape

    @property
    def floats(self) -> np.ndarray:
        """Values as the generator gave them: float32 ``(n, x, y, z)``."""
        return np.load(self.folder / "floats.npy", mmap_mode="r")

    @property
    def codes(self) -> np.ndarray:
        """The same in 256 levels: uint8 ``(n, x, y, z)``."""
        return np.load(self.folder / "codes.npy", mmap_mode="r")

    def dataset(self, **options: Any) -> SynthBrainDataset:
        """Our dataset of these volumes."""
        store = self.folder / "store"
        return SynthBrainDataset(
            self.manifest, generator=None, made_by=self.maker, store=store, **options
        )

    def write(self, name: str, save: Callable[[Path, int], None]) -> list[Path]:
        """Write one file per volume under ``name`` (a template with ``{}``), unless it is there."""
        paths = [self.folder / name.format(i) for i in range(self.count)]
        for i, path in enumerate(paths):
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                scratch = path.with_name("partial-" + path.name)
                save(scratch, i)
                scratch.rename(path)
        return paths

    def nifti(self, kind: str) -> list[Path]:
        """NIfTI files as nibabel writes them: ``"float32"``, ``"levels"`` or ``"uint8"``."""
        import nibabel as nib

        affine = np.array(self.manifest.header.geometry.affine)

        def save(path: Path, i: int) -> None:
            if kind == "float32":
                values = self.floats[i]
            else:
                values = self.codes[i] * SCALE if kind == "levels" else self.codes[i]
            nib.save(nib.Nifti1Image(np.asarray(values), affine), path)

        return self.write(f"nifti-{kind}/{{}}.nii.gz", save)


def prepare(folder: Path, manifest: Manifest, generator: Any, patch: int) -> Volumes:
    """Make the volumes of a manifest and store them our way; the readers write their own files."""
    from synthbrain.generators import identity

    shape = (len(manifest), *manifest.header.geometry.shape)
    volumes = Volumes(folder, manifest, identity(generator), patch)
    floats = np.lib.format.open_memmap(folder / "floats.npy", "w+", np.float32, shape)
    codes = np.lib.format.open_memmap(folder / "codes.npy", "w+", np.uint8, shape)
    resolver = SynthBrainDataset(
        manifest, generator=generator, store=folder / "store"
    ).resolver
    for i in range(len(manifest)):
        floats[i] = generator.sample(manifest.table.iloc[[i]])[0, 0].numpy()
        codes[i] = quantise(floats[i], manifest.header.geometry)
        resolver.store_of(i).write(int(manifest.positions[i]), np.asarray(codes[i]))
    return volumes


def scaled(codes: np.ndarray) -> Tensor:
    """Stored bytes as a float32 tensor ``(1, x, y, z)``: the one pass no byte reader avoids."""
    return torch.from_numpy(np.multiply(codes, SCALE, dtype=np.float32))[None]


def cropped(whole: Callable[[int], Tensor]) -> Callable[[int, Box], Tensor]:
    """Patches for a library that cannot read part of a volume."""
    return lambda i, box: whole(i)[(slice(None), *box)].contiguous()


def memory_map(volumes: Volumes) -> Reader:
    """Raw bytes, mapped, copied and cast: the limit."""
    paths = volumes.write("raw/{}.raw", lambda path, i: volumes.codes[i].tofile(path))

    def mapped(i: int) -> np.ndarray:
        return np.memmap(paths[i], np.uint8, "r", shape=volumes.shape)

    return Reader(
        "raw uint8", False, paths,
        lambda i: scaled(mapped(i)), lambda i, box: scaled(mapped(i)[box]), partial=True,
    )  # fmt: skip


def ours(volumes: Volumes) -> Reader:
    """``ds[i]``, whole and with ``patch_size=``."""
    ds, patches = volumes.dataset(), volumes.dataset(patch_size=volumes.patch)
    return Reader(
        "our store: uint8, zstd, checksums", True, _shards(ds),
        lambda i: ds[i]["image"], lambda i, box: patches[i]["image"], partial=True,
    )  # fmt: skip


def ours_batch(volumes: Volumes, size: int = 4) -> Reader:
    """``ds.__getitems__``, as a DataLoader calls it."""
    ds = volumes.dataset()

    def whole(i: int) -> Tensor:
        batch = ds.__getitems__([(i + k) % volumes.count for k in range(size)])
        return batch[0]["image"]

    return Reader("our store", True, _shards(ds), whole, each=size)


def _shards(ds: SynthBrainDataset) -> list[Path]:
    return [ds.resolver.path(i) for i in range(len(ds))]


def zarr_python(volumes: Volumes, pipeline: str | None = None) -> Reader:
    """zarr-python on our very store, the block kept open."""
    import zarr

    ds = volumes.dataset()
    paths = _shards(ds)
    options = {"codec_pipeline.path": pipeline} if pipeline else {}
    with zarr.config.set(options):
        block: Any = zarr.open_array(paths[0].parent, mode="r")
    slots = [int(path.name.split(".")[1]) for path in paths]
    return Reader(
        "our store", True, paths,
        lambda i: scaled(block[slots[i]]), lambda i, box: scaled(block[(slots[i], *box)]),
        partial=True,
    )  # fmt: skip


def zarr_zarrs(volumes: Volumes) -> Reader:
    """The same through the Rust codecs of zarrs."""
    import zarrs  # noqa: F401

    return zarr_python(volumes, "zarrs.ZarrsCodecPipeline")


def nibabel(volumes: Volumes, kind: str = "float32") -> Reader:
    """``nibabel.load``; patches by slicing ``dataobj``."""
    import nibabel as nib

    paths = volumes.nifti(kind)
    floats = kind != "uint8"

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values))[None] if floats else scaled(values)

    def whole(i: int) -> Tensor:
        return tensor(np.asarray(nib.load(paths[i]).dataobj))

    def patch(i: int, box: Box) -> Tensor:
        return tensor(np.asarray(nib.load(paths[i]).dataobj[box]))

    stored = {"float32": "float32", "levels": "float32 of 256 levels", "uint8": "uint8"}[kind]
    return Reader(f".nii.gz, {stored}", True, paths, whole, patch, partial=True)


def nibabel_levels(volumes: Volumes) -> Reader:
    """nibabel on float32 files that hold only 256 values, which compress better."""
    return nibabel(volumes, "levels")


def nibabel_uint8(volumes: Volumes) -> Reader:
    """nibabel on uint8 files: what converting the set, without this package, would give."""
    return nibabel(volumes, "uint8")


def monai_load(volumes: Volumes) -> Reader:
    """``LoadImaged`` and ``EnsureChannelFirstd``."""
    paths = volumes.nifti("float32")
    load = _monai_load()

    def whole(i: int) -> Tensor:
        return load({"image": str(paths[i])})["image"].as_tensor()

    return Reader(".nii.gz, float32", True, paths, whole, cropped(whole))


def monai_persistent(volumes: Volumes) -> Reader:
    """``PersistentDataset`` whose cache is warm."""
    from monai.data import PersistentDataset

    items = [{"image": str(path)} for path in volumes.nifti("float32")]
    cache = volumes.folder / "persistent"
    ds = PersistentDataset(items, _monai_load(), cache_dir=cache)
    for i in range(volumes.count):
        ds[i]

    def whole(i: int) -> Tensor:
        return ds[i]["image"].as_tensor()

    return Reader(".pt cache, float32", False, sorted(cache.glob("*.pt")), whole, cropped(whole))


def _monai_load() -> Any:
    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged

    return Compose([LoadImaged("image"), EnsureChannelFirstd("image")])


def torchio(volumes: Volumes) -> Reader:
    """A ``Subject`` with a ``ScalarImage``; patches by ``Crop``, which loads the whole."""
    import torchio as tio

    paths = volumes.nifti("float32")

    def whole(i: int) -> Tensor:
        return tio.Subject(image=tio.ScalarImage(paths[i]))["image"].data

    def patch(i: int, box: Box) -> Tensor:
        subject = tio.Subject(image=tio.ScalarImage(paths[i]))
        margins = [m for s, n in zip(box, volumes.shape, strict=True) for m in (s.start, n - s.stop)]
        return tio.Crop(tuple(margins))(subject)["image"].data.contiguous()

    return Reader(".nii.gz, float32", True, paths, whole, patch)


def hf_arrow(volumes: Volumes) -> Reader:
    """Hugging Face ``datasets``, map-style: an ``Array4D`` column of uint8, memory-mapped Arrow."""
    import datasets

    folder = volumes.folder / "arrow"
    if not folder.exists():
        features = datasets.Features({"image": datasets.Array4D((1, *volumes.shape), "uint8")})
        rows = {"image": [np.asarray(codes)[None] for codes in volumes.codes]}
        datasets.Dataset.from_dict(rows, features).save_to_disk(str(folder))
    ds = datasets.load_from_disk(str(folder)).with_format("numpy")

    def whole(i: int) -> Tensor:
        return scaled(ds[i]["image"][0])

    files = sorted(folder.glob("*.arrow"))
    return Reader("Arrow, Array4D of uint8", False, files, whole, cropped(whole))


def hf_parquet(volumes: Volumes) -> Reader:
    """Hugging Face ``datasets``, streaming a binary column of zstd-compressed Parquet."""
    import datasets
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
    whole = _stream(
        lambda: (np.frombuffer(row["image"], np.uint8).reshape(volumes.shape) for row in ds)
    )
    return Reader("Parquet, zstd, bytes of uint8", True, [path], whole, cropped(whole))


def webdataset(volumes: Volumes, kind: str = "npy") -> Reader:
    """``WebDataset`` on one tar, streamed in order."""
    import webdataset as wds

    path = volumes.folder / f"{kind}.tar"
    if not path.exists():
        with tarfile.open(path, "w") as tar:
            for i in range(volumes.count):
                data = _member(volumes, kind, i)
                info = tarfile.TarInfo(f"{i:06d}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    decoders = {"npy": _npy, "npy.gz": lambda data: _npy(gzip.decompress(data)), "nii.gz": _nifti}

    def rows() -> Iterable[np.ndarray]:
        ds = wds.WebDataset(str(path), shardshuffle=False).to_tuple(kind).map_tuple(decoders[kind])
        return (values for (values,) in ds)

    whole = _stream(rows)
    kinds = {"npy": "uint8 .npy", "npy.gz": "uint8 .npy.gz", "nii.gz": "float32 .nii.gz"}
    return Reader(f"tar of {kinds[kind]}", kind != "npy", [path], whole, cropped(whole))


def webdataset_gz(volumes: Volumes) -> Reader:
    """The same with compressed arrays."""
    return webdataset(volumes, "npy.gz")


def webdataset_nifti(volumes: Volumes) -> Reader:
    """The same with the NIfTI files."""
    return webdataset(volumes, "nii.gz")


def _member(volumes: Volumes, kind: str, i: int) -> bytes:
    if kind == "nii.gz":
        return volumes.nifti("float32")[i].read_bytes()
    buffer = io.BytesIO()
    np.save(buffer, volumes.codes[i])
    data = buffer.getvalue()
    return gzip.compress(data, 1) if kind == "npy.gz" else data


def _npy(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data))


def _nifti(data: bytes) -> np.ndarray:
    import nibabel as nib

    return np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(data)).dataobj)


def _stream(rows: Callable[[], Iterable[np.ndarray]]) -> Callable[[int], Tensor]:
    """Whatever comes next, over and over: streams have no random access."""
    stream: Iterator[np.ndarray] = itertools.chain.from_iterable(rows() for _ in itertools.count())

    def following(_: int) -> Tensor:
        values = next(stream)
        if values.dtype == np.uint8:
            return scaled(values)
        return torch.from_numpy(np.ascontiguousarray(values))[None]

    return following
