"""One-dimensional densities in log space: their masses, and exact draws far out in their tails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[np.float64]

_NEGLIGIBLE = 30.0  # nats below the peak: what a double cannot tell from nothing
LOG_ROOT_TAU = 0.9189385332046727
TINY = 2.0**-54


@dataclass(frozen=True)
class Density:
    """Densities, one a row, log-linear between nodes; of one node: a point mass."""

    x: Array
    log_p: Array

    @classmethod
    def of(
        cls, log_density: Callable[[Array], Array], low: Array, high: Array, *, nodes: int
    ) -> Density:
        """Tabulate a density between bounds of shape ``(rows,)``, where its mass is."""
        if (low == high).all():
            return cls(low[:, None], log_density(low[:, None]))
        for _ in range(2):
            x = _between(low, high, 33)
            log_p = log_density(x)
            kept = log_p >= log_p.max(axis=1, keepdims=True) - _NEGLIGIBLE
            first = np.maximum(kept.argmax(axis=1) - 1, 0)
            last = np.minimum(33 - kept[:, ::-1].argmax(axis=1), 32)
            rows = np.arange(len(x))
            low, high = x[rows, first], x[rows, last]
        x = _between(low, high, nodes)
        return cls(x, log_density(x))

    @property
    def log_mass(self) -> Array:
        """Logarithm of each row's integral (of the density itself at a point), ``(rows,)``."""
        if self.x.shape[1] == 1:
            return self.log_p[:, 0]
        return self.log_p.max(axis=1) + np.log(self._cells().sum(axis=1))

    def quantile(self, u: Array) -> Array:
        """Inverse CDF: of each row at its own ``u``, or of the only row at every ``u``."""
        if self.x.shape[1] == 1:
            return np.broadcast_to(self.x[:, 0], u.shape)
        edges = np.cumsum(self._cells(), axis=1)
        if len(edges) == 1:
            rows = np.zeros(len(u), dtype=np.intp)
            target = u * edges[0, -1]
            cell = np.searchsorted(edges[0], target)
        else:
            rows = np.arange(len(u))
            target = u * edges[:, -1]
            cell = (edges < target[:, None]).sum(axis=1)
        cell = np.minimum(cell, edges.shape[1] - 1)
        before = np.where(cell > 0, edges[rows, cell - 1], 0.0)
        share = np.clip((target - before) / (edges[rows, cell] - before), 0.0, 1.0)
        start, end = self.x[rows, cell], self.x[rows, cell + 1]
        slope = self.log_p[rows, cell + 1] - self.log_p[rows, cell]
        return start + (end - start) * _exponential_quantile(share, slope)

    def _cells(self) -> Array:
        log_p = self.log_p - self.log_p.max(axis=1, keepdims=True)
        p, slope = np.exp(log_p), np.diff(log_p, axis=1)
        flat = np.abs(slope) < 1e-5
        mean = np.where(flat, (p[:, 1:] + p[:, :-1]) / 2, np.diff(p) / np.where(flat, 1.0, slope))
        return mean * np.diff(self.x, axis=1)


def _between(low: Array, high: Array, count: int) -> Array:
    steps = np.linspace(0.0, 1.0, count)
    return low[:, None] * (1 - steps) + high[:, None] * steps


def _exponential_quantile(u: Array, slope: Array) -> Array:
    """Inverse CDF on [0, 1] of the density proportional to ``exp(slope x)``."""
    falling = np.minimum(np.where(slope > 0, 1 - u, u), 1 - 2 * TINY)
    rate = np.abs(slope)
    flat = rate < 1e-8
    x = np.log1p(falling * np.expm1(-rate)) / np.where(flat, 1.0, -rate)
    x = np.clip(np.where(flat, falling, x), 0.0, 1.0)
    return np.where(slope > 0, 1 - x, x)


def _to_left_tail(low: Array, high: Array) -> tuple[Array, Array, NDArray[np.bool_]]:
    """The interval mirrored where it lies right of 0: the left tail is where CDFs are exact."""
    mirrored = low + high > 0
    return np.where(mirrored, -high, low), np.where(mirrored, -low, high), mirrored


def log_interval(low: Array, high: Array) -> Array:
    """Log probability of an interval under the standard normal; log density if it is a point."""
    from scipy.special import log_ndtr

    low, high, _ = _to_left_tail(low, high)
    middle, width = (low + high) / 2, high - low
    at_middle = -0.5 * middle**2 - LOG_ROOT_TAU
    if not width.any():
        return at_middle
    below, up_to = log_ndtr(low), log_ndtr(high)
    with np.errstate(divide="ignore"):
        wide = up_to + np.log1p(-np.exp(below - up_to))
        narrow = at_middle + np.log(width)
    return np.where(width * np.maximum(1.0, -middle) < 1e-4, narrow, wide)


def truncated_normal(low: Array, high: Array, u: Array) -> Array:
    """Inverse CDF at ``u`` of the standard normal truncated to an interval."""
    from scipy.special import log_ndtr, ndtri_exp

    low, high, mirrored = _to_left_tail(low, high)
    u = np.where(mirrored, 1 - u, u)
    log_cdf = np.logaddexp(log_ndtr(low) + np.log1p(-u), log_ndtr(high) + np.log(u))
    x = np.clip(ndtri_exp(log_cdf), low, high)
    return np.where(mirrored, -x, x)
