"""Copies made on purpose, to measure what a search for copies can find."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from generation.errors import EvaluationError
from generation.evaluate.multiscale import Window

if TYPE_CHECKING:
    from collections.abc import Sequence

    from generation.evaluate.diversity import Volumes


@dataclass(frozen=True)
class Dose:
    """A change to a volume.

    Parameters
    ----------
    kind
        ``"noise"``: Gaussian, added, standard deviation in units of intensity. ``"blur"``:
        Gaussian, standard deviation in voxels. ``"shift"``: whole voxels along each axis.
    amount
        How much; above 0.
    """

    kind: Literal["noise", "blur", "shift"]
    amount: float

    def __str__(self) -> str:
        return f"{self.kind} {self.amount:g}"


DOSES = (
    Dose("noise", 0.02),
    Dose("noise", 0.05),
    Dose("noise", 0.1),
    Dose("blur", 1),
    Dose("blur", 2),
    Dose("blur", 4),
    Dose("shift", 1),
    Dose("shift", 2),
    Dose("shift", 4),
)
"""From hardly visible to plain."""


class Planted:
    """Altered copies of volumes, themselves volumes.

    Parameters
    ----------
    volumes
        The originals, any indexable of ``(1, x, y, z)`` tensors.
    origins
        Which of them.
    dose
        What is done to each.
    seed
        Of the noise: that of a copy depends on it and on the original's index alone.
    """

    def __init__(
        self, volumes: Volumes, origins: Sequence[int], dose: Dose, *, seed: int = 0
    ) -> None:
        self.volumes, self.origins, self.dose, self.seed = volumes, list(origins), dose, seed

    def __len__(self) -> int:
        return len(self.origins)

    def __getitem__(self, index: int) -> Tensor:
        """A copy ``(1, x, y, z)``, float32, in [0, 1]."""
        origin = self.origins[index]
        mixed = np.random.SeedSequence((self.seed, origin)).generate_state(1)
        return altered(self.volumes[origin], self.dose, seed=int(mixed[0]))


def altered(volume: Tensor, dose: Dose, *, seed: int = 0) -> Tensor:
    """A volume after a change, clipped to [0, 1].

    Parameters
    ----------
    volume
        ``(1, x, y, z)`` floats in [0, 1]; outside it blur and shift see zeros.
    dose
        The change.
    seed
        Of noise.

    Raises
    ------
    EvaluationError
        The dose is unknown, not above 0, or a shift of part of a voxel.
    """
    volume = volume.float()
    if not dose.amount > 0 or (dose.kind == "shift" and dose.amount != int(dose.amount)):
        raise EvaluationError(
            f"cannot alter a volume by {dose}; give an amount above 0, a whole one for a shift"
        )
    if dose.kind == "noise":
        draw = torch.Generator().manual_seed(seed)
        noise = torch.randn(volume.shape, generator=draw).to(volume.device)
        return (volume + dose.amount * noise).clamp(0, 1)
    if dose.kind == "blur":
        reach = math.ceil(3 * dose.amount)
        padded = torch.nn.functional.pad(volume, (reach,) * 6)
        return Window(2 * reach + 1, dose.amount).smooth(padded).clamp(0, 1)
    if dose.kind == "shift":
        step = int(dose.amount)
        padded = torch.nn.functional.pad(volume, (step, 0) * 3)
        return padded[:, : volume.shape[1], : volume.shape[2], : volume.shape[3]].clamp(0, 1)
    raise EvaluationError(f"found dose {dose.kind!r}, expected noise, blur or shift")
