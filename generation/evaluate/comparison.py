"""Predictions of networks trained in several ways, compared on the same subjects.

Absolute errors and Pearson correlations in natural units, and for sex the area under the ROC curve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from generation.covariates import SEX, by_name
from generation.errors import EvaluationError
from generation.evaluate.conditioning import Estimate, Values, interval

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


@dataclass(frozen=True)
class Score:
    """How good the networks of an arm are.

    ``estimate`` is the mean over seeds, ``by_seed`` has each; absolute errors are in natural units.
    """

    arm: str
    target: str
    metric: Metric
    estimate: Estimate
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
    estimate: Estimate
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
    predicted: Mapping[str, Values],
    arms: Sequence[Arm],
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
        By arm, ``(seeds, n, k)``, what networks say; of sex the probability of being male.
    arms
        All of them.
    level, resamples
        Of the intervals.

    Raises
    ------
    EvaluationError
        As :func:`check_spread`.
    """
    check_spread(names, asked)
    scores: list[Score] = []
    differences: list[Difference] = []
    for place, target in enumerate(names):
        truth = asked[:, place]
        metrics: tuple[Metric, ...] = ("auc",) if target == SEX.name else ("mae", "r")
        for metric in metrics:
            known = {}
            for arm in arms:
                drawn = _resampled(metric, truth, predicted[arm.name][..., place], resamples)
                known[arm.name] = drawn
                by_seed, means = drawn
                estimate = interval(float(by_seed.mean()), _finite(means), level)
                scores.append(Score(arm.name, target, metric, estimate, tuple(by_seed.tolist())))
            differences += [
                _difference(
                    arm.name, Arm(arm.real or 1.0, False).name, target, metric, known, level
                )
                for arm in arms
                if arm.synthetic
            ]
    return Utility(tuple(scores), tuple(differences))


def _difference(
    arm: str,
    baseline: str,
    target: str,
    metric: Metric,
    known: Mapping[str, tuple[Values, Values]],
    level: float,
) -> Difference:
    (one, ones), (other, others) = known[arm], known[baseline]
    estimate = interval(float((one - other).mean()), _finite(ones - others), level)
    better = -1 if metric == "mae" else 1
    low, high = sorted((better * estimate.low, better * estimate.high))
    verdict: Verdict = "helps" if low > 0 else "hurts" if high < 0 else "undecided"
    return Difference(arm, baseline, target, metric, estimate, verdict)


def _resampled(
    metric: Metric, truth: Values, predicted: Values, resamples: int
) -> tuple[Values, Values]:
    """A metric of each seed, and its mean over seeds where seeds and subjects are drawn anew.

    Every call draws the same: resamples of two arms are pairs. ``predicted`` is ``(seeds, n)``.
    """
    count, n = predicted.shape
    draw = np.random.Generator(np.random.Philox(0))
    measured = METRICS[metric]
    means = []
    for start in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - start)
        subjects = draw.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64)
        seeds = draw.multinomial(count, np.full(count, 1 / count), size=size) / count
        each = np.stack([measured(truth, told, subjects) for told in predicted], axis=1)
        means.append((each * seeds).sum(axis=1))
    whole = np.ones((1, n))
    by_seed = np.array([measured(truth, told, whole)[0] for told in predicted])
    return by_seed, np.concatenate(means)


def _finite(values: Values) -> Values:
    """Without resamples that lack a class, or differ in nothing."""
    return values[np.isfinite(values)]


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


METRICS: dict[Metric, Callable[[Values, Values, Values], Values]] = {
    "mae": _mae, "r": _r, "auc": _auc
}  # fmt: skip
