"""Asked against measured covariates: whether they agree, and where not.

What a covariate was asked to be, and what a segmenter or a regressor then measures. Correlation
alone hides a wrong scale, so slope, intercept and errors are told beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from generation.errors import EvaluationError
from generation.evaluate.intervals import (
    RESAMPLES,
    Bootstrap,
    IntervalEstimate,
    normal_quantile,
    wilson,
)

Values = NDArray[np.float64]

_FEWEST = 3
_DECILES = 10
_CHUNK = 4_000_000


class Bias(NamedTuple):
    """Mean of measured minus asked, of ``n`` pairs asked between ``low`` and ``high``."""

    low: float
    high: float
    n: int
    mean_error: float


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How well measured values follow asked ones; in the unit they were given in.

    Parameters
    ----------
    n
        Pairs.
    r
        Pearson correlation, with Fisher's interval.
    slope, intercept
        Of the least-squares line of measured on asked, with percentile intervals of a bootstrap
        over pairs.
    mean_absolute_error, mean_error
        Of measured minus asked.
    bias
        The mean error by decile of the asked value; equal values fall into one group.
    note
        Why ``r``, ``slope`` or ``intercept`` is None; empty where none is.
    """

    n: int
    r: IntervalEstimate | None
    slope: IntervalEstimate | None
    intercept: IntervalEstimate | None
    mean_absolute_error: float
    mean_error: float
    bias: tuple[Bias, ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Asked against measured, within the trained range and beyond.

    Parameters
    ----------
    n, n_failed
        Pairs asked for, and those of them without a finite measurement.
    trained, extrapolated
        The fits of pairs asked within the trained range and outside; None where there are none.
    """

    n: int
    n_failed: int
    trained: Fit | None
    extrapolated: Fit | None


@dataclass(frozen=True, kw_only=True)
class Classification:
    """How well scores tell two classes apart.

    Parameters
    ----------
    n, n_failed
        Cases, and those of them without a finite score.
    auc
        Area under the ROC curve with DeLong's interval; None where one class is absent.
    accuracy
        Share on the right side of the threshold, with Wilson's interval.
    """

    n: int
    n_failed: int
    auc: IntervalEstimate | None
    accuracy: IntervalEstimate


def agreement(
    asked: ArrayLike,
    measured: ArrayLike,
    *,
    trained: tuple[float, float] = (0.0, 1.0),
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Agreement:
    """Compare what was asked for with what was measured.

    Parameters
    ----------
    asked, measured
        ``(n,)``, in one unit, normalised or natural. A measurement that is not finite has failed:
        it is counted, and left out.
    trained
        Ends of the trained range in the same unit: for natural values those of the covariate, such
        as ``(AGE.low, AGE.high)``.
    level
        Of the intervals.
    resamples, seed
        Of the bootstrap.

    Raises
    ------
    EvaluationError
        The arrays differ in length, or asked values are not finite.
    """
    x, y = pairs_of(asked, measured)
    bootstrap = Bootstrap(level=level, resamples=resamples, seed=seed)
    there = np.isfinite(y)
    within = (x >= trained[0]) & (x <= trained[1])
    fits = [
        _fit(x[part], y[part], bootstrap) if part.any() else None
        for part in (there & within, there & ~within)
    ]
    return Agreement(n=len(x), n_failed=int((~there).sum()), trained=fits[0], extrapolated=fits[1])


def classification(
    asked: ArrayLike, scores: ArrayLike, *, threshold: float = 0.5, level: float = 0.95
) -> Classification:
    """Compare asked classes, such as sexes, with the scores of a classifier.

    Parameters
    ----------
    asked
        ``(n,)`` of 0 and 1.
    scores
        ``(n,)``, the larger the more like class 1; one that is not finite has failed.
    threshold
        Scores above it count as class 1.
    level
        Of the intervals.

    Raises
    ------
    EvaluationError
        The arrays differ in length, no score is finite, or asked holds more than 0 and 1.
    """
    x, y = pairs_of(asked, scores)
    other = x[(x != 0) & (x != 1)]
    if len(other):
        raise EvaluationError(f"asked classes must be 0 or 1, found {other[0]:g}")
    there = np.isfinite(y)
    if not there.any():
        raise EvaluationError(f"none of {len(x)} scores is finite; see why the classifier failed")
    right = float(((y > threshold) == (x == 1))[there].mean())
    return Classification(
        n=len(x),
        n_failed=int((~there).sum()),
        auc=roc_auc(x[there], y[there], level=level),
        accuracy=wilson(right, int(there.sum()), level),
    )


def roc_auc(
    classes: ArrayLike, scores: ArrayLike, *, level: float = 0.95
) -> IntervalEstimate | None:
    """Area under the ROC curve: how often a case of class 1 scores above one of class 0.

    Parameters
    ----------
    classes
        ``(n,)`` of 0 and 1.
    scores
        ``(n,)``, finite; ties count a half.
    level
        Of the interval.

    Returns
    -------
    IntervalEstimate or None
        With the interval of DeLong et al. 1988, by midranks (Sun & Xu 2014, eq. 8); None where a
        class is absent.
    """
    from scipy.stats import rankdata

    labels, values = pairs_of(classes, scores)
    ones, zeros = values[labels == 1], values[labels == 0]
    m, n = len(ones), len(zeros)
    if not m or not n:
        return None
    ranks = rankdata(np.concatenate([ones, zeros]))
    above = (ranks[:m] - rankdata(ones)) / n
    below = 1 - (ranks[m:] - rankdata(zeros)) / m
    area = float(above.mean())
    if min(m, n) == 1:
        return IntervalEstimate(area, 0.0, 1.0)
    variance = above.var(ddof=1) / m + below.var(ddof=1) / n
    reach = normal_quantile(level) * float(np.sqrt(variance))
    return IntervalEstimate(area, max(0.0, area - reach), min(1.0, area + reach))


def pairs_of(asked: ArrayLike, measured: ArrayLike) -> tuple[Values, Values]:
    """Both as float64 ``(n,)``; a measurement may be missing (not finite), an asked value may not.

    Raises
    ------
    EvaluationError
        They differ in length, are empty, or an asked value is not finite.
    """
    x, y = (np.asarray(values, dtype=np.float64) for values in (asked, measured))
    if x.ndim != 1 or x.shape != y.shape or not len(x):
        raise EvaluationError(
            f"asked and measured must be two arrays of one length, found {x.shape} and {y.shape}"
        )
    bad = np.flatnonzero(~np.isfinite(x))
    if len(bad):
        raise EvaluationError(
            f"asked value {bad[0]} is {x[bad[0]]}, expected finite numbers; drop such rows"
        )
    return x, y


def _fit(x: Values, y: Values, bootstrap: Bootstrap) -> Fit:
    error = y - x
    note = _note(x, y)
    slope, intercept, r = None, None, None
    if len(x) >= _FEWEST and np.ptp(x) > 0:
        slope, intercept = _line(x, y, bootstrap)
        r = _pearson(x, y, bootstrap.level) if np.ptp(y) > 0 else None
    return Fit(
        n=len(x),
        r=r,
        slope=slope,
        intercept=intercept,
        mean_absolute_error=float(abs(error).mean()),
        mean_error=float(error.mean()),
        bias=_bias(x, error),
        note=note,
    )


def _note(x: Values, y: Values) -> str:
    if len(x) < _FEWEST:
        return f"{len(x)} pairs are too few for a line"
    if np.ptp(x) == 0:
        return "all asked values are the same: there is no line"
    return "all measured values are the same: there is no correlation" if np.ptp(y) == 0 else ""


def _pearson(x: Values, y: Values, level: float) -> IntervalEstimate:
    """With the interval of Fisher's transformation, whose variance is ``1 / (n - 3)``."""
    r = float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))
    if len(x) <= _FEWEST:
        return IntervalEstimate(r, -1.0, 1.0)
    reach = normal_quantile(level) / np.sqrt(len(x) - 3)
    with np.errstate(divide="ignore"):
        low, high = np.tanh(np.arctanh(r) + reach * np.array((-1, 1)))
    return IntervalEstimate(r, float(low), float(high))


