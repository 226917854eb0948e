"""Predictions of networks trained in several ways, compared on the same subjects.

Absolute errors and Pearson correlations in natural units, and for sex the area under the ROC curve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from generation.covariates import SEX, by_name
from generation.errors import EvaluationError
from generation.evaluate.intervals import Bootstrap, IntervalEstimate

if TYPE_CHECKING:
    from generation.evaluate.intervals import Values

    _Measure = Callable[[Values, Values, Values], Values]

Verdict = Literal["helps", "hurts", "undecided"]
Metric = Literal["mae", "r", "auc"]

_CHUNK = 200


@dataclass(frozen=True)
class Arm:
    """What a network is trained on: a share of the real volumes, and all synthetic ones or none."""

    real: float
    synthetic: bool

    @property
    def name(self) -> str:
        """As in reports and files."""
        if not self.real:
            return "synthetic"
        return f"{'mixed' if self.synthetic else 'real'}-{self.real:g}"

    @property
    def baseline(self) -> Arm:
        """The arm without synthetic volumes it is set against: as many real ones, or all."""
        return Arm(self.real or 1.0, False)


@dataclass(frozen=True)
class Score:
    """How good the networks of an arm are.

    ``estimate`` is the mean over seeds, ``by_seed`` has each; absolute errors are in natural units.
    """

    arm: str
    target: str
    metric: Metric
    estimate: IntervalEstimate
    by_seed: tuple[float, ...]


@dataclass(frozen=True)
class Difference:
    """An arm with synthetic volumes against the one without; ``estimate`` is arm less baseline.

    ``verdict`` is ``"helps"`` or ``"hurts"`` where the whole interval lies on one side of 0.
    """

    arm: str
    baseline: str
    target: str
    metric: Metric
    estimate: IntervalEstimate
    verdict: Verdict

    def __str__(self) -> str:
        value, low, high = self.estimate
        return (
            f"{self.arm} against {self.baseline}, {self.metric} of {self.target}: {value:+.4g} "
            f"({low:+.4g} to {high:+.4g}): {_SAID[self.verdict]}"
        )


_SAID: dict[str, str] = {
    "helps": "synthetic data help",
    "hurts": "synthetic data hurt",
    "undecided": "no difference shown",
}


@dataclass(frozen=True)
class Utility:
    """What a study found.

    Parameters
    ----------
    scores
        Of each arm, target and metric.
    differences
        ``synthetic`` against ``real-1``, and each ``mixed-f`` against its ``real-f``.
    """

    scores: tuple[Score, ...]
    differences: tuple[Difference, ...]

    @property
    def harms(self) -> tuple[Difference, ...]:
        """Where synthetic data hurt."""
        return tuple(found for found in self.differences if found.verdict == "hurts")


def check_spread(names: Sequence[str], asked: Values) -> None:
    """See that test subjects ``(n, k)`` differ in every target.

    Raises
    ------
    EvaluationError
        They do not.
    """
    for name, truth in zip(names, asked.T, strict=True):
        if np.ptp(truth) == 0:
            raise EvaluationError(
                f"all {len(truth)} test volumes have {name} {truth[0]:g} {by_name(name).unit}; "
                "test on volumes that differ"
            )


def compare(
    names: Sequence[str],
    asked: Values,
    predicted: Mapping[Arm, Values],
    *,
    level: float,
    resamples: int,
) -> Utility:
    """Score every arm, and set each that has synthetic volumes against the one without.

    Parameters
    ----------
    names
        Of the targets.
    asked
        ``(n, k)``, what the test subjects have, in natural units.
    predicted
        By arm, ``(seeds, n, k)``, what networks say; of sex the probability of being male. The
        baseline of each arm must be there.
    level, resamples
        Of the intervals.

    Raises
    ------
    EvaluationError
        As :func:`check_spread`.
    """
    check_spread(names, asked)
    bootstrap = Bootstrap(level=level, resamples=resamples)
    scores: list[Score] = []
    differences: list[Difference] = []
    for place, target in enumerate(names):
        metrics: tuple[Metric, ...] = ("auc",) if target == SEX.name else ("mae", "r")
        for metric in metrics:
            drawn = {
                arm: _resampled(
                    METRICS[metric], asked[:, place], told[..., place], bootstrap=bootstrap
                )
                for arm, told in predicted.items()
            }
            scores += [
                Score(arm.name, target, metric, one.estimate(), tuple(one.by_seed.tolist()))
                for arm, one in drawn.items()
            ]
            for arm in (arm for arm in drawn if arm.synthetic):
                estimate = drawn[arm].less(drawn[arm.baseline]).estimate()
                verdict = _verdict(metric, estimate)
                differences.append(
                    Difference(arm.name, arm.baseline.name, target, metric, estimate, verdict)
                )
    return Utility(tuple(scores), tuple(differences))


def _verdict(metric: Metric, difference: IntervalEstimate) -> Verdict:
    better = -1 if metric == "mae" else 1
    low, high = sorted((better * difference.low, better * difference.high))
    return "helps" if low > 0 else "hurts" if high < 0 else "undecided"


class _Resampled(NamedTuple):
    """A metric of each seed, and its mean over seeds in every resample."""

    by_seed: Values
    means: Values
    bootstrap: Bootstrap

    def less(self, other: _Resampled) -> _Resampled:
        """Differences, pair by pair."""
        return self._replace(by_seed=self.by_seed - other.by_seed, means=self.means - other.means)

    def estimate(self) -> IntervalEstimate:
        """The mean over seeds. Resamples that lack a class or differ in nothing do not count."""
        means = self.means[np.isfinite(self.means)]
        return self.bootstrap.interval(float(self.by_seed.mean()), means)


def _resampled(
    measured: _Measure, truth: Values, predicted: Values, *, bootstrap: Bootstrap
) -> _Resampled:
    """A metric where seeds and subjects are drawn anew; ``predicted`` is ``(seeds, n)``.

    Every call draws the same: resamples of two arms are pairs.
    """
    count, n = predicted.shape
    draw = bootstrap.draw()
    means = []
    for start in range(0, bootstrap.resamples, _CHUNK):
        size = min(_CHUNK, bootstrap.resamples - start)
        subjects = draw.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64)
        seeds = draw.multinomial(count, np.full(count, 1 / count), size=size) / count
        each = np.stack([measured(truth, told, subjects) for told in predicted], axis=1)
        means.append((each * seeds).sum(axis=1))
    whole = np.ones((1, n))
    by_seed = np.array([measured(truth, told, whole)[0] for told in predicted])
    return _Resampled(by_seed, np.concatenate(means), bootstrap)


def _mae(truth: Values, told: Values, weights: Values) -> Values:
    return np.asarray(weights @ abs(told - truth) / weights.sum(axis=1))


def _r(truth: Values, told: Values, weights: Values) -> Values:
    """Weighted Pearson correlation; 0 where all are told the same, NaN where all are the same."""
    total = weights.sum(axis=1)
    x, y = truth - truth.mean(), told - told.mean()
    x_mean, y_mean = weights @ x / total, weights @ y / total
    x_spread = weights @ x**2 / total - x_mean**2
    y_spread = weights @ y**2 / total - y_mean**2
    x_spread[x_spread <= 1e-12 * (x**2).mean()] = np.nan
    flat = y_spread <= 1e-12 * (y**2).mean()
    product = np.sqrt(x_spread * np.where(flat, 1.0, y_spread))
    return np.asarray(np.where(flat, 0.0, weights @ (x * y) / total - x_mean * y_mean) / product)


def _auc(truth: Values, told: Values, weights: Values) -> Values:
    """Weighted area under the ROC curve; NaN where a class is absent."""
    ones = truth > 0.5
    above = told[ones][:, None] - told[~ones]
    wins = (above > 0) + 0.5 * (above == 0)
    pairs = weights[:, ones].sum(axis=1) * weights[:, ~ones].sum(axis=1)
    won = ((weights[:, ones] @ wins) * weights[:, ~ones]).sum(axis=1)
    return np.asarray(won / np.where(pairs > 0, pairs, np.nan))


METRICS: Mapping[Metric, _Measure] = {"mae": _mae, "r": _r, "auc": _auc}
"""By name: of truth and predictions ``(n,)`` and weights ``(resamples, n)``, ``(resamples,)``."""
