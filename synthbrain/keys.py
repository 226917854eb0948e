"""Names that stand for the voxels of volumes, for what is computed from them and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from generation.covariates import NAMES
from synthbrain.rows import PUBLISHED

if TYPE_CHECKING:
    from synthbrain.dataset import SynthBrainDataset


def volume_keys(dataset: SynthBrainDataset, rows: Sequence[int] | None = None) -> list[str]:
    """What stands for each volume's voxels, the same wherever its row is met again.

    A recipe's are those of the generator, the covariates and the seed; a published volume's those
    of its manifest and its id, and, where the manifest tells neither contents nor a source, of its
    file: a scan that was prepared anew is another one.

    Parameters
    ----------
    dataset
        Where volumes come from.
    rows
        Which of its rows; all of them by default.

    Returns
    -------
    list of str
        Hex SHA-256, one a row.
    """
    header, resolver = dataset.manifest.header, dataset.resolver
    chosen = range(len(dataset)) if rows is None else rows
    table = dataset.table.iloc[list(chosen)]
    found = []
    for index, id, row in zip(chosen, table.index, table.to_dict("records"), strict=True):
        if row["origin"] != PUBLISHED:
            covariates = [float(row[name]).hex() for name in NAMES]
            facts = [resolver.made_by or "", *covariates, row["seed"]]
        else:
            facts = [header.name, header.rows_digest, id, header.content_digest]
            if header.content_digest is None and not header.sources:
                facts.append(_file(resolver.path(index)))
        found.append(hashlib.sha256("\n".join(map(str, facts)).encode()).hexdigest())
    return found


def _file(path: Path) -> str:
    """A volume's file and its time; empty where there is none."""
    return f"{path} {path.stat().st_mtime_ns}" if path.exists() else ""
