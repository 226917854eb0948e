"""Distances between two sets of features: Fréchet, and the kernel distance.

Features are arrays ``(n, d)`` of real numbers, one row a volume; all is computed in float64. Every
figure comes with the standard error that the sampling of the volumes gives it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from generation.errors import EvaluationError
from generation.evaluate.estimates import PointEstimate, checked_pair, jackknife_error, shuffled

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from generation.evaluate.estimates import Array, Rows

    Vary = Literal["both", "generated"]

_BLOCK = 1024
"""Rows of a kernel matrix that are held at once."""


@dataclass(frozen=True)
class Extrapolated(PointEstimate):
    """A distance extrapolated to samples without end, and what it was extrapolated from.

    Parameters
    ----------
    bend
        How far the value would move, were a parabola fitted instead of a line. Where it exceeds
        a few standard errors the samples are too few for the number of entries, and the value is
        not to be trusted.
    shares
        Share of the samples each distance was computed from, from 1 downwards.
    distances
        The mean distance at each share.
    """

    bend: float
    shares: tuple[float, ...]
    distances: tuple[float, ...]


def frechet_of_gaussians(
    mean_a: ArrayLike, covariance_a: ArrayLike, mean_b: ArrayLike, covariance_b: ArrayLike
) -> float:
    """The squared Fréchet distance between two Gaussians, ``|μ₁-μ₂|² + tr(Σ₁+Σ₂-2(Σ₁Σ₂)^½)``.

    The trace of the root is the sum of the singular values of ``Σ₁^½ Σ₂^½``, which are the square
    roots of the eigenvalues of ``Σ₁^½ Σ₂ Σ₁^½``; no root of an unsymmetric matrix is taken.

    Parameters
    ----------
    mean_a, mean_b
        ``(d,)``.
    covariance_a, covariance_b
        ``(d, d)``, symmetric, positive semidefinite; singular ones too.

    Raises
    ------
    EvaluationError
        The shapes do not fit each other.

    References
    ----------
    Dowson and Landau 1982, "The Fréchet distance between multivariate normal distributions".
    """
    means = [np.asarray(mean, dtype=np.float64) for mean in (mean_a, mean_b)]
    spreads = [np.asarray(spread, dtype=np.float64) for spread in (covariance_a, covariance_b)]
    (size,) = means[0].shape if means[0].ndim == 1 else (-1,)
    if any(m.shape != (size,) for m in means) or any(s.shape != (size, size) for s in spreads):
        found = ", ".join(str(array.shape) for array in (*means, *spreads))
        raise EvaluationError(
            f"expected two means (d,) and two covariances (d, d) of one d, found {found}"
        )
    one, other = (_Gaussian(m, _root(s)) for m, s in zip(means, spreads, strict=True))
    return _frechet(one, other)


def frechet_distance(a: ArrayLike, b: ArrayLike) -> float:
    """The squared Fréchet distance between Gaussians fitted to two sets of features.

    With features of Inception this is the FID of Heusel et al. 2017; with those of Med3D, what
    Pinaya et al. 2022 report. Covariances divide by n - 1.

    Parameters
    ----------
    a, b
        Features ``(n, d)`` and ``(m, d)``, at least two rows each.

    Returns
    -------
    float
        At least 0. Its expectation exceeds the distance between the distributions, roughly by a
        constant over n; see :func:`frechet_infinity`.

    Raises
    ------
    EvaluationError
        The features have unfitting shapes or are not finite.

    Notes
    -----
    Covariances are never formed. With ``A = (a - mean) / sqrt(n - 1)`` the covariance is ``AᵀA``,
    and the trace of the root is the sum of the singular values of ``A Bᵀ``: exact for any n, and
    cheap for n < d. Where n > d, ``A`` is first replaced by its triangular factor.
    """
    one, other = (_Gaussian(x.mean(axis=0), _factor(x)) for x in checked_pair(a, b))
    return _frechet(one, other)


def frechet_infinity(
    real: ArrayLike,
    generated: ArrayLike,
    *,
    vary: Vary = "both",
    parts: int = 5,
    groups: int = 10,
    seed: int = 0,
) -> Extrapolated:
    """The Fréchet distance extrapolated to samples without end: FD∞ (Chong and Forsyth 2020).

    The bias of the distance falls with 1 / n. It is computed at several n, a line over 1 / n is
    fitted by least squares, and its value at 0 returned.

    Parameters
    ----------
    real, generated
        Features ``(n, d)`` and ``(m, d)``.
    vary
        ``"generated"`` as the authors do: the real features stay whole and leave their part of
        the bias, which is small if they are many. ``"both"``: both sets shrink by the same share,
        which takes out both parts.
    parts
        The distance is computed from 1, 1/2, …, 1/parts of the samples, at least 3.
    groups
        Of the jackknife, at least 2.
    seed
        Of the order in which samples are dealt out.

    Returns
    -------
    Extrapolated
        The intercept, which may be negative where the distance is near 0, and its standard error
        by :func:`generation.evaluate.estimates.jackknife`.

    Raises
    ------
    EvaluationError
        The features have unfitting shapes, are not finite, or are too few to be parted.

    Notes
    -----
    The authors take one random subset at each of 15 sizes from a tenth of the samples upwards.
    Here each share 1 / p is the mean over p disjoint subsets, so that every sample counts at every
    size: less noise, at less cost. A line fits only where even the smallest subset has more rows
    than features have entries; for fewer the bias bends, and what is left of it is not in the
    standard error; look at ``bend``.

    References
    ----------
    Chong and Forsyth 2020, "Effectively Unbiased FID and Inception Score and where to find
    them".
    """
    if parts < 3:
        raise EvaluationError(f"a line is checked at 3 sizes or more: parts is {parts}; raise it")
    real, generated = shuffled(*checked_pair(real, generated), seed)
    fewest = min(len(real), len(generated))
    if groups > 1 and fewest - -(-fewest // groups) < 2 * parts:
        raise EvaluationError(
            f"found {len(real)} real and {len(generated)} generated volumes, too few for {parts} "
            f"parts with {groups} groups left out in turn; add volumes or ask for fewer parts"
        )
    curve = _Curve(real, generated, parts, vary)
    distances = curve.distances(np.arange(len(real)), np.arange(len(generated)))
    line, parabola = (curve.at_zero(distances, degree) for degree in (1, 2))

    def extrapolated(rows: Rows, others: Rows) -> float:
        return curve.at_zero(curve.distances(rows, others), 1)

    return Extrapolated(
        value=line,
        error=jackknife_error(extrapolated, len(real), len(generated), groups=groups),
        bend=parabola - line,
        shares=tuple(1 / p for p in curve.sizes),
        distances=tuple(distances),
    )


@dataclass(frozen=True, eq=False)
class _Curve:
    """Fréchet distances over one over the share of the samples."""

    real: Array
    generated: Array
    parts: int
    vary: Vary

    @property
    def sizes(self) -> range:
        """One over each share."""
        return range(1, self.parts + 1)

    def distances(self, rows: Rows, others: Rows) -> list[float]:
        """The mean distance at each share, of some rows of either set."""
        return [self._mean(rows, others, parts) for parts in self.sizes]

    def at_zero(self, distances: list[float], degree: int) -> float:
        """Where a polynomial through the distances is for samples without end."""
        return float(np.polyfit(self.sizes, distances, degree)[-1])

    def _mean(self, rows: Rows, others: Rows, parts: int) -> float:
        """Over disjoint subsets of a share of the rows.

        Which part a row is in does not depend on which others are there; the jackknife would take
        chance in the parting for chance in the sampling.
        """
        found = []
        for part in range(parts):
            chosen = rows[rows % parts == part] if self.vary == "both" else rows
            other = others[others % parts == part]
            found.append(frechet_distance(self.real[chosen], self.generated[other]))
        return float(np.mean(found))


def kernel_distance(a: ArrayLike, b: ArrayLike) -> PointEstimate:
    """The kernel distance (KID): unbiased MMD² with the kernel ``(x·y / d + 1)³``.

    Parameters
    ----------
    a, b
        Features ``(n, d)`` and ``(m, d)``, at least three rows each.

    Returns
    -------
    PointEstimate
        The estimate over all pairs, which is negative about half the time when both sets come
        from one distribution; and its standard error, from leaving out each row in turn (the
        jackknife of two-sample U-statistics, Arvesen 1969), exact and without random draws. The
        authors' mean over random subsets estimates the same with more noise. Between equal
        distributions the estimate is not normal, and the interval only a guide.

    Raises
    ------
    EvaluationError
        The features have unfitting shapes or are not finite.

    References
    ----------
    Bińkowski et al. 2018, "Demystifying MMD GANs".
    """
    a, b = checked_pair(a, b, least=3)
    n, m = len(a), len(b)
    within_a, within_b = _kernel_rows(a), _kernel_rows(b)
    across_a, across_b = _kernel_cross(a, b)
    sum_a, sum_b, sum_ab = within_a.sum(), within_b.sum(), across_a.sum()
    part_a, part_b = sum_a / (n * (n - 1)), sum_b / (m * (m - 1))
    without_a = (sum_a - 2 * within_a) / ((n - 1) * (n - 2)) + part_b
    without_a -= 2 * (sum_ab - across_a) / ((n - 1) * m)
    without_b = (sum_b - 2 * within_b) / ((m - 1) * (m - 2)) + part_a
    without_b -= 2 * (sum_ab - across_b) / (n * (m - 1))
    variance = sum((len(left) - 1) * float(left.var()) for left in (without_a, without_b))
    value = float(part_a + part_b - 2 * sum_ab / (n * m))
    return PointEstimate(value, float(np.sqrt(variance)))


class _Gaussian(NamedTuple):
    """A mean, and a factor ``F`` of the covariance ``FᵀF``."""

    mean: Array
    factor: Array


def _frechet(one: _Gaussian, other: _Gaussian) -> float:
    """The distance; rounding is cut off at 0."""
    shift = one.mean - other.mean
    overlap = np.linalg.svd(one.factor @ other.factor.T, compute_uv=False).sum()
    spread = (one.factor**2).sum() + (other.factor**2).sum()
    return max(0.0, float(shift @ shift + spread - 2 * overlap))


def _factor(features: Array) -> Array:
    n, size = features.shape
    centred = (features - features.mean(axis=0)) / np.sqrt(n - 1)
    return centred if n <= size else np.asarray(np.linalg.qr(centred, mode="r"))


def _root(covariance: Array) -> Array:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def _blocks(n: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, n, _BLOCK))


def _kernel(x: Array, y: Array) -> Array:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _kernel_rows(x: Array) -> Array:
    """Sum over each row of the kernel matrix, the diagonal left out."""
    diagonal = ((x**2).sum(axis=1) / x.shape[1] + 1) ** 3
    return np.concatenate([_kernel(x[part], x).sum(axis=1) for part in _blocks(len(x))]) - diagonal


def _kernel_cross(x: Array, y: Array) -> tuple[Array, Array]:
    """Sums over the rows and over the columns of the kernel matrix."""
    rows, columns = np.empty(len(x)), np.zeros(len(y))
    for part in _blocks(len(x)):
        kernel = _kernel(x[part], y)
        rows[part] = kernel.sum(axis=1)
        columns += kernel.sum(axis=0)
    return rows, columns
