"""Whether volumes are as they were asked to be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from generation.covariates import AGE, BRAIN_VOLUME, NAMES, SEX, VENTRICULAR_VOLUME, by_name
from generation.errors import EvaluationError
from generation.evaluate.conditioning import agreement, classification
from generation.evaluate.leakage import leakage, sweep_report
from synthbrain.evaluation.sweeps import sweep

if TYPE_CHECKING:
    from synthbrain.evaluation.measuring import Column, Instruments
    from synthbrain.evaluation.sets import VolumeSet

_MEASURED = {
    VENTRICULAR_VOLUME.name: (VENTRICULAR_VOLUME, 1000.0, "mL"),
    BRAIN_VOLUME.name: (BRAIN_VOLUME, 1000.0, "mL"),
    AGE.name: (AGE, 1.0, "years"),
}
"""Covariate, how much of its own unit the report's unit is, and the latter's name."""


def conditioning(
    volumes: VolumeSet, instruments: Instruments, *, sweeps: int = 0, seed: int = 0
) -> dict[str, Any]:
    """Asked against measured covariates.

    Parameters
    ----------
    volumes
        Of a conditional cohort.
    instruments
        What measures them.
    sweeps
        Seeds of sweeps: of each covariate that is measured, five values are asked at every seed
        with the others at their means. Takes a generator. Label maps cannot be swept: there are
        none of volumes not made yet.
    seed
        Of the bootstrap.

    Returns
    -------
    dict
        By covariate: asked and measured values and how they agree; and the leakage between them.
    """
    measured = instruments.measure(volumes)
    asked = {name: volumes.table[name].to_numpy(dtype=np.float64) for name in NAMES}
    found = {
        name: _sexes(asked[name], values)
        if name == SEX.name
        else _amounts(name, asked[name], values, seed=seed)
        for name, values in measured.columns.items()
    }
    return {
        "by": measured.by,
        "covariates": found,
        "leakage": _leakage(asked, measured.columns),
        "sweeps": {
            name: _moved(sweep(volumes, name, sweeps), name, instruments, seed=seed)
            for name in (measured.columns if sweeps else ())
        },
    }


def _sexes(asked: Column, measured: Column) -> dict[str, Any]:
    return {
        "classification": asdict(classification(asked, measured)),
        "failed": int((~np.isfinite(measured)).sum()),
    }


def _amounts(name: str, asked: Column, measured: Column, *, seed: int) -> dict[str, Any]:
    """How a covariate with a unit, measured in its own one, follows the normalised one asked."""
    covariate, unit, words = _MEASURED[name]
    wanted = np.asarray(covariate.denormalise(asked)) / unit
    ends = (covariate.low / unit, covariate.high / unit)
    return {
        "unit": words,
        "trained": ends,
        "asked": wanted.tolist(),
        "measured": [_number(value) for value in measured / unit],
        "agreement": asdict(agreement(wanted, measured / unit, trained=ends, seed=seed)),
    }


def _moved(
    volumes: VolumeSet, covariate: str, instruments: Instruments, *, seed: int
) -> dict[str, Any]:
    """What moves in a sweep of one covariate, all normalised."""
    normalised = {
        name: values if name == SEX.name else by_name(name).normalise(values)
        for name, values in instruments.measure(volumes).columns.items()
    }
    return asdict(sweep_report(volumes.table, normalised, covariate=covariate, seed=seed))


def _leakage(asked: Mapping[str, Column], measured: Mapping[str, Column]) -> dict[str, Any]:
    """The matrix of partial slopes, or why there is none."""
    try:
        return asdict(leakage(asked, measured))
    except EvaluationError as error:
        return {"missing": str(error)}


def _number(value: float) -> float | None:
    """A value as JSON knows it: there is no NaN."""
    return float(value) if np.isfinite(value) else None
