"""Whether a generator reproduces its training data: an audit of nearest neighbours.

Everything here works on vectors ``(n, d)``, whatever they are: coarse voxels, latents, features of
a network (:func:`vectors`). Similarity is Pearson's correlation, after the mean of the other real
volumes has been taken away: all heads resemble the mean head, and what is left tells them apart.

Two tests, both with members (training data) and real volumes that were held out:

- *Threshold* (Dar et al., arXiv 2402.01054). The threshold is the 95th percentile, over training
  samples, of the correlation of each with its closest held-out sample. A synthetic sample is above
  it if its closest training sample is more alike than that. Unlike in the paper, the sets may
  differ in size: of ``t`` training and ``h`` held-out samples, the percentile is 0.95 to the power
  ``h / t``, so that at most about 5 % of fresh samples are above it. The same is done with both
  sets in each other's role: blur or noise, which make samples generally more or less alike, show
  there too. The p-value is the larger of two: a one-sided sign test of samples above in one role
  only, and the chance that as many fresh samples are above a threshold estimated from as few
  samples as the smaller set has (beta-binomial).
- *Nearer*. Of as many training as held-out samples (the larger set gives a random draw), the share
  of synthetic samples whose closest is a training sample: one half if nothing was copied. The
  p-value permutes which samples were training samples: it allows for samples that are close to
  everything.

The held-out volumes must come from where the training volumes come from: what separates the two
for another reason is found as well. The member-only control shows what is found by chance: the
training set is split in halves, one of them in the role of the held-out set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from torch import Tensor

from generation.errors import EvaluationError
from generation.evaluate.vectors import Match, Share, correlations, polar, upper_quantile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Hits = NDArray[np.bool_]
    Places = NDArray[np.intp]

Verdict = Literal["copies found", "inconclusive", "no copy found"]

_LEAST = 4
_PERMUTATIONS = 10_000


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Both tests, once.

    Parameters
    ----------
    threshold
        Correlation above which a sample is too much like a training sample.
    above
        Synthetic samples above it.
    above_reversed
        The same with held-out and training samples in each other's role.
    p_above
        Of the threshold test, one-sided.
    nearer
        Synthetic samples whose closest real sample is a training sample; of equal sets.
    distance_ratio
        Median over synthetic samples of the distance to the closest training sample over that to
        the closest held-out one; distances are ``sqrt(2 - 2 r)``.
    p_nearer
        Permutation test of ``nearer``, one-sided.
    """

    threshold: float
    above: Share
    above_reversed: Share
    p_above: float
    nearer: Share
    distance_ratio: float
    p_nearer: float

    @property
    def p(self) -> float:
        """Of both tests together (Bonferroni)."""
        return min(1.0, 2 * min(self.p_above, self.p_nearer))


