"""Training denoisers: the U-Nets of latent and of pixel-space diffusion.

``x = alpha_t x0 + sigma_t eps`` at a uniformly drawn timestep, and the mean squared (or absolute)
difference between the network's output and its target ``p x0 + q eps`` (Ho et al. 2020, eq. 14;
Salimans & Ho 2022; :mod:`generation.diffusion`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from generation.diffusion import TARGETS, Schedule
from generation.errors import TrainingError
from generation.train.augment import augmented
from generation.train.loop import CONDITION, IMAGE, MEAN, SPREAD, Batch, Data
from generation.train.networks import new_network
from generation.train.settings import Augmentation, DiffusionSettings
from generation.train.sheets import Picture

_MEASURED = 64


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
    autoencoder
        Digest of the network whose latents these are; kept with the run.
    decode
        Makes volumes ``(n, 1, x, y, z)`` of latents, to look at; without it sheets show the
        latents' first channel.

    Notes
    -----
    Latents are sampled anew at every step from their mean and standard deviation, then multiplied
    by the scale. Conditions are concatenated as constant channels and attended to as one token; of
    dropped ones both are zero.
    """

    def __init__(
        self,
        settings: DiffusionSettings,
        data: Data | None = None,
        unet: nn.Module | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        autoencoder: str = "",
    ) -> None:
        self.settings, self.preset = settings, settings.system
        self.modules: dict[str, nn.Module] = {
            "unet": unet or new_network(self.preset, "unet", settings.seed)
        }
        spec = self.preset.schedule
        schedule = Schedule.from_betas(spec.kind, spec.start, spec.end, spec.steps)
        self._alpha, self._sigma = torch.tensor(schedule.alpha), torch.tensor(schedule.sigma)
        self.scale, self.autoencoder = _scale(settings, data), autoencoder
        self._unet, self._decode = self.modules["unet"], decode
        spec_of = self.preset.networks["unet"]
        self._conditional = spec_of["in_channels"] > spec_of["out_channels"]

    def turns(self, step: int) -> Sequence[str]:
        """The U-Net alone."""
        return ("unet",)

    def loss(self, player: str, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The denoising loss of a batch."""
        time = (batch.uniform() * len(self._alpha)).long()
        return self._denoising_loss(batch, self._clean(batch, self.settings.augment), time), {}

    def validate(self, batch: Batch) -> dict[str, Tensor]:
        """The denoising loss at ten evenly spaced timesteps."""
        clean = self._clean(batch, Augmentation())
        last = len(self._alpha) - 1
        times = torch.linspace(last / 20, last - last / 20, 10).long().tolist()
        each = [
            self._denoising_loss(batch, clean, torch.full((len(clean),), time), drop=False)
            for time in times
        ]
        return {"loss": torch.stack(each).mean()}

    def show(self, batch: Batch) -> Sequence[Picture]:
        """A sample under the covariates of a held-out one."""
        clean = self._clean(batch, Augmentation())
        made = self._sampled(batch, clean.shape[1:]) / self.scale
        if MEAN in batch.samples and self._decode is not None:
            return [Picture("sample", self._decode(made)[0, 0])]
        low, high = self.preset.value_range if MEAN not in batch.samples else _span(clean)
        return [
            Picture(name, ((volume[0, 0] - low) / (high - low)).clamp(0, 1))
            for name, volume in {"sample": made * self.scale, "of the data": clean}.items()
        ]

    def _denoising_loss(
        self, batch: Batch, clean: Tensor, time: Tensor, *, drop: bool = True
    ) -> Tensor:
        time = time.to(clean.device)
        noise = batch.normal(clean.shape[1:])
        alpha, sigma = (self._at(table, time, clean) for table in (self._alpha, self._sigma))
        p, q = TARGETS[self.preset.target](alpha, sigma)
        wanted = (p * clean + q * noise).float()
        noisy = (alpha * clean + sigma * noise).float()
        made = self._predicted(noisy, time, batch, drop=drop).float()
        if self.settings.objective == "l1":
            return functional.l1_loss(made, wanted)
        return functional.mse_loss(made, wanted)

    def _sampled(self, batch: Batch, shape: Sequence[int]) -> Tensor:
        """DDIM without noise in 50 steps (Song et al. 2021)."""
        noisy = batch.normal(shape)
        times = torch.linspace(len(self._alpha) - 1, 0, 50).long()
        for time, after in zip(times, [*times[1:], None], strict=True):
            now = time.expand(len(noisy)).to(noisy.device)
            made = self._predicted(noisy.float(), now, batch, drop=False).double()
            alpha, sigma = self._alpha[time], self._sigma[time]
            p, q = TARGETS[self.preset.target](alpha, sigma)
            divisor = alpha * q - sigma * p
            clean, noise = (
                (q * noisy - sigma * made) / divisor,
                (alpha * made - p * noisy) / divisor,
            )
            noisy = (
                clean if after is None else self._alpha[after] * clean + self._sigma[after] * noise
            )
        return noisy.float()

    def state(self) -> dict[str, Any]:
        """The scale of the latents, and whose they are."""
        return {"scale": self.scale, "autoencoder": self.autoencoder}

    def restore(self, state: dict[str, Any]) -> None:
        """Take the scale back.

        Raises
        ------
        TrainingError
            The run began with latents of another autoencoder.
        """
        if state["autoencoder"] != self.autoencoder:
            raise TrainingError(
                f"the run began with latents of the autoencoder {state['autoencoder'][:8]}, these "
                f"are of {self.autoencoder[:8]}; give that one, or choose another folder"
            )
        self.scale = state["scale"]

    def _clean(self, batch: Batch, augment: Augmentation) -> Tensor:
        """What is to be learned: scaled latents, or volumes in the network's range."""
        samples = batch.samples
        if MEAN not in samples:
            low, high = self.preset.value_range
            return augmented(samples[IMAGE], augment, batch.draws) * (high - low) + low
        mean = samples[MEAN]
        latents = mean + samples[SPREAD] * batch.normal(mean.shape[1:])
        return latents * self.scale

    def _predicted(self, noisy: Tensor, time: Tensor, batch: Batch, *, drop: bool) -> Tensor:
        if not self._conditional:
            return self._unet(noisy, time)
        condition = batch.samples[CONDITION]
        if drop:
            kept = batch.uniform() >= self.settings.drop_conditions
            condition = condition * kept[:, None].to(condition.dtype)
        constant = condition[:, :, None, None, None].expand(-1, -1, *noisy.shape[2:])
        return self._unet(torch.cat([noisy, constant], 1), time, context=condition[:, None, :])

    def _at(self, table: Tensor, time: Tensor, like: Tensor) -> Tensor:
        values = table.to(like.device)[time]
        return values.reshape(-1, *(1,) * (like.ndim - 1))


def _span(values: Tensor) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _scale(settings: DiffusionSettings, data: Data | None) -> float:
    """What latents are multiplied by; measured, one over the standard deviation of some."""
    if settings.latent_scale != "measured":
        return float(settings.latent_scale)
    if data is None:
        raise TrainingError("latent_scale='measured' needs the data to measure it on")
    some = [data[index] for index in range(min(_MEASURED, len(data)))]
    means = torch.stack([sample[MEAN].double() for sample in some])
    spreads = torch.stack([sample[SPREAD].double() for sample in some])
    return float((means.var(unbiased=False) + spreads.square().mean()).rsqrt())
