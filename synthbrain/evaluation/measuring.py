"""Covariates as they are measured on volumes, each volume once."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from generation.evaluate.segmentations import (
    MEASURED,
    Measurements,
    Measurer,
    measure_each,
    measure_folder,
)
from generation.evaluate.segmenters import Segmenter
from synthbrain.evaluation.sets import VolumeSet
from synthbrain.progress import track

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from generation.evaluate.regressor import Regressor

    Column = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """Covariates of volumes as they were measured.

    Parameters
    ----------
    columns
        By covariate, ``(n,)`` in natural units (sex: 0 to 1); NaN where it could not be measured.
    by
        Who measured, and what failed, for the report.
    """

    columns: Mapping[str, Column]
    by: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Instruments:
    """What measures covariates, and where that is kept.

    Parameters
    ----------
    folder
        Where measurements are kept.
    measurer
        Tells ventricular and brain volume of each volume.
    labels
        Instead, a folder of label maps named after the ids.
    regressor
        Tells age, sex or others from volumes; where a measurer tells the same, the measurer counts.
    progress
        Show progress bars on standard error.
    """

    folder: Path
    measurer: Measurer | None = None
    labels: Path | None = None
    regressor: Regressor | None = None
    progress: bool = True

    def measure(self, volumes: VolumeSet) -> Measured:
        """All covariates that can be measured; what an earlier call kept is not made again."""
        columns: dict[str, Column] = {}
        by: dict[str, Any] = {}
        found = None
        if self.labels is not None:
            found = measure_folder(self.labels, volumes.ids)
            by["volumes"] = {"name": f"label maps in {self.labels}"}
        elif self.measurer is not None:
            found = self._volumetry(volumes, self.measurer)
            by["volumes"] = {"name": self.measurer.name, "version": self.measurer.version}
        if found is not None:
            by["volumes"]["failures"] = dict(found.failures)
            columns |= {name: found.column(name, volumes.ids) for name in MEASURED}
        if self.regressor is not None:
            predicted = self._predicted(volumes, self.regressor)
            for place, name in enumerate(self.regressor.names):
                columns.setdefault(name, predicted[:, place])
            by["regressor"] = {"names": list(self.regressor.names)}
        return Measured(columns, by)

    def _volumetry(self, volumes: VolumeSet, measurer: Measurer) -> Measurements:
        if isinstance(measurer, Segmenter):
            maps = self.folder / "segmentations" / f"{measurer.name}-{volumes.identity[:16]}"
            return measurer.measure_all(self._each(volumes, range(len(volumes))), maps)
        record = _Record(self.folder / f"measured-{measurer.name}-{measurer.version}.jsonl")
        todo = [place for place, key in enumerate(volumes.keys) if key not in record.found]
        for place, volume in zip(todo, self._each(volumes, todo), strict=True):
            record.keep(volumes.keys[place], measure_each(measurer, [volume]))
        return record.of(volumes)

    def _each(self, volumes: VolumeSet, places: Sequence[int]) -> Iterator[tuple[str, Any, Any]]:
        what = f"measuring {volumes.name}"
        for place in track(places, total=len(places), what=what, show=self.progress):
            yield volumes.ids[place], volumes[place].numpy(), volumes.affine

    def _predicted(self, volumes: VolumeSet, regressor: Regressor) -> Column:
        """``(n, k)`` in natural units."""
        what = f"{', '.join(regressor.names)} of {volumes.name}"
        places = range(len(volumes))
        each = track(places, total=len(volumes), what=what, show=self.progress)
        return regressor.predict_each(volumes[place][None] for place in each)


class _Record:
    """Values, or why there are none, by key: a file with a line of JSON for each volume."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[str, tuple[Mapping[str, float], str]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() else ""
        if text and not text.endswith("\n"):  # a line cut short counts as none, and is closed
            path.write_text(text + "\n")
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                key, values, problem = json.loads(line)
                self.found[key] = (values, problem)

    def keep(self, key: str, one: Measurements) -> None:
        """What became of one volume."""
        values = dict(next(iter(one.values.values()), {}))
        problem = next(iter(one.failures.values()), "")
        self.found[key] = (values, problem)
        with self._path.open("a") as file:
            file.write(json.dumps([key, values, problem]) + "\n")

    def of(self, volumes: VolumeSet) -> Measurements:
        """What became of each volume of a set, by id."""
        found = {id: self.found[key] for id, key in zip(volumes.ids, volumes.keys, strict=True)}
        return Measurements(
            values={id: values for id, (values, _) in found.items() if values},
            failures={id: problem for id, (_, problem) in found.items() if problem},
        )
