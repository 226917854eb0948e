"""Whether synthetic volumes help to train: on them, on real ones, and on both; tested on real ones.

The same small network (:mod:`generation.evaluate.regressor`) is trained for the same number of
optimiser steps in every arm, and tested on the same real volumes. Arms are

- ``real-1``, all real volumes (train on real, test on real),
- ``synthetic``, all synthetic ones (train on synthetic, test on real; Esteban et al. 2017, sec. 4),
- ``real-f`` and ``mixed-f`` for each fraction ``f``: that part of the real volumes, and the same
  part with all synthetic ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from generation.covariates import NAMES
from generation.errors import EvaluationError
from generation.evaluate.comparison import Arm, Utility, check_spread, compare
from generation.evaluate.intervals import RESAMPLES
from generation.evaluate.regressor import load_regressor
from generation.train.loop import CONDITION, IMAGE, Data, Run, Sample
from generation.train.regression import RegressionTask
from generation.train.settings import RegressionSettings
from generation.train.world import World

if TYPE_CHECKING:
    from torch import Tensor

    from generation.evaluate.intervals import Values

    Told = Callable[[str, int, int], None]

FEWEST_SEEDS = 3
"""Below three seeds nothing is said of the spread over them."""


def utility(
    real_train: Data,
    real_test: Data,
    synthetic: Data,
    *,
    settings: RegressionSettings,
    folder: Path,
    fractions: Sequence[float] = (0.1, 0.5, 1.0),
    seeds: Sequence[int] = (0, 1, 2),
    device: str = "cpu",
    told: Told | None = None,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> Utility:
    """Train every arm with every seed, test on real volumes, and compare.

    Parameters
    ----------
    real_train, real_test, synthetic
        Samples with ``image`` ``(1, x, y, z)`` and ``condition`` ``(4,)``, normalised.
    settings
        Of the network and its training, the same in all arms; the seed is replaced, and runs
        neither validate nor draw sheets.
    folder
        Keeps a run and a JSON file of predictions for each arm and seed. Those there are not made
        again, and a run that was cut short is gone on with.
    fractions
        Of the real volumes, in (0, 1]; which ones depends on the seed alone, and a smaller part is
        within a larger one.
    seeds
        At least three: of the order, the parameters and the parts.
    device
        Where to compute.
    told
        Called with arm, seed and steps done, after each step.
    level, resamples
        Of the intervals.

    Raises
    ------
    EvaluationError
        Too few seeds, fractions that are none, nothing to train on, test volumes that do not
        differ in a target, or a folder that holds another study.

    Notes
    -----
    Intervals are percentiles of a bootstrap that draws seeds and test subjects anew, the same ones
    for both arms of a difference. It takes subjects for independent, so give one volume a subject.
    Three seeds say little about the spread over seeds: take more where an interval is close to 0.
    A network that tells the same number of all subjects has ``r`` 0.
    """
    _check_design(fractions, seeds)
    data = _StudyData(real_train, real_test, synthetic)
    data.check(min(fractions, default=1.0))
    names = settings.system.targets
    found: dict[Arm, Values] = {}
    asked = np.empty(0)
    for arm in _arms(fractions):
        predictions = []
        for seed in seeds:
            how = settings.model_copy(
                update={"seed": seed, "validate_every": 0, "sheet_every": 0, "keep": 1}
            )
            trial = _Trial(
                arm=arm, settings=how, data=data, folder=folder, device=device, told=told
            )
            asked, predicted = trial.result()
            check_spread(names, asked)
            predictions.append(predicted)
        found[arm] = np.stack(predictions)
    return compare(names, asked, found, level=level, resamples=resamples)


class _StudyData(NamedTuple):
    """What networks are trained on, and the real volumes they are tested on."""

    real_train: Data
    real_test: Data
    synthetic: Data

    def check(self, part: float) -> None:
        """See that there are volumes to train and test on, the smallest part of the real ones too.

        Raises
        ------
        EvaluationError
            There are not.
        """
        empty = [name for name, data in self._asdict().items() if not len(data)]
        if empty:
            raise EvaluationError(
                f"{' and '.join(empty)} holds no volumes; utility needs all three"
            )
        if round(part * len(self.real_train)) < 2:
            raise EvaluationError(
                f"a fraction of {part:g} of {len(self.real_train)} real volumes is fewer than 2; "
                "take more"
            )


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """One arm with one seed."""

    arm: Arm
    settings: RegressionSettings
    data: _StudyData = field(repr=False)
    folder: Path
    device: str = "cpu"
    told: Told | None = None

    def result(self) -> tuple[Values, Values]:
        """Covariates of the test volumes ``(n, k)``, asked and predicted, in natural units."""
        path = self.folder / f"{self._name}.json"
        if not path.exists():
            self._write(path)
        try:
            kept = json.loads(path.read_text())
            facts, asked, predicted = kept["facts"], kept["asked"], kept["predicted"]
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(
                f"cannot read {path} ({type(error).__name__}); delete it and run again"
            ) from None
        if facts != self._facts:
            raise EvaluationError(
                f"{path} is of a study with other settings or volumes; choose another folder"
            )
        return np.array(asked), np.array(predicted)

    @property
    def _name(self) -> str:
        return f"{self.arm.name}-seed-{self.settings.seed}"

    @property
    def _facts(self) -> dict[str, Any]:
        """What a result depends on, as far as it can be told without reading volumes."""
        return {
            "settings": json.loads(self.settings.text()),
            "real": len(self.data.real_train),
            "synthetic": len(self.data.synthetic),
            "test": len(self.data.real_test),
        }

    def _write(self, path: Path) -> None:
        self._train()
        regressor = load_regressor(self.folder / self._name, self.device)
        asked: list[Tensor] = []
        predicted = regressor.predict_each(self._images(asked))
        truth = regressor.targets.denormalised(
            torch.stack(asked)[:, [NAMES.index(name) for name in regressor.names]]
        )
        kept = {"facts": self._facts, "asked": truth.tolist(), "predicted": predicted.tolist()}
        scratch = path.with_suffix(f".{os.getpid()}.partial")
        scratch.write_text(json.dumps(kept))
        os.replace(scratch, path)

    def _train(self) -> None:
        data = _Rows(self._parts())
        world = World(device=torch.device(self.device))
        task = RegressionTask(self.settings, data)
        run = Run(task, data, self.settings, self.folder / self._name, world)
        if self.told is not None:
            told, seed = self.told, self.settings.seed
            run.told = lambda step: told(self.arm.name, seed, step)
        for _ in run.advance():
            pass

    def _parts(self) -> list[tuple[Data, Sequence[int]]]:
        shuffled = np.random.Generator(np.random.Philox(self.settings.seed))
        rows = shuffled.permutation(len(self.data.real_train))
        count = round(self.arm.real * len(rows))
        real = [(self.data.real_train, rows[:count].tolist())]
        every = range(len(self.data.synthetic)) if self.arm.synthetic else ()
        return [*real, (self.data.synthetic, every)]

    def _images(self, asked: list[Tensor]) -> Iterator[Tensor]:
        """The test volumes one by one; their covariates are kept on the way."""
        for index in range(len(self.data.real_test)):
            sample = self.data.real_test[index]
            asked.append(sample[CONDITION].double())
            yield sample[IMAGE][None]


class _Rows:
    """Rows of some data, one after the other."""

    def __init__(self, parts: Sequence[tuple[Data, Sequence[int]]]) -> None:
        self._rows = [(data, row) for data, rows in parts for row in rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        data, row = self._rows[index]
        return data[row]


def _check_design(fractions: Sequence[float], seeds: Sequence[int]) -> None:
    if len(set(seeds)) < FEWEST_SEEDS or len(set(seeds)) < len(seeds):
        raise EvaluationError(
            f"utility takes at least {FEWEST_SEEDS} different seeds, found {list(seeds)}"
        )
    wrong = [fraction for fraction in fractions if not 0 < fraction <= 1]
    if wrong:
        raise EvaluationError(f"fractions of the real volumes lie in (0, 1], found {wrong[0]:g}")


def _arms(fractions: Sequence[float]) -> list[Arm]:
    wanted = [Arm(1.0, False), Arm(0.0, True)]
    wanted += [Arm(f, synthetic) for f in fractions for synthetic in (False, True)]
    return list(dict.fromkeys(wanted))
