"""What moves when a covariate is moved: leakage in a cohort, and sweeps of one covariate.

A generator that honours its covariates moves the one that was asked to move, and no other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from generation.covariates import NAMES, by_name
from generation.errors import EvaluationError
from generation.evaluate.conditioning import pairs_of
from generation.evaluate.intervals import RESAMPLES, Bootstrap, IntervalEstimate

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike, NDArray

    from generation.evaluate.intervals import Values

    Groups = Sequence[NDArray[np.intp]]

_DEPENDENT = 1e6
"""Condition number of asked covariates that follow from one another."""


@dataclass(frozen=True, kw_only=True)
class Leakage:
    """Standardised partial slopes of measured covariates (rows) on asked ones (columns).

    Parameters
    ----------
    measured, asked
        Names of the rows and the columns.
    slopes, errors
        ``(m, k)``: the change of a measured covariate, in its standard deviations, as one asked
        covariate moves by one of its own and the others stay; and the standard errors.
    n
        ``(m,)``: rows each regression had.
    """

    measured: tuple[str, ...]
    asked: tuple[str, ...]
    slopes: Values
    errors: Values
    n: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What moves when one covariate is moved at fixed seeds.

    Parameters
    ----------
    covariate
        The one that was moved.
    n, n_failed
        Volumes, and those of them where some covariate was not measured.
    monotone
        Share of steps from one value to the next larger one at which the measured covariate rose;
        None where it was not measured at two values of any seed.
    slopes
        By measured covariate: the slope on the moved one within seeds, with the interval of a
        bootstrap over seeds. Where values are normalised, the moved covariate's own should be 1
        and the others' 0. None where it cannot be told.
    """

    covariate: str
    n: int
    n_failed: int
    monotone: float | None
    slopes: Mapping[str, IntervalEstimate | None]


def leakage(asked: Mapping[str, ArrayLike], measured: Mapping[str, ArrayLike]) -> Leakage:
    """How far each measured covariate follows each asked one, the other asked ones held fixed.

    Parameters
    ----------
    asked, measured
        By name, ``(n,)`` each, in any unit: the result does not depend on it. Rows without a finite
        measurement are left out of that measurement's regression.

    Raises
    ------
    EvaluationError
        An asked covariate is the same in all rows or follows from the others, a measured one is the
        same in all rows, rows are too few, or arrays differ in length.
    """
    if not asked or not measured:
        raise EvaluationError("there is nothing to compare: give asked and measured covariates")
    columns = {
        name: {key: pairs_of(given, values) for key, given in asked.items()}
        for name, values in measured.items()
    }
    found = [_partial_slopes(name, pairs) for name, pairs in columns.items()]
    return Leakage(
        measured=tuple(measured),
        asked=tuple(asked),
        slopes=np.stack([slopes for slopes, _, _ in found]),
        errors=np.stack([errors for _, errors, _ in found]),
        n=tuple(count for _, _, count in found),
    )


def sweep_rows(
    covariate: str, values: Sequence[float], *, base: Mapping[str, float], seeds: Sequence[int]
) -> pd.DataFrame:
    """The rows of a sweep: one covariate takes every value at every seed, the others stay.

    Parameters
    ----------
    covariate
        The one to move.
    values
        Normalised values it takes.
    base
        Normalised values of the other covariates.
    seeds
        Of the volumes; each is a sweep of its own.

    Returns
    -------
    pandas.DataFrame
        Indexed by id, with the covariates and ``seed``, as generators take it.

    Raises
    ------
    CovariateError
        There is no such covariate.
    EvaluationError
        There are fewer than two values, no seeds, or a covariate without a value.
    """
    import pandas as pd

    by_name(covariate)
    if len(set(values)) < 2 or not seeds:
        raise EvaluationError(
            f"a sweep needs two different values and a seed, found {len(set(values))} values and "
            f"{len(seeds)} seeds"
        )
    absent = [name for name in NAMES if name != covariate and name not in base]
    if absent:
        raise EvaluationError(f"base lacks {', '.join(absent)}; give the values that stay")
    rows = [
        {**{name: float(base.get(name, 0.0)) for name in NAMES}, covariate: float(value),
         "seed": int(seed)}
        for seed in seeds for value in values
    ]  # fmt: skip
    ids = [
        f"sweep-{covariate}-{seed}-{place:03d}" for seed in seeds for place in range(len(values))
    ]
    return pd.DataFrame(rows, index=pd.Index(ids, name="id"))


