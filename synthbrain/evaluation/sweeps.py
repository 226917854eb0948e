"""Sweeps: one covariate moves, the seed and the others stay."""

from __future__ import annotations

from typing import Any

import numpy as np

from generation.covariates import NAMES
from generation.evaluate.leakage import sweep_rows
from synthbrain.dataset import SynthBrainDataset
from synthbrain.evaluation.sets import VolumeSet
from synthbrain.manifest import Manifest
from synthbrain.rows import make_table

VALUES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Normalised values a covariate takes; sexes are 0 and 1."""


def sweep(volumes: VolumeSet, covariate: str, seeds: int) -> VolumeSet:
    """Volumes of a sweep, made by who made the others.

    Parameters
    ----------
    volumes
        Those others: their means are what stays.
    covariate
        The one to move.
    seeds
        How many sweeps of it.

    Returns
    -------
    VolumeSet
        ``seeds`` times the values, seed by seed.
    """
    base = {name: float(volumes.table[name].mean()) for name in NAMES}
    values = (0.0, 1.0) if covariate == "sex" else VALUES
    rows = sweep_rows(covariate, values, base=base | {"sex": 0.0}, seeds=range(1, seeds + 1))
    columns: dict[str, Any] = {name: rows[name].to_numpy() for name in NAMES}
    columns |= {
        "seed": rows["seed"].to_numpy(),
        "split": np.full(len(rows), "test", dtype=object),
        "origin": np.full(len(rows), "recipe", dtype=object),
    }
    other = volumes.dataset.manifest.header
    name = f"sweep-{covariate}".replace("_", "-")
    header = other.model_copy(update={"name": name, "description": f"{covariate} is moved"})
    manifest = Manifest.create(header, make_table(columns, rows.index))
    resolver = volumes.dataset.resolver
    dataset = SynthBrainDataset(manifest, generator=resolver.generator, store=resolver.folder)
    return VolumeSet(f"sweep of {covariate}", dataset)
