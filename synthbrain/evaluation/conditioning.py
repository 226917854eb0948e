"""Whether volumes are as they were asked to be."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from generation.covariates import AGE, BRAIN_VOLUME, NAMES, VENTRICULAR_VOLUME, by_name
from generation.errors import EvaluationError
from generation.evaluate.conditioning import agreement, classification
from generation.evaluate.leakage import leakage, sweep_report
from generation.evaluate.segmentations import Measurements, Measurer, measure_each, measure_folder
from generation.evaluate.segmenters import Segmenter
from synthbrain.evaluation.sets import VolumeSet
from synthbrain.evaluation.sweeps import sweep
from synthbrain.progress import track

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from generation.evaluate.regressor import Regressor

    Column = NDArray[np.float64]

_MEASURED = {
    "ventricular_volume": (VENTRICULAR_VOLUME, 1000.0, "mL"),
    "brain_volume": (BRAIN_VOLUME, 1000.0, "mL"),
    "age": (AGE, 1.0, "years"),
}
"""Covariate, its unit in the report, and how much of its own unit that is."""


def conditioning(
    volumes: VolumeSet,
    folder: Path,
    *,
    measurer: Measurer | None = None,
    labels: Path | None = None,
    regressor: Regressor | None = None,
    sweeps: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Asked against measured covariates.

    Parameters
    ----------
    volumes
        Of a conditional cohort.
    folder
        Where measurements are kept.
    measurer
        Tells ventricular and brain volume of each volume.
    labels
        Instead, a folder of label maps named after the ids.
    regressor
        Tells age, sex or others from volumes.
    sweeps
        Seeds of sweeps: of each covariate that is measured, five values are asked at every seed
        with the others at their means. Takes a generator.
    seed
        Of the bootstrap.
    progress
        Show progress bars on standard error.

    Returns
    -------
    dict
        By covariate: asked and measured values and how they agree; and the leakage between them.
    """
    columns, told = _columns(volumes, folder, measurer, labels, regressor, progress)
    found: dict[str, Any] = {}
    asked = {name: volumes.table[name].to_numpy(dtype=np.float64) for name in NAMES}
    for name, values in columns.items():
        if name == "sex":
            found[name] = {
                "classification": asdict(classification(asked["sex"], values)),
                "failed": int((~np.isfinite(values)).sum()),
            }
            continue
        covariate, unit, words = _MEASURED[name]
        wanted = np.asarray(covariate.denormalise(asked[name])) / unit
        ends = (covariate.low / unit, covariate.high / unit)
        fit = agreement(wanted, values / unit, trained=ends, seed=seed)
        found[name] = {
            "unit": words,
            "trained": ends,
            "asked": wanted.tolist(),
            "measured": [_number(value) for value in values / unit],
            "agreement": asdict(fit),
        }
    moved = {
        name: _moved(
            sweep(volumes, name, sweeps), name, folder, measurer, regressor, seed, progress
        )
        for name in (columns if sweeps and labels is None else ())
    }
    return {
        "by": told, "covariates": found, "leakage": _leakage(asked, columns), "sweeps": moved,
    }  # fmt: skip


def _moved(
    volumes: VolumeSet,
    name: str,
    folder: Path,
    measurer: Measurer | None,
    regressor: Regressor | None,
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    """What moves in a sweep of one covariate, all normalised."""
    columns, _ = _columns(volumes, folder, measurer, None, regressor, progress)
    measured = {
        each: values if each == "sex" else by_name(each).normalise(values)
        for each, values in columns.items()
    }
    return asdict(sweep_report(volumes.table, measured, covariate=name, seed=seed))


def _columns(
    volumes: VolumeSet,
    folder: Path,
    measurer: Measurer | None,
    labels: Path | None,
    regressor: Regressor | None,
    progress: bool,
) -> tuple[dict[str, Column], dict[str, Any]]:
    """Measured values by covariate, natural units (sex: 0 to 1); and who measured."""
    columns: dict[str, Column] = {}
    told: dict[str, Any] = {}
    if labels is not None:
        found = measure_folder(labels, volumes.ids)
        told["volumes"] = {"name": f"label maps in {labels}", "failures": dict(found.failures)}
    elif measurer is not None:
        found = _measured(measurer, volumes, folder, progress)
        told["volumes"] = {
            "name": measurer.name, "version": measurer.version, "failures": dict(found.failures),
        }  # fmt: skip
    else:
        found = None
    if found is not None:
        for name in ("ventricular_volume", "brain_volume"):
            columns[name] = found.column(name, volumes.ids)
    if regressor is not None:
        values = _predicted(regressor, volumes, progress)
        for place, name in enumerate(regressor.names):
            columns.setdefault(name, values[:, place])
        told["regressor"] = {"names": list(regressor.names)}
    return columns, told


def _measured(measurer: Measurer, volumes: VolumeSet, folder: Path, progress: bool) -> Measurements:
    """Measurements of all volumes; those kept by an earlier call are not made again."""
    if isinstance(measurer, Segmenter):
        maps = folder / "segmentations" / f"{measurer.name}-{volumes.identity[:16]}"
        return measurer.measure_all(_each(volumes, range(len(volumes)), progress), maps)
    path = folder / f"measured-{measurer.name}-{measurer.version}.jsonl"
    kept = _kept(path)
    todo = [place for place, key in enumerate(volumes.keys) if key not in kept]
    with path.open("a") as file:
        for place, volume in zip(todo, _each(volumes, todo, progress), strict=True):
            one = measure_each(measurer, [volume])
            kept[volumes.keys[place]] = (
                dict(next(iter(one.values.values()), {})), next(iter(one.failures.values()), "")
            )  # fmt: skip
            file.write(json.dumps([volumes.keys[place], *kept[volumes.keys[place]]]) + "\n")
            file.flush()
    found = {id: kept[key] for id, key in zip(volumes.ids, volumes.keys, strict=True)}
    return Measurements(
        values={id: values for id, (values, _) in found.items() if values},
        failures={id: problem for id, (_, problem) in found.items() if problem},
    )


def _each(
    volumes: VolumeSet, places: Sequence[int], progress: bool
) -> Iterator[tuple[str, Any, Any]]:
    what = f"measuring {volumes.name}"
    for place in track(places, total=len(places), what=what, show=progress):
        yield volumes.ids[place], volumes[place].numpy(), volumes.affine


def _kept(path: Path) -> dict[str, tuple[dict[str, float], str]]:
    """Values and failures by key; a line cut short counts as none, and is closed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text() if path.exists() else ""
    if text and not text.endswith("\n"):
        path.write_text(text + "\n")
    found = {}
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            key, values, problem = json.loads(line)
            found[key] = (values, problem)
    return found


def _predicted(regressor: Regressor, volumes: VolumeSet, progress: bool) -> Column:
    """``(n, k)`` in natural units."""
    what = f"{', '.join(regressor.names)} of {volumes.name}"
    each = track(range(len(volumes)), total=len(volumes), what=what, show=progress)
    return regressor.predict_each(volumes[place][None] for place in each)


def _leakage(asked: Mapping[str, Column], columns: Mapping[str, Column]) -> dict[str, Any]:
    """The matrix of partial slopes, or why there is none."""
    try:
        return asdict(leakage(asked, columns))
    except EvaluationError as error:
        return {"missing": str(error)}


def _number(value: float) -> float | None:
    """A value as JSON knows it: there is no NaN."""
    return float(value) if np.isfinite(value) else None
