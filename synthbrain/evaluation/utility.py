"""Whether synthetic volumes help to train."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from generation.covariates import NAMES
from generation.evaluate.utility import utility as study
from generation.train.loop import CONDITION, IMAGE
from synthbrain.evaluation.sets import VolumeSet
from synthbrain.progress import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from generation.train.settings import RegressionSettings


class _Samples:
    """Volumes with their covariates."""

    def __init__(self, volumes: VolumeSet) -> None:
        self._volumes = volumes
        values = volumes.table[list(NAMES)].to_numpy(dtype="float32")
        self._conditions = torch.tensor(values)

    def __len__(self) -> int:
        return len(self._volumes)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {IMAGE: self._volumes[index], CONDITION: self._conditions[index]}


def utility(
    synthetic: VolumeSet,
    real_train: VolumeSet,
    real_test: VolumeSet,
    *,
    settings: RegressionSettings,
    folder: Path,
    fractions: Sequence[float] = (0.1, 0.5, 1.0),
    seeds: int = 3,
    device: str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Train on real, on synthetic and on both, test on real volumes.

    Parameters
    ----------
    synthetic, real_train, real_test
        Volumes of conditional cohorts.
    settings
        Of the network.
    folder
        Where runs are kept; what is done there is not done again.
    fractions
        Parts of the real volumes.
    seeds
        How many.
    device
        Where to train.
    progress
        Show a progress bar on standard error.
    """
    # All real volumes are an arm, whether asked for or not.
    arms = 1 + len(fractions) + len({1.0, *fractions})
    total = arms * seeds * settings.steps
    before: dict[tuple[str, int], int] = {}
    with counted("training on real and synthetic", total) as told:

        def note(arm: str, seed: int, step: int) -> None:
            before[arm, seed] = step
            if progress:
                told(sum(before.values()), f"{arm}, seed {seed}")

        found = study(
            _Samples(real_train), _Samples(real_test), _Samples(synthetic),
            settings=settings, folder=folder, fractions=fractions, seeds=range(seeds),
            device=device, told=note,
        )  # fmt: skip
    about = {"real_train": len(real_train), "real_test": len(real_test), "seeds": seeds}
    differences = [{**asdict(one), "told": str(one)} for one in found.differences]
    hurt = [str(one) for one in found.harms]
    scores = [asdict(one) for one in found.scores]
    return {**about, "steps": settings.steps, "synthetic": len(synthetic), "scores": scores,
            "differences": differences, "hurts": hurt}  # fmt: skip
