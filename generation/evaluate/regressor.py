"""Covariates from a volume, told by a trained network.

Pinaya et al. 2022 check the age of their samples with that of :mod:`generation.evaluate.cole`. Its
training is in :mod:`generation.train.regression`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from generation.covariates import SEX, by_name
from generation.errors import EvaluationError, TrainingError
from generation.train import checkpoints
from generation.train.settings import REGRESSOR, RegressionSettings, settings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Targets:
    """What a network's outputs stand for.

    Parameters
    ----------
    names
        The covariate of each output. Sex is the logit of being male, the others are standardised.
    means, deviations
        Of normalised covariates where they were trained; 0 and 1 for sex.
    """

    names: tuple[str, ...]
    means: tuple[float, ...]
    deviations: tuple[float, ...]

    @classmethod
    def of(cls, names: Sequence[str], values: Tensor) -> Targets:
        """As covariates ``(n, k)``, normalised and in the order of the names, are spread.

        Raises
        ------
        TrainingError
            A covariate does not vary.
        """
        means, deviations = [], []
        for name, column in zip(names, values.double().T, strict=True):
            binary = name == SEX.name
            if not binary and not column.std(correction=0) > 0:
                raise TrainingError(
                    f"{name} is {float(column[0]):g} in all {len(column)} rows looked at; a "
                    "regressor needs rows that differ in it"
                )
            means.append(0.0 if binary else float(column.mean()))
            deviations.append(1.0 if binary else float(column.std(correction=0)))
        return cls(tuple(names), tuple(means), tuple(deviations))

    def standardised(self, normalised: Tensor) -> Tensor:
        """Normalised covariates ``(n, k)`` as outputs are trained to be."""
        return (normalised - normalised.new_tensor(self.means)) / normalised.new_tensor(
            self.deviations
        )

    def natural(self, outputs: Tensor) -> Tensor:
        """Outputs ``(n, k)`` in natural units, float64; sex as the probability of being male."""
        told = outputs.double()
        told = told.new_tensor(self.means) + told.new_tensor(self.deviations) * told
        binary = torch.tensor([name == SEX.name for name in self.names], device=told.device)
        return self.denormalised(torch.where(binary, told.sigmoid(), told))

    def denormalised(self, normalised: Tensor) -> Tensor:
        """Normalised covariates ``(n, k)`` in natural units, float64."""
        covariates = [by_name(name) for name in self.names]
        kind: Any = {"device": normalised.device, "dtype": torch.float64}
        low = torch.tensor([one.low for one in covariates], **kind)
        high = torch.tensor([one.high for one in covariates], **kind)
        return low + (high - low) * normalised.double()


@dataclass(frozen=True)
class Regressor:
    """A trained network, to be asked what covariates a volume has.

    Parameters
    ----------
    network
        In evaluation mode.
    targets
        What its outputs stand for.
    step, source
        How far it was trained, and where it lies.
    """

    network: nn.Module = field(repr=False)
    targets: Targets
    step: int
    source: Path

    @property
    def names(self) -> tuple[str, ...]:
        """The covariates it predicts, in the order of its predictions."""
        return self.targets.names

    def predict(self, volumes: ArrayLike | Tensor, *, batch: int = 1) -> NDArray[np.float64]:
        """Covariates of volumes.

        Parameters
        ----------
        volumes
            ``(n, 1, x, y, z)`` intensities in [0, 1].
        batch
            How many to take at once; changes nothing but the time.

        Returns
        -------
        numpy.ndarray
            ``(n, k)`` in natural units: years, mm³, and for sex the probability of being male.

        Raises
        ------
        EvaluationError
            The volumes have another shape than the network takes.
        """
        given = torch.as_tensor(volumes)
        return self.predict_each(
            given[start : start + batch] for start in range(0, len(given), batch)
        )

    def predict_each(self, batches: Iterable[Tensor]) -> NDArray[np.float64]:
        """As :meth:`predict`, of batches ``(n, 1, x, y, z)`` one after the other."""
        device = next(self.network.parameters()).device
        with torch.inference_mode():
            found = [
                self.targets.natural(self.network(volumes.to(device, torch.float32))).cpu()
                for volumes in batches
            ]
        return torch.cat(found or [torch.empty(0, len(self.names), dtype=torch.float64)]).numpy()


def load_regressor(path: Path, device: str | torch.device = "cpu") -> Regressor:
    """The regressor of a training run.

    Parameters
    ----------
    path
        The run's folder, for its last checkpoint; or one of the checkpoints in it.
    device
        Where to compute.

    Raises
    ------
    EvaluationError
        No run of kind ``"regression"``, none with a checkpoint, or one that cannot be read.
    """
    if not path.exists():
        raise EvaluationError(f"there is no {path}; give the folder of a training run")
    if path.is_dir():
        steps = checkpoints.steps(path)
        if not steps:
            raise EvaluationError(
                f"{path} holds no checkpoint, expected step-*.pt; give the folder of a run of "
                "`synthbrain train regression`, trained until it keeps one"
            )
        path = path / f"step-{steps[-1]:09d}.pt"
    try:
        return _regressor(checkpoints.read(path), path, device)
    except TrainingError as error:
        raise EvaluationError(str(error)) from None
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, EvaluationError):
            raise
        reason = " ".join(str(error).split())[:160]
        raise EvaluationError(
            f"{path} is no checkpoint of a regressor ({type(error).__name__}: {reason}); give one "
            "of a run of `synthbrain train regression`"
        ) from None


def _regressor(found: Mapping[str, Any], path: Path, device: str | torch.device) -> Regressor:
    how = settings(json.loads(found["settings"]))
    if not isinstance(how, RegressionSettings):
        raise EvaluationError(
            f"{path} is of a run of kind {how.kind!r}, expected 'regression'; train one with "
            "`synthbrain train regression`"
        )
    network = how.system.build(REGRESSOR)
    state = found["averages"].get(REGRESSOR) or found["modules"][REGRESSOR]
    network.load_state_dict(state, assign=True)
    kept = found["task"]
    targets = Targets(how.system.targets, tuple(kept["means"]), tuple(kept["deviations"]))
    return Regressor(network.to(device).eval().requires_grad_(False), targets, found["step"], path)
