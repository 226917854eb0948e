"""From the words of a command line to an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthbrain.errors import UsageError
from synthbrain.evaluation.run import PARTS, Evaluation
from synthbrain.evaluation.sets import VolumeSet
from synthbrain.home import home
from synthbrain.named import opener

if TYPE_CHECKING:
    from generation.evaluate.segmentations import Measurer
    from generation.evaluate.vectors import Features
    from generation.train.settings import RegressionSettings

PHANTOM = "phantom"
_KNOWS_PHANTOMS = ("phantom-", "demo-ldm-")
"""Generators whose volumes the built-in measurer reads."""


def features_folder() -> Path:
    """Where weights of feature networks lie."""
    return home() / "features"


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What to evaluate, and with what, by name; see ``synthbrain evaluate --help``."""

    synthetic: str
    folder: Path
    real: str | None = None
    training: str | None = None
    generator: str = "auto"
    limit: int = 1000
    features: str = "random"
    autoencoder: str | None = None
    segmenter: str | None = None
    labels: Path | None = None
    regressor: Path | None = None
    pairs: int = 1000
    sweeps: int = 0
    measures: Sequence[str] | None = None
    utility: str | None = None
    parts: Sequence[str] | None = None
    seed: int = 0
    device: str | None = None
    store: Path | None = None

    def open(self) -> Evaluation:
        """Everything opened; nothing is measured yet.

        Raises
        ------
        SynthBrainError, WeightsError, EvaluationError, TrainingError
            Something is not there.
        """
        from generation.evaluate import features
        from generation.evaluate.regressor import load_regressor
        from synthbrain.evaluation.diversity import check_measures
        from synthbrain.evaluation.figures import require

        require()
        self._check_labels()
        if self.measures is not None:
            check_measures(self.measures)
        parts = PARTS if self.parts is None else tuple(self.parts)
        device = self._device()
        synthetic = self._set(self.synthetic, None if self.generator == "none" else self.generator)
        regressor = None if self.regressor is None else load_regressor(self.regressor, device)
        return Evaluation(
            synthetic=synthetic,
            folder=self.folder,
            real=None if self.real is None else self._set(self.real, "auto"),
            training=None if self.training is None else self._set(self.training, "auto"),
            network=features.load(self.features, features_folder()),
            measurer=None if self.labels is not None else self._measurer(synthetic),
            labels=self.labels,
            regressor=regressor,
            spaces=self._spaces(device),
            trials=None if self.utility is None else _trials(self.utility),
            measures=self.measures,
            pairs=self.pairs,
            sweeps=self.sweeps,
            parts=parts,
            device=device,
            seed=self.seed,
        )

    def _device(self) -> str:
        from generation.options import find_device

        try:
            return str(find_device(self.device))
        except ValueError as error:
            raise UsageError(str(error)) from None

    def _check_labels(self) -> None:
        if self.labels is None:
            return
        if self.segmenter is not None:
            raise UsageError("give --segmenter or --labels, not both")
        if not self.labels.is_dir():
            raise UsageError(
                f"there is no folder {self.labels}; --labels takes one that holds label maps"
            )

    def _set(self, data: str, generator: str | None) -> VolumeSet:
        dataset = opener(data, generator=generator, store=self.store)()
        name = dataset.manifest.header.name
        return VolumeSet(name, dataset).first(self.limit)

    def _measurer(self, synthetic: VolumeSet) -> Measurer | None:
        from generation.evaluate.segmentations import PhantomMeasurer
        from generation.evaluate.segmenters import SEGMENTERS, Segmenter

        asked = self.segmenter
        if asked is None:
            return PhantomMeasurer() if synthetic.made_by.startswith(_KNOWS_PHANTOMS) else None
        if asked == PHANTOM:
            return PhantomMeasurer()
        if asked in SEGMENTERS:
            return SEGMENTERS[asked]
        if "{" not in asked:
            raise UsageError(
                f"unknown segmenter {asked!r}; there are {', '.join((PHANTOM, *SEGMENTERS))}, or "
                "write a command with {in} and {out}"
            )
        return Segmenter(name="command", command=asked)

    def _spaces(self, device: str) -> dict[str, Features]:
        if self.autoencoder is None:
            return {}
        from synthbrain.training import open_encoder

        network: Any = open_encoder(self.autoencoder).network.eval().to(device)
        return {"latents": lambda volumes: network.encode(volumes.to(device))[0].flatten(1)}


def _trials(name: str) -> RegressionSettings:
    from generation.train.settings import RegressionSettings, read_settings, recipe

    found = read_settings(Path(name)) if Path(name).is_file() else recipe(name)
    if not isinstance(found, RegressionSettings):
        raise UsageError(f"--utility takes a recipe of kind regression; {name} is {found.kind!r}")
    return found
