"""The joint distribution of the four covariates, and exact conditional draws from it.

``p(sex, age, V, B) = p(sex) p(age) p(V | sex, age) p(B | sex, age, V)``, V the ventricular
volume and B the brain volume, each factor parametric: see :class:`JointDistribution`. A draw with
ranges is a draw from the conditional distribution, by inverse CDFs in log space: nothing is
rejected, so a range that one brain in 10⁵⁰ falls into costs what any other costs. The sources of
the numbers, the calibration and the checks are told in ``docs/covariates.md``.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from generation.covariates import (
    AGE,
    BRAIN_VOLUME,
    NAMES,
    SEX,
    VENTRICULAR_VOLUME,
    Covariate,
    CovariateError,
    check_range,
    parse_sex,
)
from synthbrain.density import LOG_ROOT_TAU, TINY, Density, log_interval, truncated_normal

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[np.float64]
    Bounds: TypeAlias = tuple[float, float]

AGE_REFERENCE = 63.6
"""Age, in years, at which the levels of both volumes are stated."""

VENTRICULAR_REFERENCE = 37_000.0
"""Ventricular volume, in mm³, at which the level of the brain volume is stated."""

MIN_ROWS = 50
"""Fewest rows :meth:`JointDistribution.fit` accepts."""

_THIN = 1e-9  # normalised
_FARTHEST = 1_000.0  # a bound further out overflows long before it means anything
_CHUNK = 8_192  # rows whose densities are tabulated at once: 10 MB an array
_STREAM = 0xC0  # keeps these draws apart from other Philox streams of the same seed


@dataclass(frozen=True, kw_only=True)
class JointDistribution:
    """The joint distribution of sex, age, ventricular volume V and brain volume B.

    With ``a`` the age less 63.6 years and ``s`` 1 for men, 0 for women::

        sex ~ Bernoulli(male_proportion), independent of
        age ~ Normal(age_mean, age_sd), or the density given by age_knots
        asinh(V / scale) ~ Normal(level + age a + age2 a² + male s, sd)        ventricular_*
        B ~ Normal(level + age a + age2 a² + male s + ventricular (V - 37,000), sd)  brain_*

    and everything truncated to the ranges. asinh is the logarithm for volumes well above the
    scale, so V is log-normal where brains are, and is defined below 0 mm³, where the generator
    has been asked to extrapolate. The default of every parameter is the UK Biobank value:
    [P] published; [S] from another source; [C] calibrated to [P]; [A] assumption.

    Parameters
    ----------
    male_proportion
        Share of men. [P] 14,942 of 31,740.
    age_mean, age_sd
        Years, before truncation. [C] within 44-82 years they give the published 63.6 ± 7.5.
    age_knots
        ``(years, density)`` pairs: if any, the age density between the first and the last is
        piecewise linear through them, and continues beyond as the normal does.
    ventricular_scale
        mm³. [A] well below the smallest published volume.
    ventricular_level, ventricular_sd
        asinh units. [C] the published minimum and maximum are the medians of the smallest and of
        the largest of 31,740 volumes.
    ventricular_age, ventricular_age2
        Per year, per year². [S] growth of 20 % a decade before the fifties and of 3 % a year at
        73-79, with the slope linear in age between.
    ventricular_male
        asinh units. [S] women's ventricles are 19 % smaller.
    brain_level, brain_sd
        mm³. [C] as for the ventricles.
    brain_age, brain_age2
        mm³ per year, per year², at a given V. [S] with the part that goes through V, a loss of
        0.45 % a year at 63.6, from 0.33 % at 50 to 0.57 % at 75.
    brain_male
        mm³, at a given V. [A] that men's larger ventricles are all of the difference of B
        between the sexes, 10,000 mm³.
    brain_ventricular
        mm³ per mm³. [A] with it the mean of B is that of another UK Biobank sample [S].
    age_range, ventricular_range, brain_range
        Normalised ranges that hold where :meth:`draw` is given none. [P]

    Raises
    ------
    CovariateError
        A proportion outside [0, 1], a spread or scale that is not positive, a reversed range.

    Examples
    --------
    >>> drawn = UK_BIOBANK.draw(4, seed=1, sex="balanced", ventricular_volume=(0.5, 0.8))
    >>> sorted(drawn["sex"].tolist())
    [0.0, 0.0, 1.0, 1.0]
    """

    male_proportion: float = 14_942 / 31_740
    age_mean: float = 63.676546
    age_sd: float = 7.967735
    age_knots: tuple[tuple[float, float], ...] = ()
    ventricular_scale: float = 2_000.0
    ventricular_level: float = 3.4256
    ventricular_age: float = 0.025
    ventricular_age2: float = 0.000184
    ventricular_male: float = 0.21
    ventricular_sd: float = 0.3319
    brain_level: float = 1_494_700.0
    brain_age: float = -5_500.0
    brain_age2: float = -40.0
    brain_male: float = 0.0
    brain_ventricular: float = -1.3
    brain_sd: float = 59_600.0
    age_range: Bounds = (0.0, 1.0)
    ventricular_range: Bounds = (0.0, 1.0)
    brain_range: Bounds = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not 0 <= self.male_proportion <= 1:
            raise CovariateError(
                f"male_proportion must lie within [0, 1], found {self.male_proportion}"
            )
        for name in ("age_sd", "ventricular_scale", "ventricular_sd", "brain_sd"):
            if not getattr(self, name) > 0:
                raise CovariateError(f"{name} must be positive, found {getattr(self, name)}")
        for name in ("age_range", "ventricular_range", "brain_range"):
            _check(name.removesuffix("_range"), getattr(self, name), name)

    def draw(
        self,
        n: int,
        *,
        seed: int | np.random.Generator = 0,
        sex: float | str | None = None,
        age: Bounds | None = None,
        ventricular_volume: Bounds | None = None,
        brain_volume: Bounds | None = None,
    ) -> dict[str, Array]:
        """Draw covariates from the distribution, given the ranges.

        Parameters
        ----------
        n
            How many rows, at least 1.
        seed
            An integer in [0, 2⁶⁴): the same one gives the same rows. Or a generator to draw from.
        sex
            0 or ``"female"``, 1 or ``"male"``, ``"balanced"`` (``n // 2`` men in random places),
            or as it occurs, given the ranges (default).
        age, ventricular_volume, brain_volume
            Normalised ``(low, high)``; equal ends fix the value. Beyond [0, 1] is allowed: the
            distribution extends there. By default the distribution's own ranges.

        Returns
        -------
        dict of str to ndarray
            ``sex``, ``age``, ``ventricular_volume``, ``brain_volume`` in this order, each of
            shape ``(n,)``, float64, normalised, within the ranges.

        Raises
        ------
        CovariateError
            ``n`` below 1, an unknown sex, a sex the distribution does not have, a range that is
            reversed or not finite, a seed outside [0, 2⁶⁴).

        Examples
        --------
        >>> old = UK_BIOBANK.draw(1000, age=(0.9, 1.0))["ventricular_volume"].mean()
        >>> young = UK_BIOBANK.draw(1000, age=(0.0, 0.1))["ventricular_volume"].mean()
        >>> bool(old > 2 * young)
        True
        """
        n = _check_count(n)
        asked = {
            AGE: self.age_range if age is None else age,
            VENTRICULAR_VOLUME: (
                self.ventricular_range if ventricular_volume is None else ventricular_volume
            ),
            BRAIN_VOLUME: self.brain_range if brain_volume is None else brain_volume,
        }
        bounds = {of: _check(of.name, pair, f"{of.name} range") for of, pair in asked.items()}
        within = _Within(*(_natural(of, pair) for of, pair in bounds.items()))
        uniform = np.maximum(_generator(seed).random((4, n)), TINY)
        sexes, ages = self._draw_sex_and_age(uniform[0], uniform[1], sex, within)
        ventricles, brain = np.empty(n), np.empty(n)
        for start in range(0, n, _CHUNK):
            part = slice(start, start + _CHUNK)
            ventricles[part], brain[part] = self._draw_volumes(
                uniform[2:, part], sexes[part], ages[part], within
            )
        natural = zip(bounds.items(), (ages, ventricles, brain), strict=True)
        return {SEX.name: sexes} | {
            of.name: np.clip(of.normalise(values), *pair) for (of, pair), values in natural
        }

    @classmethod
    def fit(cls, table: pd.DataFrame | Mapping[str, Any]) -> JointDistribution:
        """The same family of distributions, fitted to rows.

        The share of men; the age density, piecewise linear, so that any histogram is followed;
        the two regressions by least squares, with their residual spreads. The ranges become
        those of the rows, so that draws stay among the values seen unless ranges are given.

        Parameters
        ----------
        table
            Columns ``sex`` (0 or 1), ``age``, ``ventricular_volume``, ``brain_volume``,
            normalised; others are ignored.

        Raises
        ------
        CovariateError
            A column is missing, a value is not finite, a sex is neither 0 nor 1, or there are
            fewer than 50 rows.

        Examples
        --------
        >>> like = JointDistribution.fit(UK_BIOBANK.draw(5000, age=(0.5, 1.0)))
        >>> bool(like.draw(10)["age"].min() >= 0.5)
        True
        """
        rows = _check_table(table)
        sex, age = rows[SEX.name], AGE.denormalise(rows[AGE.name])
        ventricles = VENTRICULAR_VOLUME.denormalise(rows[VENTRICULAR_VOLUME.name])
        brain = BRAIN_VOLUME.denormalise(rows[BRAIN_VOLUME.name])
        scale = cls.ventricular_scale
        centred = age - AGE_REFERENCE
        design = np.stack([np.ones_like(age), centred, centred**2, sex], axis=1)
        v, v_sd = _regress(design, np.arcsinh(ventricles / scale))
        design = np.column_stack([design, ventricles - VENTRICULAR_REFERENCE])
        b, b_sd = _regress(design, brain)
        fitted = cls(
            male_proportion=float(sex.mean()),
            age_mean=float(age.mean()),
            age_sd=max(float(age.std()), 1e-3),
            age_knots=_age_knots(age),
            ventricular_sd=max(v_sd, 1e-3),
            brain_sd=max(b_sd, 100.0),
            age_range=_extent(rows[AGE.name]),
            ventricular_range=_extent(rows[VENTRICULAR_VOLUME.name]),
            brain_range=_extent(rows[BRAIN_VOLUME.name]),
        )
        names = ("level", "age", "age2", "male", "ventricular")
        found: dict[str, Any] = {
            f"{volume}_{name}": float(value)
            for volume, values in (("ventricular", v), ("brain", b))
            for name, value in zip(names, values, strict=False)
        }
        return replace(fitted, **found)

    def _draw_sex_and_age(
        self, u_sex: Array, u_age: Array, sex: float | str | None, within: _Within
    ) -> tuple[Array, Array]:
        n = len(u_sex)
        densities = [self._age_density(value, within) for value in (0.0, 1.0)]
        if sex is None:
            with np.errstate(divide="ignore"):
                prior = np.log([1 - self.male_proportion, self.male_proportion])
            female, male = (prior[i] + densities[i].log_mass[0] for i in (0, 1))
            sexes = (u_sex < 1 / (1 + np.exp(min(female - male, 700.0)))).astype(np.float64)
        elif isinstance(sex, str) and sex.lower() == "balanced":
            sexes = (np.argsort(np.argsort(u_sex)) < n // 2).astype(np.float64)
        else:
            sexes = np.full(n, _check_sex(sex))
        if sex is not None:
            self._check_present(sexes)
        ages = np.empty(n)
        for value in (0, 1):
            chosen = sexes == value
            ages[chosen] = densities[value].quantile(u_age[chosen])
        return sexes, ages

    def _check_present(self, sexes: Array) -> None:
        for value, share in ((0, 1 - self.male_proportion), (1, self.male_proportion)):
            if share == 0 and (sexes == value).any():
                raise CovariateError(
                    f"sex {value} was asked, but the rows this distribution was fitted to have "
                    f"only sex {1 - value}; ask for that one, or fit to rows with both"
                )

    def _age_density(self, sex: float, within: _Within) -> Density:
        """Age given the sex and both ranges of volumes, up to a factor: one row."""

        def log_density(age: Array) -> Array:
            flat = age.ravel()
            mass = self._ventricular_density(np.full_like(flat, sex), flat, within).log_mass
            return self._log_age(age) + mass.reshape(age.shape)

        low, high = (np.array([bound]) for bound in within.age)
        return Density.of(log_density, low, high, nodes=513)

    def _log_age(self, age: Array) -> Array:
        if not self.age_knots:
            return -0.5 * ((age - self.age_mean) / self.age_sd) ** 2
        knots, density = np.array(self.age_knots).T
        inside = np.clip(age, knots[0], knots[-1])
        tail = (inside - self.age_mean) ** 2 - (age - self.age_mean) ** 2
        return np.log(np.interp(inside, knots, density)) + 0.5 * tail / self.age_sd**2

    def _ventricular_mean(self, sex: Array, age: Array) -> Array:
        a = age - AGE_REFERENCE
        slope = self.ventricular_age + self.ventricular_age2 * a
        return self.ventricular_level + slope * a + self.ventricular_male * sex

    def _brain_mean(self, sex: Array, age: Array, ventricles: Array) -> Array:
        a = age - AGE_REFERENCE
        given_v = self.brain_ventricular * (ventricles - VENTRICULAR_REFERENCE)
        slope = self.brain_age + self.brain_age2 * a
        return self.brain_level + slope * a + self.brain_male * sex + given_v

    def _ventricular_density(self, sex: Array, age: Array, within: _Within) -> Density:
        """Standardised asinh volume given sex, age and both ranges, one density per row."""
        mean = self._ventricular_mean(sex, age)[:, None]
        low, high = (
            (np.arcsinh(bound / self.ventricular_scale) - mean[:, 0]) / self.ventricular_sd
            for bound in within.ventricles
        )

        def log_density(z: Array) -> Array:
            volume = self.ventricular_scale * np.sinh(mean + self.ventricular_sd * z)
            centre = self._brain_mean(sex[:, None], age[:, None], volume)
            low, high = ((bound - centre) / self.brain_sd for bound in within.brain)
            return -0.5 * z**2 - LOG_ROOT_TAU + log_interval(low, high)

        # 40 standard deviations hold all that a double can; the nodes go where the mass is
        nearest = np.clip(0.0, low, high)
        low, high = np.maximum(low, nearest - 40), np.minimum(high, nearest + 40)
        return Density.of(log_density, low, high, nodes=161)

    def _draw_volumes(
        self, uniform: Array, sex: Array, age: Array, within: _Within
    ) -> tuple[Array, Array]:
        z = self._ventricular_density(sex, age, within).quantile(uniform[0])
        transformed = self._ventricular_mean(sex, age) + self.ventricular_sd * z
        ventricles = np.clip(self.ventricular_scale * np.sinh(transformed), *within.ventricles)
        centre = self._brain_mean(sex, age, ventricles)
        low, high = ((bound - centre) / self.brain_sd for bound in within.brain)
        return ventricles, centre + self.brain_sd * truncated_normal(low, high, uniform[1])


@dataclass(frozen=True)
class _Within:
    """Ranges in natural units."""

    age: Bounds
    ventricles: Bounds
    brain: Bounds


def _regress(design: Array, target: Array) -> tuple[Array, float]:
    """Least-squares coefficients, and the spread of the residuals."""
    scale = np.maximum(np.abs(design).max(axis=0), 1e-12)
    coefficients, _, rank, _ = np.linalg.lstsq(design / scale, target, rcond=1e-9)
    coefficients = coefficients / scale
    residuals = target - design @ coefficients
    return coefficients, float(np.sqrt((residuals**2).sum() / (len(target) - rank)))


def _age_knots(age: Array) -> tuple[tuple[float, float], ...]:
    """The age density as a frequency polygon; empty if all ages are the same.

    Each age is shared between the two knots next to it, so that whole years leave no comb.
    """
    low, high = float(age.min()), float(age.max())
    if high - low < 1e-6:
        return ()
    count = int(np.clip(2 * len(age) ** (1 / 3), 5, 41))
    step = (high - low) / (count - 1)
    position = (age - low) / step
    left = np.minimum(position.astype(np.intp), count - 2)
    right = position - left
    weight = np.bincount(left, 1 - right, count) + np.bincount(left + 1, right, count) + 1e-3
    weight[[0, -1]] *= 2  # the outer knots stand for half a step
    density = weight / (len(age) * step)
    return tuple(zip(np.linspace(low, high, count).tolist(), density.tolist(), strict=True))


def _extent(values: Array) -> Bounds:
    return float(values.min()), float(values.max())


def _natural(covariate: Covariate, bounds: Bounds) -> Bounds:
    low, high = covariate.denormalise(bounds)
    # a range too thin for nodes of its own is a point
    return float(low), float(high if bounds[1] - bounds[0] > _THIN else low)


def _check(name: str, bounds: Bounds, argument: str) -> Bounds:
    low, high = check_range(name, bounds, extrapolate=True, argument=argument)
    if max(-low, high) > _FARTHEST:
        raise CovariateError(
            f"{argument} ({low:g}, {high:g}) is beyond any brain: normalised bounds must lie "
            f"within ±{_FARTHEST:g}; did you mean natural units?"
        )
    return low, high


def _check_count(n: int) -> int:
    try:
        count = operator.index(n)
    except TypeError:
        raise CovariateError(f"n must be a whole number of rows, found {n!r}") from None
    if count < 1:
        raise CovariateError(f"n must be at least 1, found {count}")
    return count


def _check_sex(sex: float | str) -> float:
    try:
        return parse_sex(sex)
    except CovariateError:
        raise CovariateError(
            f'sex must be "female" or "male" (or 0 / 1), "balanced", or None, found {sex!r}'
        ) from None


def _generator(seed: int | np.random.Generator) -> np.random.Generator:
    if isinstance(seed, np.random.Generator):
        return seed
    try:
        number = operator.index(seed)
    except TypeError:
        raise CovariateError(f"seed must be an integer or a Generator, found {seed!r}") from None
    if not 0 <= number < 2**64:
        raise CovariateError(f"seed must be in [0, 2**64), found {number}")
    return np.random.Generator(np.random.Philox(key=np.array([number, _STREAM], np.uint64)))


def _check_table(table: pd.DataFrame | Mapping[str, Any]) -> dict[str, Array]:
    absent = [name for name in NAMES if name not in table]
    if absent:
        raise CovariateError(
            f"the table lacks the covariate column(s) {', '.join(absent)}; found {list(table)}"
        )
    rows = {name: np.asarray(table[name], dtype=np.float64) for name in NAMES}
    lengths = {name: len(values) for name, values in rows.items()}
    if len(set(lengths.values())) > 1:
        raise CovariateError(f"the columns must be of one length, found {lengths}")
    if (count := lengths[AGE.name]) < MIN_ROWS:
        raise CovariateError(
            f"fitting needs at least {MIN_ROWS} rows, found {count}; draw from a larger "
            "manifest, or from the published distribution"
        )
    for name, values in rows.items():
        if (bad := np.flatnonzero(~np.isfinite(values))).size:
            raise CovariateError(
                f"row {bad[0]} has {name} = {values[bad[0]]}; covariates must be finite numbers "
                "(drop the row or give it a value)"
            )
    if (bad := np.flatnonzero((rows[SEX.name] != 0) & (rows[SEX.name] != 1))).size:
        raise CovariateError(f"row {bad[0]} has sex = {rows[SEX.name][bad[0]]}; expected 0 or 1")
    return rows


UK_BIOBANK = JointDistribution()
"""The cohort the published model was trained on; see :class:`JointDistribution`."""
