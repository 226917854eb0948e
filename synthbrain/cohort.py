"""Drawing new rows: brains nobody has listed yet."""

from __future__ import annotations

import os
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

from generation.covariates import AGE, BRAIN_VOLUME, NAMES, VENTRICULAR_VOLUME, parse_sex
from synthbrain.errors import UsageError
from synthbrain.header import Geometry, Header, Licence
from synthbrain.manifest import Manifest, Range, check_name, resolve_range
from synthbrain.rows import make_table, split_of

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from synthbrain.joint import JointDistribution

_DECIMALS = 6
"""Covariates are kept to a millionth of their range, so that tables stay small."""


def draw_cohort(
    n: int,
    *,
    like: str | os.PathLike[str] | Manifest | None = None,
    age_range: Range | None = None,
    age_years: Range | None = None,
    sex: str | float | None = None,
    ventricular_range: Range | None = None,
    ventricular_mm3: Range | None = None,
    brain_range: Range | None = None,
    brain_mm3: Range | None = None,
    extrapolate: bool = False,
    seed: int = 0,
    name: str = "cohort",
) -> Manifest:
    """Draw a cohort of recipes from the joint distribution of the covariates.

    Ranges condition the distribution: asking for large ventricles yields mostly old brains,
    as in people. The same arguments give the same table everywhere.

    Parameters
    ----------
    n
        How many rows.
    like
        Draw from the distribution fitted to this manifest's rows; by default from the published
        one (:data:`synthbrain.joint.UK_BIOBANK`).
    age_range, ventricular_range, brain_range
        Normalised ``(low, high)``; a pair of equal numbers fixes the covariate.
    age_years, ventricular_mm3, brain_mm3
        The same in natural units.
    sex
        ``"female"``, ``"male"``, ``"balanced"`` (half and half), or as they occur (default).
    extrapolate
        Allow ranges beyond the trained ones, [0, 1].
    seed
        Seed of the draw, and of every row's own seed.
    name
        Name of the manifest and stem of its ids.

    Returns
    -------
    Manifest
        Not saved yet: see :meth:`synthbrain.Manifest.save`.

    Raises
    ------
    UsageError, CovariateError
        ``n`` below 1, or a range that makes no sense.

    Examples
    --------
    >>> old = draw_cohort(10, age_years=(75, 82), sex="balanced", seed=1, name="old")
    >>> float(old.table["sex"].sum())
    5.0
    """
    if not isinstance(n, Integral) or n < 1:
        raise UsageError(f"n must be at least 1, a whole number, found {n!r}")
    check_name(name)
    if like is not None and not isinstance(like, Manifest):
        like = Manifest.open(like)
    age = resolve_range(
        AGE, age_range, "age_range", age_years, "age_years", extrapolate=extrapolate
    )
    ventricles = resolve_range(
        VENTRICULAR_VOLUME, ventricular_range, "ventricular_range", ventricular_mm3,
        "ventricular_mm3", extrapolate=extrapolate,
    )  # fmt: skip
    brain = resolve_range(
        BRAIN_VOLUME, brain_range, "brain_range", brain_mm3, "brain_mm3", extrapolate=extrapolate
    )
    drawn = _distribution(like).draw(
        n,
        seed=seed,
        sex=sex if sex is None or sex == "balanced" else parse_sex(sex),
        age=age,
        ventricular_volume=ventricles,
        brain_volume=brain,
    )
    bounds = {"age": age, "ventricular_volume": ventricles, "brain_volume": brain}
    drawn = {name: rounded(drawn[name], bounds.get(name)) for name in NAMES}
    stem = "".join(letter for letter in name if letter.isalnum())
    table = recipes(drawn, stem=stem, seed=seed)
    geometry = like.header.geometry if like is not None else Geometry()
    header = Header(
        name=name,
        description=f"{n:,} recipes drawn with synthbrain",
        geometry=geometry,
        rows=n,
        licence=Licence(status="unknown", note=_LICENCE_NOTE),
        provenance={"drawn": _call(n, like, age, ventricles, brain, sex, seed)},
    )
    return Manifest.create(header, table)


_LICENCE_NOTE = (
    "rows drawn by whoever ran this: state a licence before publishing them; volumes made from "
    "them carry the terms of the generator that made them"
)


def recipes(drawn: dict[str, NDArray[Any]], *, stem: str, seed: int) -> pd.DataFrame:
    """A table of recipes from covariates: ids, splits, and 63-bit seeds keyed by ``seed``."""
    count = len(drawn["age"])
    ids = [f"{stem}{number:06d}" for number in range(count)]
    stream = np.random.Philox(key=np.array([seed, 0x5EED], np.uint64))
    columns = {name: drawn[name] for name in NAMES}
    columns["seed"] = _distinct_seeds(stream, count)
    columns["split"] = np.array([split_of(id) for id in ids], dtype=object)
    columns["origin"] = np.full(count, "recipe", dtype=object)
    return make_table(columns, ids)


def _distinct_seeds(stream: np.random.Philox, count: int) -> NDArray[np.int64]:
    """63-bit numbers that differ in their lowest 32 bits: noise is drawn from no more."""
    seeds = stream.random_raw(count) >> np.uint64(1)
    while True:
        _, first = np.unique(seeds.astype(np.uint32), return_index=True)
        if len(first) == count:
            return seeds.astype(np.int64)
        again = np.setdiff1d(np.arange(count), first)
        seeds[again] = stream.random_raw(len(again)) >> np.uint64(1)


def rounded(values: NDArray[Any], bounds: Range | None = None) -> NDArray[Any]:
    """Covariates as tables keep them: to six decimals, but never across the bounds asked for."""
    kept = np.round(values, _DECIMALS)
    return kept if bounds is None else np.clip(kept, *bounds)


def _distribution(like: Manifest | None) -> JointDistribution:
    from synthbrain.joint import UK_BIOBANK, JointDistribution

    if like is None:
        return UK_BIOBANK
    like.require_rows()
    return JointDistribution.fit(like.table)


def _call(
    n: int,
    like: Manifest | None,
    age: Range | None,
    ventricles: Range | None,
    brain: Range | None,
    sex: str | float | None,
    seed: int,
) -> str:
    source = like.name if like is not None else None
    return (
        f"n={n}, like={source}, age={age}, ventricular_volume={ventricles}, "
        f"brain_volume={brain}, sex={sex}, seed={seed}"
    )
