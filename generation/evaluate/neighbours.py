"""Fidelity and diversity apart, from nearest neighbours among features.

Around each real volume lies a ball that reaches to its k-th nearest real neighbour. Fidelity asks
how many generated volumes lie in balls, diversity how many balls hold generated volumes. Distances
are Euclidean and computed from differences, so that identical features are at distance 0 exactly.
All distances between n and m volumes are held at once, 8 n m bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from generation.errors import EvaluationError
from generation.evaluate.estimates import checked_features

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from generation.evaluate.estimates import Array

_ROUNDING = 1e-9
"""How much less than expected counts as what is expected."""


@dataclass(frozen=True)
class Fidelity:
    """Fidelity and diversity of generated volumes.

    Parameters
    ----------
    fidelity, diversity
        The scores.
    """

    fidelity: float
    diversity: float


def precision_recall(real: ArrayLike, generated: ArrayLike, *, k: int = 3) -> Fidelity:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2).

    Parameters
    ----------
    real, generated
        Features ``(n, d)`` and ``(m, d)``, more than ``k`` rows each.
    k
        Which neighbour a ball reaches to; 3 in the paper.

    Returns
    -------
    Fidelity
        Precision: share of generated volumes in some ball of a real one. Recall: share of real
        volumes in some ball of a generated one. Both in [0, 1], both easily swayed by outliers,
        whose balls are large.

    Raises
    ------
    EvaluationError
        The features are too few, of unfitting shapes or not finite.
    """
    real, generated = _checked(real, generated, k, least=k + 1)
    apart = _distances(real, generated)
    of_real, of_generated = (_radii(_among(x), k) for x in (real, generated))
    return Fidelity(
        float((apart <= of_real).any(axis=0).mean()),
        float((apart <= of_generated.T).any(axis=1).mean()),
    )


def density_coverage(real: ArrayLike, generated: ArrayLike, *, k: int = 5) -> Fidelity:
    """Density and coverage (Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics").

    Parameters
    ----------
    real, generated
        Features ``(n, d)`` and ``(m, d)``; more than ``k`` real rows.
    k
        Which neighbour a ball reaches to; 5 in the paper.

    Returns
    -------
    Fidelity
        Density: how many balls a generated volume lies in on average, over ``k``; about 1 for
        real volumes, and not bounded above. Coverage: share of balls that hold a generated
        volume, in [0, 1]; its expectation for real volumes is ``1 - 2**-k`` when n = m is large.
        Balls are open, as in the authors' code.

    Raises
    ------
    EvaluationError
        The features are too few, of unfitting shapes or not finite.
    """
    real, generated = _checked(real, generated, k, least=1)
    inside = _distances(real, generated) < _radii(_among(real), k)
    return Fidelity(float(inside.sum(axis=0).mean() / k), float(inside.any(axis=1).mean()))


def clipped_density_coverage(real: ArrayLike, generated: ArrayLike, *, k: int = 5) -> Fidelity:
    """Clipped density and clipped coverage (Salvy, Talbot and Thirion 2025, arXiv 2507.01761).

    Calibrated, so that each reads as a share of good volumes: a set of which a share q is drawn
    from the real distribution and the rest lies far away scores about q on both.

    Parameters
    ----------
    real, generated
        Features ``(n, d)`` and ``(m, d)``; more than ``k`` real and at least ``k`` generated rows.
    k
        Which neighbour a ball reaches to; 5 in the paper.

    Returns
    -------
    Fidelity
        Both in [0, 1].

    Raises
    ------
    EvaluationError
        The features are too few, of unfitting shapes or not finite.

    Notes
    -----
    Clipped density: no ball is larger than the median ball, no generated volume counts for more
    than 1, and the mean is divided by what the real volumes score among themselves (each left out
    of its own ball), then cut off at 1. Clipped coverage: a ball counts by the share of ``k``
    generated volumes it holds, at most 1; the mean is read off the curve of its expectation
    against the number of good volumes, see :func:`expected_clipped_coverage`. Definitions and
    edge cases (closed balls for density, open ones for coverage) follow the authors' code.
    """
    real, generated = _checked(real, generated, k, least=k)
    among, apart = _among(real), _distances(real, generated)
    radii = _radii(among, k)
    smaller = np.minimum(radii, np.median(radii))
    density = _share_inside(apart, smaller, k) / _share_inside(among, smaller, k)
    return Fidelity(float(min(density, 1)), _clipped_coverage(apart, radii, k))


def expected_clipped_coverage(real: int, generated: int, k: int) -> Array:
    """Mean clipped coverage before calibration when some of the generated volumes are real ones.

    Around a real volume the probability of a ball has the distribution Beta(k, n - k), so that the
    count of good volumes in it is beta-binomial; what is expected is its mean, cut off at ``k``,
    over ``k``. For fewer than ``k`` good volumes it is taken to be 0, as in the authors' code.

    Parameters
    ----------
    real, generated
        How many real volumes, n, and generated volumes, m.
    k
        Which neighbour a ball reaches to.

    Returns
    -------
    ndarray
        ``(m + 1,)`` rising values, for 0, 1, …, m good volumes.
    """
    from scipy.stats import betabinom

    good = np.arange(k, generated + 1)[:, None]
    few = np.arange(k)
    lacking = ((k - few) * betabinom.pmf(few, good, k, real - k)).sum(axis=1)
    return np.concatenate((np.zeros(k), 1 - lacking / k))


def _share_inside(distances: Array, radii: Array, k: int) -> float:
    """In how many of ``k`` balls volumes (columns) lie on average, each in 1 at most."""
    return float(np.minimum((distances <= radii).sum(axis=0) / k, 1).mean())


def _clipped_coverage(apart: Array, radii: Array, k: int) -> float:
    found = np.minimum((apart < radii).sum(axis=1) / k, 1).mean()
    expected = expected_clipped_coverage(len(apart), apart.shape[1], k)
    return float(np.searchsorted(expected, found - _ROUNDING) / len(expected))


def _radii(among: Array, k: int) -> Array:
    """Distance to the ``k``-th nearest other, ``(n, 1)``."""
    return np.partition(among, k - 1, axis=1)[:, k - 1 : k]


def _among(features: Array) -> Array:
    """Distances to each other; nothing is its own neighbour."""
    apart = _distances(features, features)
    np.fill_diagonal(apart, np.inf)
    return apart


def _distances(a: Array, b: Array) -> Array:
    from scipy.spatial.distance import cdist

    return np.asarray(cdist(a, b))


def _checked(real: ArrayLike, generated: ArrayLike, k: int, *, least: int) -> tuple[Array, Array]:
    if k < 1:
        raise EvaluationError(f"k must be at least 1, found {k}")
    return checked_features(real, k + 1), checked_features(generated, least, like=real)
