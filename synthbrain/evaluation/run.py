"""An evaluation: its parts one after the other, and what comes of them."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import synthbrain
from generation.errors import EvaluationError
from synthbrain.errors import UsageError
from synthbrain.evaluation.metrics import metrics
from synthbrain.evaluation.sets import VolumeSet
from synthbrain.files import write

if TYPE_CHECKING:
    from generation.evaluate.networks import FeatureNetwork
    from generation.evaluate.regressor import Regressor
    from generation.evaluate.segmentations import Measurer
    from generation.evaluate.vectors import Features
    from generation.train.settings import RegressionSettings
    from synthbrain.evaluation.fidelity import FeatureSpace

PARTS = ("fidelity", "diversity", "conditioning", "memorisation", "utility")
"""What an evaluation consists of, in this order."""

_FEWEST = 3
"""Volumes of which pairs tell a spread."""

_MEMBERS = "train"
"""The split a generator learned from."""

_PACKAGES = ("torch", "monai", "numpy", "scipy", "matplotlib")


def plain(value: Any) -> Any:
    """A value as JSON has it: lists, dicts, numbers and text; None for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything that volumes are evaluated with.

    Parameters
    ----------
    synthetic
        The volumes in question.
    folder
        Where the report and all that can be taken up again are kept.
    real
        Real volumes (or others to compare with): for fidelity, and beside the synthetic ones
        wherever that makes sense. Its splits ``train`` and ``test`` serve utility.
    training
        What the generator learned from, with a split ``train`` and others it never saw: for the
        audit of memorisation.
    network
        Computes features.
    measurer, labels, regressor
        As in :class:`synthbrain.evaluation.measuring.Instruments`.
    sweeps
        As in :func:`synthbrain.evaluation.conditioning.conditioning`.
    spaces
        As in :func:`synthbrain.evaluation.memorisation.memorisation`; features are added.
    trials
        Settings of the network that utility trains.
    measures
        Some of :data:`synthbrain.evaluation.diversity.MEASURES`; all of them by default.
    pairs
        Pairs of volumes a set that diversity compares.
    parts
        Which of :data:`PARTS`.
    device
        Where to compute.
    seed
        Of all draws.
    """

    synthetic: VolumeSet
    folder: Path
    real: VolumeSet | None = None
    training: VolumeSet | None = None
    network: FeatureNetwork | None = None
    measurer: Measurer | None = None
    labels: Path | None = None
    regressor: Regressor | None = None
    spaces: Mapping[str, Features] = field(default_factory=dict)
    trials: RegressionSettings | None = None
    measures: Sequence[str] | None = None
    pairs: int = 1000
    sweeps: int = 0
    parts: Sequence[str] = PARTS
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown:
            raise UsageError(f"unknown part {unknown[0]!r}; there are {', '.join(PARTS)}")
        if self.sweeps and self.labels is not None:
            raise UsageError(
                f"volumes of a sweep are made to be measured, and {self.labels} has no label maps "
                "of them; give --segmenter instead of --labels, or no --sweeps"
            )

    @property
    def members(self) -> VolumeSet:
        """The volumes a generator learned from.

        Raises
        ------
        UsageError
            They are not known.
        """
        if self.training is None:
            raise UsageError("there are no training volumes; give training")
        return self.training.split(_MEMBERS)

    def run(self, *, progress: bool = True) -> dict[str, Any]:
        """Measure all that can be measured, and write ``results.json`` and ``report.html``.

        Parameters
        ----------
        progress
            Show progress bars on standard error.

        Returns
        -------
        dict
            What ``results.json`` holds: settings, one entry a part, a flat table of ``metrics``,
            seconds, and what was not measured and why.

        Raises
        ------
        SynthBrainError
            Volumes that cannot be had, or a folder that cannot be written to. What a part cannot
            make sense of ends that part alone.
        """
        from synthbrain.evaluation.figures import require
        from synthbrain.evaluation.page import write_page

        require()
        results: dict[str, Any] = self._about()
        missing: dict[str, str] = {}
        for part in PARTS:
            reason = "was not asked for" if part not in self.parts else self._lacks(part)
            if reason:
                missing[part] = reason
                continue
            began = time.perf_counter()
            try:
                results[part] = self._measure(part, progress)
            except EvaluationError as error:
                missing[part] = str(error)
            results["seconds"][part] = round(time.perf_counter() - began, 1)
        results["not_measured"] = missing
        results["metrics"] = metrics(results)
        results = plain(results)
        text = json.dumps(results, indent=1, allow_nan=False) + "\n"
        write(self.folder / "results.json", text.encode())
        write_page(self.folder / "report.html", results, self._pictured())
        return results

    def _pictured(self) -> dict[str, VolumeSet]:
        sets = {"synthetic": self.synthetic}
        if self.real is not None:
            sets["real"] = self.real
        if self.training is not None:
            sets["members"] = self.members
        return sets

    def _about(self) -> dict[str, Any]:
        versions = {"synthbrain": synthbrain.__version__, "python": platform.python_version()}
        for package in _PACKAGES:
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                versions[package] = "not installed"
        sets = {"synthetic": self.synthetic, "real": self.real, "training": self.training}
        return {
            "sets": {name: one.facts() for name, one in sets.items() if one is not None},
            "settings": {"seed": self.seed, "device": self.device, "pairs": self.pairs},
            "versions": versions,
            "seconds": {},
        }

    def _lacks(self, part: str) -> str:
        """Why a part cannot be measured; empty where it can."""
        needs: dict[str, Callable[[], str]] = {
            "fidelity": self._lacks_real,
            "diversity": self._lacks_volumes,
            "conditioning": self._lacks_measurer,
            "memorisation": self._lacks_training,
            "utility": self._lacks_trials,
        }
        return needs[part]()

    def _lacks_volumes(self) -> str:
        return "" if len(self.synthetic) >= _FEWEST else "needs three volumes or more"

    def _lacks_real(self) -> str:
        if self.real is None:
            return "needs real volumes to compare with: --real"
        if self.network is None:
            return "needs a network of features: --features"
        return self._other_grid(self.real)

    def _lacks_measurer(self) -> str:
        if not self.synthetic.conditional:
            return f"the rows of {self.synthetic.name} ask for nothing"
        if self.measurer is None and self.labels is None and self.regressor is None:
            return "needs something that measures: --segmenter, --labels or --regressor"
        if self.sweeps and self.synthetic.dataset.resolver.generator is None:
            return "sweeps need a generator: --generator"
        return ""

    def _lacks_training(self) -> str:
        if self.training is None:
            return "needs what the generator learned from: --training"
        inside, outside = len(self.members), len(self.training.without(_MEMBERS))
        if inside < 4 or outside < 2:
            return (
                f"{self.training.name} has {inside} rows of split {_MEMBERS} and {outside} others, "
                "needs 4 and 2"
            )
        return self._other_grid(self.training)

    def _lacks_trials(self) -> str:
        if self.trials is None:
            return "trains networks, which takes long: --utility asks for it"
        if self.real is None:
            return "needs real volumes to test on: --real"
        if not (self.real.conditional and self.synthetic.conditional):
            return "needs volumes with covariates"
        few = [name for name in ("train", "test") if len(self.real.split(name)) < 2]
        if few:
            return f"{self.real.name} has too few rows of split {few[0]}"
        return self._other_grid(self.real)

    def _other_grid(self, other: VolumeSet) -> str:
        """Why volumes cannot be compared with the synthetic ones; empty where they can."""
        if other.shape == self.synthetic.shape:
            return ""
        return (
            f"{other.name} has volumes of {_sides(other)} voxels, {self.synthetic.name} of "
            f"{_sides(self.synthetic)}: bring them onto one grid"
        )

    def _measure(self, part: str, progress: bool) -> dict[str, Any]:
        measure: dict[str, Callable[[bool], dict[str, Any]]] = {
            "fidelity": self._fidelity,
            "diversity": self._diversity,
            "conditioning": self._conditioning,
            "memorisation": self._memorisation,
            "utility": self._utility,
        }
        return measure[part](progress)

    def _fidelity(self, progress: bool) -> dict[str, Any]:
        from synthbrain.evaluation.fidelity import fidelity

        assert self.real is not None
        space = self._features(progress)
        assert space is not None
        return fidelity(self.synthetic, self.real, space, seed=self.seed)

    def _features(self, progress: bool) -> FeatureSpace | None:
        from synthbrain.evaluation.fidelity import FeatureSpace

        if self.network is None:
            return None
        folder = self.folder / "features"
        return FeatureSpace(
            network=self.network, folder=folder, device=self.device, progress=progress
        )

    def _diversity(self, progress: bool) -> dict[str, Any]:
        from synthbrain.evaluation.diversity import MEASURES, diversity

        sets = [each for each in (self.synthetic, self.real) if each is not None]
        return diversity(
            [each for each in sets if len(each) >= _FEWEST], self.folder / "pairs",
            measures=tuple(MEASURES) if self.measures is None else self.measures,
            count=self.pairs, device=self.device, seed=self.seed, progress=progress,
        )  # fmt: skip

    def _conditioning(self, progress: bool) -> dict[str, Any]:
        from synthbrain.evaluation.conditioning import conditioning
        from synthbrain.evaluation.measuring import Instruments

        instruments = Instruments(
            folder=self.folder / "measured", measurer=self.measurer, labels=self.labels,
            regressor=self.regressor, progress=progress,
        )  # fmt: skip
        return conditioning(self.synthetic, instruments, sweeps=self.sweeps, seed=self.seed)

    def _memorisation(self, progress: bool) -> dict[str, Any]:
        from synthbrain.evaluation.memorisation import memorisation

        assert self.training is not None
        return memorisation(
            self.synthetic, self.members, self.training.without(_MEMBERS), spaces=self.spaces,
            kept=self._features(progress), seed=self.seed, progress=progress,
        )  # fmt: skip

    def _utility(self, progress: bool) -> dict[str, Any]:
        from synthbrain.evaluation.utility import utility

        assert self.real is not None
        assert self.trials is not None
        return utility(
            self.synthetic, self.real.split("train"), self.real.split("test"),
            settings=self.trials, folder=self.folder / "trials", device=self.device,
            progress=progress,
        )  # fmt: skip


def _sides(volumes: VolumeSet) -> str:
    return " x ".join(map(str, volumes.shape))