def sweep_report(
    rows: pd.DataFrame,
    measured: Mapping[str, ArrayLike],
    *,
    covariate: str,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Sweep:
    """What a sweep moved.

    Parameters
    ----------
    rows
        As :func:`sweep_rows` made them.
    measured
        By name, ``(n,)`` normalised values, in the order of the rows.
    covariate
        The one that was moved.
    level, resamples, seed
        Of the intervals, as in :func:`generation.evaluate.conditioning.agreement`.

    Raises
    ------
    EvaluationError
        Arrays differ in length from the rows, or the moved covariate was not measured.
    """
    if covariate not in measured:
        raise EvaluationError(
            f"the sweep moved {covariate}, found measurements of {', '.join(measured) or 'nothing'}"
        )
    moved = rows[covariate].to_numpy(np.float64)
    values = {name: pairs_of(moved, given)[1] for name, given in measured.items()}
    failed = ~np.isfinite(np.stack(list(values.values()))).all(axis=0)
    groups = [np.flatnonzero(rows["seed"] == number) for number in rows["seed"].unique()]
    bootstrap = Bootstrap(level=level, resamples=resamples, seed=seed)
    return Sweep(
        covariate=covariate,
        n=len(rows),
        n_failed=int(failed.sum()),
        monotone=_monotone(moved, values[covariate], groups),
        slopes={
            name: _slope_within(moved, given, groups, bootstrap=bootstrap)
            for name, given in values.items()
        },
    )


def _partial_slopes(
    name: str, pairs: Mapping[str, tuple[Values, Values]]
) -> tuple[Values, Values, int]:
    y = next(iter(pairs.values()))[1]
    there = np.isfinite(y)
    design = np.stack([x[there] for x, _ in pairs.values()], axis=1)
    n, k = design.shape
    if n < k + 2:
        raise EvaluationError(
            f"{n} measurements of {name} are too few for {k} asked covariates, expected {k + 2}"
        )
    for key, column in zip(pairs, design.T, strict=True):
        if np.ptp(column) == 0:
            raise EvaluationError(
                f"asked {key} is {column[0]:g} in all rows: vary it, or leave it out"
            )
    if np.ptp(y[there]) == 0:
        raise EvaluationError(f"measured {name} is {y[there][0]:g} in all rows; leave it out")
    design, target = _standardised(design), _standardised(y[there])
    if np.linalg.cond(design) > _DEPENDENT:
        raise EvaluationError(
            f"asked {', '.join(pairs)} follow from one another; vary them on their own"
        )
    slopes = np.linalg.lstsq(design, target)[0]
    variance = ((target - design @ slopes) ** 2).sum() / (n - k - 1)
    errors = np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    return np.asarray(slopes, np.float64), np.asarray(errors, np.float64), n


def _standardised(values: Values) -> Values:
    return np.asarray((values - values.mean(axis=0)) / values.std(axis=0))


def _monotone(x: Values, y: Values, groups: Groups) -> float | None:
    rises: list[bool] = []
    for rows in groups:
        kept = rows[np.isfinite(y[rows])]
        kept = kept[np.argsort(x[kept], kind="stable")]
        moved = np.diff(x[kept]) > 0
        rises += (np.diff(y[kept])[moved] > 0).tolist()
    return float(np.mean(rises)) if rises else None


def _slope_within(
    x: Values, y: Values, groups: Groups, *, bootstrap: Bootstrap
) -> IntervalEstimate | None:
    """The slope within seeds, pooled over them; the interval is a bootstrap over seeds."""
    products, squares = [], []
    for rows in groups:
        kept = rows[np.isfinite(y[rows])]
        if len(kept) > 1:
            u = x[kept] - x[kept].mean()
            products.append(float(u @ (y[kept] - y[kept].mean())))
            squares.append(float(u @ u))
    above, below = np.array(products), np.array(squares)
    if not below.sum() > 0:
        return None
    chosen = bootstrap.draw().integers(len(below), size=(bootstrap.resamples, len(below)))
    totals = below[chosen].sum(axis=1)
    there = totals > 0
    slopes = above[chosen].sum(axis=1)[there] / totals[there]
    return bootstrap.interval(float(above.sum() / below.sum()), slopes)