def _line(x: Values, y: Values, bootstrap: Bootstrap) -> tuple[IntervalEstimate, IntervalEstimate]:
    """Slope and intercept with percentile intervals; resamples of a single value are left out."""
    draw, n = bootstrap.draw(), len(x)
    u, v = x - x.mean(), y - y.mean()
    slopes, intercepts = [], []
    size = max(1, _CHUNK // n)
    for start in range(0, bootstrap.resamples, size):
        chosen = draw.integers(n, size=(min(size, bootstrap.resamples - start), n))
        a, b = u[chosen], v[chosen]
        means = a.mean(axis=1), b.mean(axis=1)
        a -= means[0][:, None]
        spread = (a**2).sum(axis=1)
        there = spread > 1e-12 * (u**2).sum()
        slope = (a * b).sum(axis=1)[there] / spread[there]
        slopes.append(slope)
        intercepts.append(y.mean() + means[1][there] - slope * (x.mean() + means[0][there]))
    slope_of_all = float((u * v).sum() / (u**2).sum())
    at_zero = float(y.mean() - slope_of_all * x.mean())
    return (
        bootstrap.interval(slope_of_all, np.concatenate(slopes)),
        bootstrap.interval(at_zero, np.concatenate(intercepts)),
    )


def _bias(x: Values, error: Values) -> tuple[Bias, ...]:
    edges = np.unique(np.quantile(x, np.linspace(0, 1, min(_DECILES, len(x)) + 1)))
    group = np.searchsorted(edges[1:-1], x, side="right")
    return tuple(
        Bias(float(x[here].min()), float(x[here].max()), int(here.sum()), float(error[here].mean()))
        for here in (group == number for number in np.unique(group))
    )
