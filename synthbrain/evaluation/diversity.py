"""How alike volumes are among themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from generation.evaluate.diversity import PUBLISHED, between_pairs, summarise
from generation.evaluate.gradient_ssim import GradientSsim
from generation.evaluate.pairing import pairs
from generation.evaluate.ssim import Ssim
from synthbrain.errors import UsageError
from synthbrain.evaluation.sets import VolumeSet
from synthbrain.progress import track

MEASURES = {"ms-ssim": Ssim, "4-g-r-ssim": GradientSsim}
"""Similarities by name."""


def check_measures(names: Sequence[str]) -> None:
    """See that there are such similarities.

    Raises
    ------
    UsageError
        There is none of some name.
    """
    unknown = [name for name in names if name not in MEASURES]
    if unknown:
        raise UsageError(f"unknown similarity {unknown[0]!r}; there are {', '.join(MEASURES)}")


def diversity(
    sets: Sequence[VolumeSet],
    folder: Path,
    *,
    measures: Sequence[str] = tuple(MEASURES),
    count: int = 1000,
    device: str = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Mean similarity over pairs of volumes, for each set.

    Parameters
    ----------
    sets
        The volumes.
    folder
        Where results of pairs are kept; what is there is not computed again.
    measures
        Some of :data:`MEASURES`.
    count
        Pairs a set.
    device
        Where to compare.
    seed
        Of the pairs.
    progress
        Show progress bars on standard error.

    Returns
    -------
    dict
        One row a set, with all variants of each measure.

    Raises
    ------
    UsageError
        There is no such measure.
    """
    check_measures(measures)
    rows = []
    for volumes in sets:
        row: dict[str, Any] = {"set": volumes.name, "volumes": len(volumes)}
        for name in measures:
            wanted = pairs(len(volumes), count, seed)
            compared = between_pairs(
                volumes, wanted, MEASURES[name](), folder=folder, identity=volumes.identity,
                device=device,
            )  # fmt: skip
            what = f"{name} of {volumes.name}"
            steps: Iterator[Any] = track(compared, total=len(wanted), what=what, show=progress)
            found = summarise(list(steps))
            row |= {variant: asdict(value) for variant, value in found.items()}
        rows.append(row)
    return {"rows": rows, "published": PUBLISHED}
