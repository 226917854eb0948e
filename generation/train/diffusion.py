"""Training denoisers: the U-Nets of latent and of pixel-space diffusion.

``x = alpha_t x0 + sigma_t eps`` at a uniformly drawn timestep, and the mean squared (or absolute)
difference between the network's output and its target ``p x0 + q eps`` (Ho et al. 2020, eq. 14;
Salimans & Ho 2022; :mod:`generation.diffusion`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from generation.diffusion import TARGETS, Schedule
from generation.errors import TrainingError
from generation.train.loop import Batch, Data
from generation.train.settings import Settings

_MEASURED = 64

IMAGE, MEAN, SPREAD, CONDITION = "image", "mean", "sigma", "condition"
"""Names of what samples hold: a volume ``(1, x, y, z)`` in [0, 1], or the mean and standard
deviation of its latent ``(c, x, y, z)``; and the covariates ``(4,)``."""


class DiffusionTask:
    """A U-Net to be trained on latents, or on volumes.

    Parameters
    ----------
    settings
        Of kind ``"diffusion"`` (latents) or ``"pixel"``.
    data
        What will be trained on, to measure the latents' scale; needed where that is
        ``"measured"``.
    unet
        Starts from here; a new one by default, the same for the same seed.

    Notes
    -----
    Latents are sampled anew at every step from their mean and standard deviation, then multiplied
    by the scale. Conditions are concatenated as constant channels and attended to as one token; of
    dropped ones both are zero.
    """

    def __init__(
        self, settings: Settings, data: Data | None = None, unet: nn.Module | None = None
    ) -> None:
        self.settings, self.preset = settings, settings.system
        self.modules = {"unet": unet or new_network(self.preset, "unet", settings.seed)}
        spec = self.preset.schedule
        schedule = Schedule.from_betas(spec.kind, spec.start, spec.end, spec.steps)
        self._alpha, self._sigma = torch.tensor(schedule.alpha), torch.tensor(schedule.sigma)
        self.scale = _scale(settings, data)
        self._unet = self.modules["unet"]
        spec_of = self.preset.networks["unet"]
        self._concatenates = spec_of["in_channels"] > spec_of["out_channels"]

    def loss(self, player: str, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The denoising loss of a batch."""
        clean = self._clean(batch)
        time = (batch.uniform() * len(self._alpha)).long()
        noise = batch.normal(clean.shape[1:])
        alpha, sigma = (self._at(table, time, clean) for table in (self._alpha, self._sigma))
        p, q = TARGETS[self.preset.target](alpha, sigma)
        wanted = (p * clean + q * noise).float()
        made = self._predicted((alpha * clean + sigma * noise).float(), time, batch).float()
        if self.settings.objective == "l1":
            return functional.l1_loss(made, wanted), {}
        return functional.mse_loss(made, wanted), {}

    def state(self) -> dict[str, Any]:
        """The scale of the latents."""
        return {"scale": self.scale}

    def restore(self, state: dict[str, Any]) -> None:
        """Take the scale back."""
        self.scale = state["scale"]

    def _clean(self, batch: Batch) -> Tensor:
        """What is to be learned: scaled latents, or volumes in the network's range."""
        samples = batch.samples
        if MEAN not in samples:
            low, high = self.preset.value_range
            return samples[IMAGE] * (high - low) + low
        mean = samples[MEAN]
        latents = mean + samples[SPREAD] * batch.normal(mean.shape[1:])
        return latents * self.scale

    def _predicted(self, noisy: Tensor, time: Tensor, batch: Batch) -> Tensor:
        condition = batch.samples.get(CONDITION)
        if not self._concatenates or condition is None:
            return self._unet(noisy, time)
        kept = batch.uniform() >= self.settings.drop_conditions
        condition = condition * kept[:, None].to(condition.dtype)
        constant = condition[:, :, None, None, None].expand(-1, -1, *noisy.shape[2:])
        return self._unet(torch.cat([noisy, constant], 1), time, context=condition[:, None, :])

    def _at(self, table: Tensor, time: Tensor, like: Tensor) -> Tensor:
        values = table.to(like.device)[time]
        return values.reshape(-1, *(1,) * (like.ndim - 1))


def _scale(settings: Settings, data: Data | None) -> float:
    """What latents are multiplied by; measured, one over the standard deviation of some."""
    if settings.latent_scale != "measured":
        return float(settings.latent_scale)
    if data is None:
        raise TrainingError("latent_scale='measured' needs the data to measure it on")
    some = [data[index] for index in range(min(_MEASURED, len(data)))]
    means = torch.stack([sample[MEAN].double() for sample in some])
    spreads = torch.stack([sample[SPREAD].double() for sample in some])
    return float((means.var(unbiased=False) + spreads.square().mean()).rsqrt())


def new_network(preset: Any, name: str, seed: int) -> nn.Module:
    """A network as MONAI starts it, the same for the same seed.

    Parameters
    ----------
    preset
        Its architecture, a :class:`generation.presets.Preset`.
    name
        ``"unet"`` or ``"autoencoder"``.
    seed
        Of its parameters.
    """
    from monai.networks.nets import (  # type: ignore[attr-defined]
        AutoencoderKL,
        DiffusionModelUNet,
    )

    kind = AutoencoderKL if name == "autoencoder" else DiffusionModelUNet
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(**preset.networks[name])
