"""The volumes an evaluation looks at."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from synthbrain.dataset import SynthBrainDataset
from synthbrain.keys import volume_keys

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class VolumeSet:
    """Volumes of a cohort, read one by one.

    Parameters
    ----------
    name
        What the report calls it.
    dataset
        Where its volumes come from; missing ones are made on the way.
    rows
        Which of the dataset's rows, in this order; all of them by default.
    """

    name: str
    dataset: SynthBrainDataset
    rows: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Tensor:
        """A volume, ``(1, x, y, z)`` float32 in [0, 1]."""
        image: Tensor = self.dataset[self._rows[index]]["image"]
        return image

    @property
    def _rows(self) -> tuple[int, ...] | range:
        return range(len(self.dataset)) if self.rows is None else self.rows

    @cached_property
    def table(self) -> pd.DataFrame:
        """Covariates and what else the manifest has, a row a volume."""
        return self.dataset.table.iloc[list(self._rows)]

    @property
    def ids(self) -> list[str]:
        """Of the rows."""
        return [str(id) for id in self.table.index]

    @property
    def conditional(self) -> bool:
        """Whether the covariates mean anything."""
        return self.dataset.manifest.header.conditional

    @property
    def affine(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Voxel to world, ``(4, 4)`` mm."""
        return np.asarray(self.dataset.manifest.header.geometry.affine, dtype=np.float64)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels of a volume."""
        return self.dataset.manifest.header.geometry.shape

    @property
    def made_by(self) -> str:
        """Identity of the generator; empty where volumes are published ones alone."""
        return self.dataset.resolver.made_by or ""

    @cached_property
    def keys(self) -> list[str]:
        """As :func:`synthbrain.keys.volume_keys`."""
        return volume_keys(self.dataset, self._rows)

    @property
    def identity(self) -> str:
        """Hex SHA-256 of all keys in their order."""
        return hashlib.sha256("\n".join(self.keys).encode()).hexdigest()

    def first(self, count: int) -> VolumeSet:
        """The first volumes of it, or all where there are no more."""
        return VolumeSet(self.name, self.dataset, tuple(self._rows[:count]))

    def part(self, which: list[int]) -> VolumeSet:
        """Some of its volumes."""
        return VolumeSet(self.name, self.dataset, tuple(self._rows[i] for i in which))

    def halves(self, seed: int) -> tuple[VolumeSet, VolumeSet]:
        """Its volumes dealt into two sets at random."""
        order = np.random.Generator(np.random.Philox(seed)).permutation(len(self)).tolist()
        middle = len(order) // 2
        return self.part(sorted(order[:middle])), self.part(sorted(order[middle:]))

    def split(self, name: str) -> VolumeSet:
        """Those of one split."""
        return self.part(np.flatnonzero(self.table["split"] == name).tolist())

    def without(self, split: str) -> VolumeSet:
        """Those of all other splits."""
        return self.part(np.flatnonzero(self.table["split"] != split).tolist())

    def facts(self) -> dict[str, Any]:
        """What the report says of it."""
        header = self.dataset.manifest.header
        return {
            "name": self.name,
            "volumes": len(self),
            "made_by": self.made_by or None,
            "rows_digest": header.rows_digest,
            "identity": self.identity,
        }
