"""Which rows an epoch of a mixture has, and in which order."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

from synthbrain.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

REAL, SYNTHETIC = "real", "synthetic"

Ints = np.ndarray[Any, np.dtype[np.int64]]

STREAM = 2**32 - 1
"""No row has this number: the draws below are not those of a row's patches."""


@dataclass(frozen=True, eq=False)
class Rule:
    """Which rows an epoch has: sizes of both sides, how many of each, and the bins of rows."""

    seed: int
    sizes: tuple[int, int]
    counts: tuple[int, int]
    bins: tuple[Ints, Ints] | None

    def choose(self, epoch: int) -> tuple[NDArray[np.bool_], Ints]:
        """Whether each position is synthetic, and its row."""
        stream = np.random.Philox(key=np.array([self.seed, epoch << 32 | STREAM], np.uint64))
        real = _passes(stream, np.arange(self.sizes[0]), self.counts[0])
        rows = np.concatenate([real, self._synthetic(stream, real)])
        order = orders(stream, 1, len(rows))[0]
        return order >= len(real), rows[order]

    def _synthetic(self, stream: np.random.Philox, real: Ints) -> Ints:
        if self.bins is None or not self.counts[1]:
            return _passes(stream, np.arange(self.sizes[1]), self.counts[1])
        number = 1 + int(max(bins.max(initial=0) for bins in self.bins))
        there = np.bincount(self.bins[0][real], minlength=number)
        filled = np.bincount(self.bins[1], minlength=number) > 0
        added = np.zeros_like(there)
        added[filled] = _levelled(there[filled], self.counts[1])
        members = (np.flatnonzero(self.bins[1] == bin) for bin in range(number))
        drawn = [_passes(stream, *of) for of in zip(members, added.tolist(), strict=True)]
        return np.concatenate(drawn)


@lru_cache(maxsize=4)
def chosen(rule: Rule, epoch: int) -> tuple[NDArray[np.bool_], Ints]:
    """What :meth:`Rule.choose` gives; kept for a few epochs."""
    return rule.choose(epoch)


def _passes(stream: np.random.Philox, rows: Ints, count: int) -> Ints:
    """Go through rows in random order, as often as it takes to have ``count``."""
    if not count:
        return rows[:0]
    return rows[orders(stream, -(-count // len(rows)), len(rows))].ravel()[:count]


def orders(stream: np.random.Philox, number: int, size: int) -> Ints:
    """Random orders, ``(number, size)``: from raw draws, which no release of NumPy will change."""
    return stream.random_raw(number * size).reshape(number, size).argsort(1, kind="stable")


def _levelled(heights: Ints, count: int) -> Ints:
    """How ``count`` more lift the lowest of some heights to one level, as far as they go."""

    def needed(level: int) -> int:
        return int(np.maximum(level - heights, 0).sum())

    level = bisect_right(range(int(heights.max()) + count + 1), count, key=needed) - 1
    added = np.maximum(level - heights, 0)
    added[np.flatnonzero(heights <= level)[: count - needed(level)]] += 1
    return added


def counts(sizes: tuple[int, int], ratio: float, length: int | None) -> tuple[int, int]:
    """How many real and synthetic samples an epoch has."""
    if not 0 <= ratio <= 1:
        raise UsageError(f"ratio is the share of synthetic samples, 0 to 1; found {ratio!r}")
    if length is not None:
        if not isinstance(length, Integral) or length < 1:
            raise UsageError(f"length must be a whole number from 1, found {length!r}")
        synthetic = round(ratio * length)
        counts = (int(length) - synthetic, synthetic)
    elif ratio == 1:
        counts = (0, sizes[1])
    else:
        counts = (sizes[0], round(sizes[0] * ratio / (1 - ratio)))
    for origin, size, count in zip((REAL, SYNTHETIC), sizes, counts, strict=True):
        if count > 0 == size:
            raise UsageError(
                f"ratio={ratio} needs {count} {origin} samples, but that dataset is empty"
            )
    if not sum(counts):
        raise UsageError(f"ratio={ratio} makes an epoch of no samples; found {sizes[0]} real rows")
    return counts
