"""Values with the intervals their sampling gives them: of a bootstrap, and of shares."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Values = NDArray[np.float64]

RESAMPLES = 2000
"""Bootstrap resamples of an interval."""


class IntervalEstimate(NamedTuple):
    """A value and the ends of its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """How percentile intervals are made.

    Parameters
    ----------
    level
        Of the intervals, in (0, 1).
    resamples
        How many.
    seed
        Of the draws.
    """

    level: float = 0.95
    resamples: int = RESAMPLES
    seed: int = 0

    def draw(self) -> np.random.Generator:
        """What draws the resamples, from its start."""
        return np.random.Generator(np.random.Philox(self.seed))

    def interval(self, value: float, resampled: Values) -> IntervalEstimate:
        """A value with the percentile interval of its resamples."""
        low, high = np.quantile(resampled, ((1 - self.level) / 2, (1 + self.level) / 2))
        return IntervalEstimate(value, float(low), float(high))


def wilson(share: float, n: int, level: float) -> IntervalEstimate:
    """A share of ``n`` with Wilson's interval (1927), within [0, 1]."""
    z = normal_quantile(level)
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return IntervalEstimate(share, max(0.0, float(middle - reach)), min(1.0, float(middle + reach)))


def normal_quantile(level: float) -> float:
    """Standard errors from the middle of a normal interval to either end."""
    return NormalDist().inv_cdf((1 + level) / 2)