@dataclass(frozen=True, kw_only=True)
class Power:
    """What the threshold finds of copies made on purpose.

    Parameters
    ----------
    found
        Copies above the threshold.
    traced
        Copies whose closest training sample is their original.
    """

    found: Share
    traced: Share


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What was found in one space.

    Parameters
    ----------
    space
        Name of the space the vectors are from.
    training, synthetic, held_out
        How many samples there were.
    expected
        Share of fresh samples that are above the threshold.
    finding
        Both tests.
    control
        The member-only control, several random halvings: that of the median p-value.
    power
        By name of the dose.
    worst
        Synthetic samples with the most similar training samples, most similar first.
    alpha
        Level of the verdict.
    """

    space: str
    training: int
    synthetic: int
    held_out: int
    expected: float
    finding: Finding
    control: Finding
    power: Mapping[str, Power]
    worst: tuple[Match, ...]
    alpha: float

    @property
    def verdict(self) -> Verdict:
        """``"copies found"`` if the p-value of both tests together is below alpha.

        ``"inconclusive"`` if that of the control is, too: a few samples that are close to
        everything may then be the reason, and the worst pairs and near-duplicates must be looked
        at. Otherwise ``"no copy found"``, which is worth as much as the power.
        """
        if self.finding.p >= self.alpha:
            return "no copy found"
        return "inconclusive" if self.control.p < self.alpha else "copies found"

    def statement(self) -> str:
        """The verdict in one sentence, with the control and the power."""
        found, control = self.finding, self.control
        powers = ", ".join(f"{100 * p.found.share:.0f} % at {d}" for d, p in self.power.items())
        return (
            f"{self.verdict} in {self.space} (p = {found.p:.2g}): "
            f"{_percent(found.above)} above the threshold, {100 * self.expected:.0f} % expected, "
            f"{_percent(control.above)} in the member-only control; "
            f"{_percent(found.nearer)} nearer to training than to held-out samples, 50 % expected, "
            f"{_percent(control.nearer)} in the control; "
            f"power: {powers or 'not measured'}."
        )


def audit(
    training: Tensor,
    synthetic: Tensor,
    held_out: Tensor,
    *,
    space: str,
    planted: Mapping[str, tuple[Tensor, Sequence[int]]] | None = None,
    level: float = 0.95,
    alpha: float = 0.05,
    centre: bool = True,
    worst: int = 16,
    controls: int = 21,
    most: int = 2000,
    seed: int = 0,
) -> Audit:
    """Look for copies of training data among synthetic samples; see the module for how.

    Parameters
    ----------
    training, synthetic, held_out
        Vectors ``(n, d)``, floats. All correlations of training with the other two are kept.
    space
        What the vectors are, for the report.
    planted
        Copies made on purpose, by dose: vectors of altered training volumes (see
        :data:`generation.evaluate.planted.DOSES`), and which training samples they were made from.
    level
        Percentile of the threshold.
    alpha
        Level of the verdict.
    centre
        Take away the mean of real samples: of all but those that are compared, because a sample
        is less like others once a mean it is part of is taken away.
    worst
        How many pairs to return.
    controls
        Random halvings of the training set; odd.
    most
        Training samples the control takes, drawn at random from more.
    seed
        Of all draws.

    Returns
    -------
    Audit
        Findings, control, power, worst pairs.

    Raises
    ------
    EvaluationError
        Fewer than 4 training, 2 held-out or 1 synthetic samples, vectors that do not fit together,
        are not finite or are constant, or a planted copy of no training sample.
    """
    _check(training, synthetic, held_out)
    middle = _middle(training, held_out) if centre else None
    members, made, others = (_Centred(*polar(v, middle)) for v in (training, synthetic, held_out))
    real = len(training) + len(held_out) if centre else None
    to_members, to_others = (_alike(made, them, real) for them in (members, others))
    between = _alike(members, others, real, both=True)
    finding = _finding(to_members, to_others, between, level=level, draw=_draws(seed, 0))
    chosen = _draws(seed, 1).permutation(len(training))[:most]
    some = _Centred(members.directions[chosen], members.lengths[chosen])
    among = _alike(some, some, real, both=True)
    halvings = [
        _halved(to_members[:, chosen], among, level=level, draw=_draws(seed, 2, k))
        for k in range(controls)
    ]
    return Audit(
        space=space,
        training=len(training),
        synthetic=len(synthetic),
        held_out=len(held_out),
        expected=1 - level,
        finding=finding,
        control=sorted(halvings, key=lambda found: found.p)[len(halvings) // 2],
        power={
            dose: _power(
                _alike(_Centred(*polar(copies, middle)), members, real),
                origins,
                threshold=finding.threshold,
            )
            for dose, (copies, origins) in (planted or {}).items()
        },
        worst=_worst(to_members, worst),
        alpha=alpha,
    )


def combined(audits: Sequence[Audit]) -> tuple[Verdict, float]:
    """One verdict over several spaces, and its p-value.

    Copies show in one space and not in another, so that one space is enough; the smallest p-value
    is multiplied by the number of spaces (Bonferroni). If it is below the strictest alpha, copies
    were found, unless all spaces below that level are inconclusive.

    Raises
    ------
    EvaluationError
        There are no audits.
    """
    if not audits:
        raise EvaluationError("found no audits to combine, expected one or more; audit a space")
    alpha = min(each.alpha for each in audits)
    p = min(1.0, len(audits) * min(each.finding.p for each in audits))
    if p >= alpha:
        return "no copy found", p
    telling = [each for each in audits if len(audits) * each.finding.p < alpha]
    plain = any(each.control.p >= alpha for each in telling)
    return ("copies found" if plain else "inconclusive"), p


def _check(training: Tensor, synthetic: Tensor, held_out: Tensor) -> None:
    least = {"training": _LEAST, "synthetic": 1, "held-out": 2}
    given = {"training": training, "synthetic": synthetic, "held-out": held_out}
    for name, values in given.items():
        if values.ndim != 2 or len(values) < least[name] or values.shape[1] != training.shape[-1]:
            raise EvaluationError(
                f"found {name} vectors of shape {tuple(values.shape)}, expected (n, "
                f"{training.shape[-1]}) with n of {least[name]} or more; give one vector a sample"
            )


def _middle(training: Tensor, held_out: Tensor) -> Tensor:
    total = training.double().sum(0) + held_out.double().sum(0)
    return total / (len(training) + len(held_out))


class _Centred(NamedTuple):
    """Vectors relative to a centre: unit vectors ``(n, d)``, and lengths ``(n,)``."""

    directions: Tensor
    lengths: Tensor


def _alike(first: _Centred, second: _Centred, real: int | None, *, both: bool = False) -> Floats:
    """Correlations of all with all, ``(n, m)``.

    Parameters
    ----------
    first, second
        The second are real samples.
    real
        How many the centre is the mean of; each pair is taken relative to that of the others.
    both
        Whether the first are real samples too.
    """
    cosines = correlations(first.directions, second.directions)
    if real is None:
        return cosines
    unit = second.lengths.max()  # or products of large ones would overflow
    a, b = (first.lengths / unit).numpy()[:, None], (second.lengths / unit).numpy()
    products = cosines * a * b
    # Without some samples the centre moves by their sum, relative to it, times this.
    w = 1 / (real - 1 - both)
    p, q = (1 + w, w) if both else (1.0, 0.0)
    squares = (p * a) ** 2 + 2 * p * w * products + (w * b) ** 2
    squares *= (q * a) ** 2 + 2 * q * (1 + w) * products + ((1 + w) * b) ** 2
    products *= p * (1 + w) + w * q
    products += p * q * a**2 + w * (1 + w) * b**2
    return np.asarray(products / np.sqrt(squares), np.float32)


def _finding(
    to_members: Floats,
    to_others: Floats,
    between: Floats,
    *,
    level: float,
    draw: np.random.Generator,
) -> Finding:
    """Both tests, from correlations ``(s, t)``, ``(s, h)`` and ``(t, h)``."""
    t, h = between.shape
    threshold = upper_quantile(between.max(1), level ** (h / t))
    above = to_members.max(1) > threshold
    swapped = to_others.max(1) > upper_quantile(between.max(0), level ** (t / h))
    size = min(t, h)
    member = to_members[:, np.sort(draw.permutation(t)[:size])]
    other = to_others[:, np.sort(draw.permutation(h)[:size])]
    nearer = member.max(1) > other.max(1)
    distances = [np.sqrt(np.maximum(2 - 2 * part.max(1), 1e-12)) for part in (member, other)]
    return Finding(
        threshold=threshold,
        above=Share.counted(above),
        above_reversed=Share.counted(swapped),
        p_above=max(_sign_test(above, swapped), _chance_above(above, size, level)),
        nearer=Share.counted(nearer),
        distance_ratio=float(np.median(distances[0] / distances[1])),
        p_nearer=_permuted(np.concatenate([member, other], 1).argmax(1), nearer, size, draw=draw),
    )


def _sign_test(above: Hits, swapped: Hits) -> float:
    """One-sided, of samples above in one role only."""
    from scipy import stats

    one, two = int((above & ~swapped).sum()), int((swapped & ~above).sum())
    if one + two == 0:
        return 1.0
    return float(stats.binomtest(one, one + two, alternative="greater").pvalue)


def _chance_above(above: Hits, size: int, level: float) -> float:
    """How likely as many fresh samples are above the percentile of ``size`` others."""
    from scipy import stats

    rank = math.ceil(level * size)
    return float(stats.betabinom.sf(above.sum() - 1, len(above), size + 1 - rank, rank))


def _permuted(closest: Places, nearer: Hits, size: int, *, draw: np.random.Generator) -> float:
    """How often as many are nearer if it is drawn at random which samples are members."""
    times = np.bincount(closest, minlength=2 * size)
    often, samples = np.unique(times, return_counts=True)
    members = draw.multivariate_hypergeometric(samples, size, _PERMUTATIONS)
    as_many = int((members @ often >= nearer.sum()).sum())
    return (1 + as_many) / (1 + _PERMUTATIONS)


def _halved(
    to_members: Floats, among: Floats, *, level: float, draw: np.random.Generator
) -> Finding:
    """Both tests with one half of the members in the role of the held-out samples."""
    half = len(among) // 2
    order = draw.permutation(len(among))
    first, second = order[:half], order[half : 2 * half]
    between = among[np.ix_(first, second)]
    return _finding(to_members[:, first], to_members[:, second], between, level=level, draw=draw)


def _power(alike: Floats, origins: Sequence[int], *, threshold: float) -> Power:
    copies, members = alike.shape
    origin = np.asarray(origins)
    if len(origin) != copies or not ((origin >= 0) & (origin < members)).all():
        raise EvaluationError(
            f"found {copies} planted copies with origins {list(origins)[:8]}; expected the "
            f"index of one of {members} training samples for each"
        )
    return Power(
        found=Share.counted(alike.max(1) > threshold),
        traced=Share.counted(alike.argmax(1) == origin),
    )


def _worst(to_members: Floats, count: int) -> tuple[Match, ...]:
    closest, alike = to_members.argmax(1), to_members.max(1)
    most = np.argsort(-alike, kind="stable")[:count]
    return tuple(Match(int(i), int(closest[i]), float(alike[i])) for i in most)


def _percent(share: Share) -> str:
    low, high = share.interval
    return f"{100 * share.share:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def _draws(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
