"""The volumes all readers share: made once, kept in a folder in every format asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from synthbrain import Manifest, SynthBrainDataset
from synthbrain.generators import identity
from synthbrain.quantise import Array, quantise

Box = tuple[slice, slice, slice]
SCALE = np.float32(1 / 255)


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
    def floats(self) -> Array:
        """Values as the generator gave them: float32 ``(n, x, y, z)``."""
        return np.load(self.folder / "floats.npy", mmap_mode="r")

    @property
    def codes(self) -> Array:
        """The same in 256 levels: uint8 ``(n, x, y, z)``."""
        return np.load(self.folder / "codes.npy", mmap_mode="r")

    @cached_property
    def patches(self) -> SynthBrainDataset:
        """Our dataset of patches, whose epoch decides which boxes everybody reads."""
        return self.dataset(patch_size=self.patch)

    def boxes(self) -> list[Box]:
        """The box of each volume in this epoch."""
        starts = [self.patches[i]["patch_start"].tolist() for i in range(self.count)]
        return [
            (slice(x, x + self.patch), slice(y, y + self.patch), slice(z, z + self.patch))
            for x, y, z in starts
        ]

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
            values = self.floats[i] if kind == "float32" else self.codes[i]
            values = values * SCALE if kind == "levels" else np.asarray(values)
            nib.save(nib.Nifti1Image(values, affine), path)

        return self.write(f"nifti-{kind}/{{}}.nii.gz", save)


def prepare(folder: Path, manifest: Manifest, generator: Any, patch: int) -> Volumes:
    """Make the volumes of a manifest, and store them our way."""
    shape = (len(manifest), *manifest.header.geometry.shape)
    volumes = Volumes(folder, manifest, identity(generator), patch)
    floats = np.lib.format.open_memmap(folder / "floats.npy", "w+", np.float32, shape)
    codes = np.lib.format.open_memmap(folder / "codes.npy", "w+", np.uint8, shape)
    resolver = SynthBrainDataset(manifest, generator=generator, store=folder / "store").resolver
    for i in range(len(manifest)):
        floats[i] = generator.sample(manifest.table.iloc[[i]])[0, 0].numpy()
        codes[i] = quantise(floats[i], manifest.header.geometry)
        resolver.store_of(i).write(int(manifest.positions[i]), np.asarray(codes[i]))
    return volumes


def scaled(codes: Array) -> Tensor:
    """Stored bytes as a float32 tensor ``(1, x, y, z)``: the one pass no byte reader avoids."""
    return torch.from_numpy(np.multiply(codes, SCALE, dtype=np.float32))[None]
