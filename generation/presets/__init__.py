"""The published systems as data: architectures, noise schedules and samplers."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import nn


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ScheduleSpec(_Strict):
    """A discrete noise schedule: ``steps`` betas from ``start`` to ``end``."""

    kind: Literal["linear", "scaled_linear"]
    start: float
    end: float
    steps: int


class SamplerSpec(_Strict):
    """How the published code samples."""

    solver: str
    steps: int
    spacing: str


class Preset(_Strict):
    """One published system.

    ``networks`` holds the keyword arguments of MONAI's ``AutoencoderKL`` (``autoencoder``) and
    ``DiffusionModelUNet`` (``unet``); checkpoints keep those classes' key names.
    """

    system: Literal["latent", "pixel"]
    reference: str
    networks: dict[str, dict[str, Any]]
    schedule: ScheduleSpec
    target: Literal["epsilon", "sample", "velocity", "flow"]
    clip: tuple[float, float] | None
    sampler: SamplerSpec
    shape: tuple[int, int, int]
    latent_shape: tuple[int, int, int, int] | None
    value_range: tuple[float, float]
    """Values of the network's output that stand for the intensities 0 and 1."""
    affine: tuple[tuple[float, float, float, float], ...]
    """Voxel indices to mm, four rows."""

    def build(self, network: str) -> nn.Module:
        """The named network with parameters on the meta device, to be loaded into.

        Parameters
        ----------
        network
            ``"unet"``, or ``"autoencoder"`` for latent systems.
        """
        import torch
        from monai.networks.nets import (  # type: ignore[attr-defined]
            AutoencoderKL,
            DiffusionModelUNet,
        )

        kind = AutoencoderKL if network == "autoencoder" else DiffusionModelUNet
        with torch.device("meta"):
            return kind(**self.networks[network]).eval()


def load_preset(name: str) -> Preset:
    """The preset called ``name``: ``"ukb-ldm"`` or ``"medforj"``."""
    text = files(__name__).joinpath(f"{name}.json").read_text()
    return Preset.model_validate(json.loads(text))
