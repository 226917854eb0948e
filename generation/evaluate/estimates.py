"""Features as arrays, and figures from them with what their sampling makes uncertain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from generation.errors import EvaluationError
from generation.evaluate.intervals import normal_quantile

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[np.float64]
    Rows = NDArray[np.int64]
    Statistic = Callable[[Array, Array], float]


@dataclass(frozen=True)
class PointEstimate:
    """A figure and its standard error.

    Parameters
    ----------
    value
        The figure.
    error
        Its standard error: the standard deviation over other samples of the same size.
    """

    value: float
    error: float

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The normal confidence interval at a level in (0, 1)."""
        reach = normal_quantile(level) * self.error
        return self.value - reach, self.value + reach


def jackknife(
    statistic: Statistic, a: ArrayLike, b: ArrayLike, *, groups: int = 10, seed: int = 0
) -> PointEstimate:
    """A statistic of two sets of features with its standard error, leaving out groups of rows.

    There is no bootstrap here because it would mislead: rows drawn twice shrink covariances and
    bring neighbours at distance 0, so that a bootstrapped Fréchet or kernel distance is biased
    upwards, and its interval may not even hold the figure itself. Leaving rows out makes no
    duplicates. What bias the statistic has it keeps, and the standard error does not tell of it.

    Parameters
    ----------
    statistic
        Of features ``(n, d)`` and ``(m, d)``, such as
        :func:`generation.evaluate.distances.frechet_distance`.
    a, b
        The features.
    groups
        How many groups the rows are dealt into at random, at least 2; a statistic is computed as
        many times. The standard error itself is uncertain by about ``1 / sqrt(2 groups)``.
    seed
        Of the dealing.

    Raises
    ------
    EvaluationError
        The features have unfitting shapes, are not finite, or are fewer than the groups.

    References
    ----------
    Shao and Wu 1989, "A general theory for jackknife variance estimation" (leaving out groups).
    """
    a, b = shuffled(*checked_pair(a, b), seed)

    def of_rows(rows: Rows, others: Rows) -> float:
        return float(statistic(a[rows], b[others]))

    error = jackknife_error(of_rows, len(a), len(b), groups=groups)
    return PointEstimate(float(statistic(a, b)), error)


def jackknife_error(
    statistic: Callable[[Rows, Rows], float], n: int, m: int, *, groups: int
) -> float:
    """Standard error of a statistic of some rows of two sets; see :func:`jackknife`.

    Parameters
    ----------
    statistic
        Of the numbers of the rows that are kept, of either set.
    n, m
        How many rows there are, in random order.
    groups
        As there.

    Raises
    ------
    EvaluationError
        There are fewer than two groups, or more than rows.
    """
    if not 2 <= groups <= min(n, m):
        raise EvaluationError(
            f"expected between 2 groups and as many as volumes ({min(n, m)}), found {groups}"
        )
    rows, others = np.arange(n), np.arange(m)
    # Neighbouring rows make a group: so each takes as much from every part dealt out in turn.
    left = [
        statistic(rows[rows * groups // n != group], others[others * groups // m != group])
        for group in range(groups)
    ]
    return float(np.sqrt((groups - 1) * np.var(left)))


def shuffled(a: Array, b: Array, seed: int) -> tuple[Array, Array]:
    """Two sets of features, the rows of each in an order drawn from a seed."""
    draw = np.random.Generator(np.random.Philox(seed))
    return a[draw.permutation(len(a))], b[draw.permutation(len(b))]


def checked_pair(a: ArrayLike, b: ArrayLike, *, least: int = 2) -> tuple[Array, Array]:
    """Two sets of features of one network, at least so many rows each, as float64.

    Raises
    ------
    EvaluationError
        As :func:`checked_features` does.
    """
    return checked_features(a, least), checked_features(b, least, like=a)


def checked_features(features: ArrayLike, least: int, like: Any = None) -> Array:
    """Features as float64.

    Parameters
    ----------
    features
        ``(n, d)``.
    least
        How many rows there must be.
    like
        Features that must have as many entries a row.

    Raises
    ------
    EvaluationError
        They are too few, of another shape or not finite.
    """
    array = np.asarray(features, dtype=np.float64)
    if array.ndim != 2 or not array.shape[1]:
        raise EvaluationError(f"expected features (volumes, entries), found shape {array.shape}")
    if len(array) < least:
        raise EvaluationError(
            f"expected features of at least {least} volumes, found {len(array)}; add volumes"
        )
    if like is not None and np.shape(like)[-1] != array.shape[1]:
        raise EvaluationError(
            f"the features have {np.shape(like)[-1]} and {array.shape[1]} entries; "
            "extract both with the same network"
        )
    if not np.isfinite(array).all():
        rows = np.flatnonzero(~np.isfinite(array).all(axis=1))
        raise EvaluationError(
            f"features of {len(rows)} volumes are not finite, the first in row {rows[0]}; leave "
            "these volumes out or extract their features again"
        )
    return array
