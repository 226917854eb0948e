"""The four covariates of a brain: order, units and ranges, in one place.

Inside the package every covariate is *normalised*: 0 and 1 are the ends of the range seen by the
published model in training. Natural units (years, mm³, ``"female"``/``"male"``) live at the edges.

Source of the ranges: Pinaya et al., "Brain Imaging Generation with Latent Diffusion Models",
arXiv 2209.07162, section 2 (UK Biobank fields 25004 and 25009 for the two volumes).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike, NDArray


class CovariateError(ValueError):
    """A covariate, a range of one, or a table of them that makes no sense."""


@dataclass(frozen=True, kw_only=True)
class Covariate:
    """One covariate and the affine map between its natural unit and [0, 1].

    Parameters
    ----------
    name
        Column name, the same everywhere in the package.
    unit
        Natural unit, as printed to people.
    low, high
        Natural values that normalise to 0 and to 1.
    """

    name: str
    unit: str
    low: float
    high: float

    def normalise(self, natural: ArrayLike) -> NDArray[np.float64]:
        """Natural unit to normalised; values beyond the range extrapolate.

        Examples
        --------
        >>> float(AGE.normalise(63.0))
        0.5
        """
        return (np.asarray(natural, dtype=np.float64) - self.low) / (self.high - self.low)

    def denormalise(self, normalised: ArrayLike) -> NDArray[np.float64]:
        """Normalised to natural unit, the inverse of :meth:`normalise`.

        Examples
        --------
        >>> float(AGE.denormalise(0.5))
        63.0
        """
        return self.low + np.asarray(normalised, dtype=np.float64) * (self.high - self.low)


SEX = Covariate(name="sex", unit="0 = female, 1 = male", low=0.0, high=1.0)
AGE = Covariate(name="age", unit="years", low=44.0, high=82.0)
VENTRICULAR_VOLUME = Covariate(name="ventricular_volume", unit="mm³", low=6_995.68, high=171_375.0)
BRAIN_VOLUME = Covariate(name="brain_volume", unit="mm³", low=1_144_240.0, high=1_793_910.0)

COVARIATES: tuple[Covariate, ...] = (SEX, AGE, VENTRICULAR_VOLUME, BRAIN_VOLUME)
"""In the order of the published model's conditioning vector."""

NAMES: tuple[str, ...] = tuple(covariate.name for covariate in COVARIATES)
SEXES: Mapping[str, float] = {"female": 0.0, "male": 1.0}


def conditioning(rows: pd.DataFrame) -> NDArray[np.float32]:
    """The conditioning vectors of some rows, shape ``(n, 4)``, float32, normalised.

    Raises
    ------
    CovariateError
        A covariate column is missing or holds a value that is not finite.
    """
    absent = [name for name in NAMES if name not in rows.columns]
    if absent:
        raise CovariateError(
            f"rows lack the covariate column(s) {', '.join(absent)}; found {list(rows.columns)}"
        )
    values = rows[list(NAMES)].to_numpy(dtype=np.float32)
    bad = ~np.isfinite(values)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise CovariateError(
            f"row {rows.index[row]!r} has {NAMES[column]} = {values[row, column]}; "
            "covariates must be finite numbers (drop the row or give it a value)"
        )
    return values


def check_range(
    name: str,
    bounds: tuple[float, float],
    *,
    extrapolate: bool = False,
    argument: str = "",
    natural: bool = False,
) -> tuple[float, float]:
    """Check one range of a covariate and return it normalised, as two floats.

    Parameters
    ----------
    name
        The covariate's name.
    bounds
        ``(low, high)``, both ends included.
    extrapolate
        Allow values outside [0, 1].
    argument
        What the user called it, for the error message.
    natural
        ``bounds`` are in the natural unit rather than normalised.

    Raises
    ------
    CovariateError
        Not a pair of finite numbers, reversed, or outside [0, 1] without ``extrapolate``.
    """
    argument = argument or f"{name} range"
    try:
        low, high = (float(bound) for bound in bounds)
    except (TypeError, ValueError):
        raise CovariateError(
            f"{argument} must be two numbers (low, high), found {bounds!r}"
        ) from None
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CovariateError(f"{argument} must be two finite numbers, found ({low}, {high})")
    if low > high:
        raise CovariateError(
            f"{argument} is reversed: found ({low:.10g}, {high:.10g}), expected low <= high; "
            f"write ({high:.10g}, {low:.10g})"
        )
    asked = f"({low:.10g}, {high:.10g})"
    if natural:
        low, high = by_name(name).normalise((low, high)).tolist()
    if not extrapolate and (low < 0 or high > 1):
        covariate = by_name(name)
        raise CovariateError(
            f"{argument} {asked} leaves the trained range [0, 1] "
            f"({covariate.low:,.10g} to {covariate.high:,.10g} {covariate.unit}); "
            "narrow it, or pass extrapolate=True (--extrapolate) to go beyond"
        )
    return low, high


def by_name(name: str) -> Covariate:
    """The covariate called ``name``.

    Raises
    ------
    CovariateError
        There is none.
    """
    for covariate in COVARIATES:
        if covariate.name == name:
            return covariate
    raise CovariateError(f"unknown covariate {name!r}; expected one of {', '.join(NAMES)}")


def parse_sex(sex: str | float) -> float:
    """``"female"``/``"male"``, their initials, or 0/1, as the normalised number.

    Raises
    ------
    CovariateError
        Anything else.
    """
    if isinstance(sex, str):
        for word, value in SEXES.items():
            if sex.lower() in (word, word[0]):
                return value
    elif sex in (0, 1):
        return float(sex)
    raise CovariateError(f'sex must be "female" or "male" (or 0 / 1), found {sex!r}')
