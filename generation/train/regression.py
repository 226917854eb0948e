"""Training regressors of covariates, such as brain age (Cole et al. 2017).

The absolute difference between an output and its standardised covariate; for sex, the cross entropy
of a logit. Several covariates count equally.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from generation.covariates import BRAIN_VOLUME, NAMES, SEX, VENTRICULAR_VOLUME
from generation.errors import TrainingError
from generation.evaluate.regressor import Targets
from generation.train.augment import augmented
from generation.train.loop import CONDITION, IMAGE, Batch, Data, Run
from generation.train.networks import new_network
from generation.train.settings import REGRESSOR, RegressionSettings
from generation.train.sheets import Picture
from generation.train.world import order

_MEASURED = 64
_KEPT = 64


class RegressionTask:
    """A regressor to be trained on volumes and their covariates.

    Parameters
    ----------
    settings
        Of kind ``"regression"``.
    data
        What will be trained on: the first 64 samples it is going to see tell how covariates are
        spread.

    Raises
    ------
    TrainingError
        Samples have no covariates, a target does not vary, or volumes are to be scaled at random
        while they are what is to be told.
    """

    def __init__(self, settings: RegressionSettings, data: Data) -> None:
        self.settings = settings
        names = settings.system.targets
        sized = {VENTRICULAR_VOLUME.name, BRAIN_VOLUME.name} & set(names)
        if settings.augment.scale and sized:
            raise TrainingError(
                f"setting augment.scale changes {', '.join(sorted(sized))}, which is to be told; "
                "set it to 0"
            )
        self._columns = [NAMES.index(name) for name in names]
        self.targets = Targets.of(names, self._spread(data))
        self.modules: dict[str, nn.Module] = {
            REGRESSOR: new_network(settings.system, REGRESSOR, settings.seed)
        }
        self._network = self.modules[REGRESSOR]
        self._told: deque[Tensor] = deque(maxlen=_KEPT)

    def turns(self, step: int) -> Sequence[str]:
        """The regressor alone."""
        return (REGRESSOR,)

    def loss(self, player: str, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over targets, and each of them."""
        volumes = augmented(batch.samples[IMAGE], self.settings.augment, batch.draws)
        parts = self._losses(self._network(volumes).float(), self._asked(batch))
        return torch.stack(list(parts.values())).mean(), parts

    def validate(self, batch: Batch) -> dict[str, Tensor]:
        """The loss, and by target the absolute error in natural units; of sex, the accuracy."""
        outputs, asked = self._network(batch.samples[IMAGE]).float(), self._asked(batch)
        found = self.targets.natural(outputs)
        truth = self.targets.denormalised(asked)
        self._told.extend(torch.stack([found, truth], 1).cpu())
        errors = (found - truth).abs().mean(0)
        right = ((found > 0.5) == (truth > 0.5)).double().mean(0)
        told = {"loss": torch.stack(list(self._losses(outputs, asked).values())).mean()}
        for place, name in enumerate(self.targets.names):
            binary = name == SEX.name
            told[f"{name}_accuracy" if binary else f"{name}_mae"] = (
                right[place] if binary else errors[place]
            )
        return told

    def show(self, batch: Batch) -> Sequence[Picture]:
        """A held-out volume, and what is told of it."""
        found = self.targets.natural(self._network(batch.samples[IMAGE]).float())[0]
        truth = self.targets.denormalised(self._asked(batch))[0]
        pairs = zip(self.targets.names, found.tolist(), truth.tolist(), strict=True)
        caption = ", ".join(f"{name} {told:.4g} for {asked:.4g}" for name, told, asked in pairs)
        return [Picture(caption, batch.samples[IMAGE][0, 0])]

    def correlations(self) -> dict[str, float]:
        """Pearson r by target of what was validated since the last call; none where it is not."""
        told = list(self._told)
        self._told.clear()
        found = {}
        for place, name in enumerate(self.targets.names):
            pairs = torch.stack(told)[:, :, place] if told else torch.zeros(0, 2)
            if len(pairs) > 2 and bool((pairs.std(0) > 0).all()):
                found[f"{name}_r"] = float(torch.corrcoef(pairs.T)[0, 1])
        return found

    def state(self) -> dict[str, Any]:
        """How targets are standardised."""
        return {"means": list(self.targets.means), "deviations": list(self.targets.deviations)}

    def restore(self, state: dict[str, Any]) -> None:
        """Standardise as the run began to."""
        means, deviations = tuple(state["means"]), tuple(state["deviations"])
        self.targets = Targets(self.targets.names, means, deviations)

    def _losses(self, outputs: Tensor, asked: Tensor) -> dict[str, Tensor]:
        wanted = self.targets.standardised(asked)
        return {
            name: (
                functional.binary_cross_entropy_with_logits(outputs[:, place], asked[:, place])
                if name == SEX.name
                else functional.l1_loss(outputs[:, place], wanted[:, place])
            )
            for place, name in enumerate(self.targets.names)
        }

    def _asked(self, batch: Batch) -> Tensor:
        return batch.samples[CONDITION][:, self._columns]

    def _spread(self, data: Data) -> Tensor:
        rows = order(self.settings.seed, 0, len(data))[:_MEASURED]
        samples = [data[int(row)] for row in rows]
        if any(CONDITION not in sample for sample in samples):
            raise TrainingError("a regressor is trained on covariates, and the data has none")
        return torch.stack([sample[CONDITION] for sample in samples])[:, self._columns]


class RegressionRun(Run):
    """A run that also logs correlations, which no mean over single samples is."""

    task: RegressionTask

    def validate(self) -> dict[str, float]:
        """As in :class:`~generation.train.loop.Run`, and Pearson r by target."""
        self.task.correlations()
        found = super().validate()
        more = {f"validation/{name}": value for name, value in self.task.correlations().items()}
        return found | more
