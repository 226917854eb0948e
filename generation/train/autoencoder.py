"""Training the autoencoder of a latent system.

Absolute difference, a perceptual loss, the divergence of the latents from a standard normal
distribution, and the verdict of a patch discriminator with least squares (Esser et al. 2021;
Rombach et al. 2022; weights as in the recipe).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from generation.errors import TrainingError
from generation.train.augment import augmented
from generation.train.loop import IMAGE, Batch
from generation.train.networks import new_network, seeded
from generation.train.perceptual import perceptual_loss
from generation.train.settings import AutoencoderSettings
from generation.train.sheets import Picture

NETWORK, DISCRIMINATOR = "autoencoder", "discriminator"


class AutoencoderTask:
    """An autoencoder to be trained on volumes, and the discriminator that judges it.

    Parameters
    ----------
    settings
        Of kind ``"autoencoder"``.
    autoencoder
        Starts from here; a new one by default, the same for the same seed.

    Warns
    -----
    PerceptualUnavailableWarning
        The perceptual network's weights cannot be had; another loss is used.
    """

    def __init__(self, settings: AutoencoderSettings, autoencoder: nn.Module | None = None) -> None:
        self.settings = settings
        network = autoencoder or new_network(settings.system, NETWORK, settings.seed)
        self._autoencoder: Any = network
        self.modules: dict[str, nn.Module] = {NETWORK: network}
        if settings.adversarial:
            self.modules[DISCRIMINATOR] = _discriminator(settings)
        self._perceptual, self.perceptual = None, "none"
        if settings.perceptual:
            self._perceptual, self.perceptual = perceptual_loss(settings.perceptual_network)
        self._reduction = 2 ** (len(settings.system.networks[NETWORK]["channels"]) - 1)
        self._made: dict[int, tuple[Tensor, Tensor]] = {}
        self._check_crop()

    def turns(self, step: int) -> Sequence[str]:
        """The autoencoder; then, once it started, the discriminator."""
        judged = DISCRIMINATOR in self.modules and step >= self.settings.adversarial_from
        return (NETWORK, DISCRIMINATOR) if judged else (NETWORK,)

    def loss(self, player: str, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of either player; the discriminator judges what the autoencoder just made."""
        if player == DISCRIMINATOR:
            made, real = self._made.pop(id(batch))
            return 0.5 * (self._verdict(made, 0.0) + self._verdict(real, 1.0)), {}
        return self._reconstruction_loss(batch, step)

    def validate(self, batch: Batch) -> dict[str, Tensor]:
        """Absolute difference and PSNR (dB, of the range of 1) of reconstructions."""
        volumes = batch.samples[IMAGE]
        made = self._reconstructed(volumes)
        error = functional.mse_loss(made, volumes)
        return {"l1": functional.l1_loss(made, volumes), "psnr": -10 * torch.log10(error)}

    def show(self, batch: Batch) -> Sequence[Picture]:
        """A volume and its reconstruction."""
        volumes = batch.samples[IMAGE]
        made = self._reconstructed(volumes)
        return [Picture("volume", volumes[0, 0]), Picture("reconstruction", made[0, 0])]

    def state(self) -> dict[str, Any]:
        """Which perceptual loss is used."""
        return {"perceptual": self.perceptual}

    def restore(self, state: dict[str, Any]) -> None:
        """See that the same perceptual loss is used."""
        if state["perceptual"] != self.perceptual:
            raise TrainingError(
                f"the run began with the perceptual loss {state['perceptual']!r}, here there is "
                f"{self.perceptual!r}; go on where the first one can be had"
            )

    def _reconstruction_loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        settings = self.settings
        volumes = self._cropped(
            augmented(batch.samples[IMAGE], settings.augment, batch.draws), batch
        )
        mean, spread = self._autoencoder.encode(volumes)
        made = self._autoencoder.decode(mean + spread * batch.normal(mean.shape[1:]))
        parts = {"l1": functional.l1_loss(made.float(), volumes), "kl": _divergence(mean, spread)}
        total = parts["l1"] + settings.kl * parts["kl"]
        if self._perceptual is not None:
            parts["perceptual"] = self._seen(made, volumes, batch)
            total = total + settings.perceptual * parts["perceptual"]
        if DISCRIMINATOR in self.turns(step):
            self._made[id(batch)] = made.detach(), volumes
            parts["fooling"] = self._verdict(made, 1.0)
            total = total + self._adversarial(step) * parts["fooling"]
        return total, parts

    def _check_crop(self) -> None:
        crop, shape = self.settings.crop, self.settings.system.shape
        if crop is None:
            return
        if any(side % self._reduction for side in crop):
            raise TrainingError(f"crop must be multiples of {self._reduction}, found {list(crop)}")
        if any(side > most for side, most in zip(crop, shape, strict=True)):
            raise TrainingError(
                f"crop must fit into volumes of {list(shape)}, found {list(crop)}; make it smaller"
            )

    def _adversarial(self, step: int) -> float:
        settings = self.settings
        done = (step - settings.adversarial_from + 1) / max(1, settings.adversarial_over)
        return settings.adversarial * min(1.0, done)

    def _verdict(self, volumes: Tensor, wanted: float) -> Tensor:
        """Least squares between the discriminator's patches and what they should be."""
        patches = self.modules[DISCRIMINATOR](volumes)[-1].float()
        return functional.mse_loss(patches, torch.full_like(patches, wanted))

    def _seen(self, made: Tensor, volumes: Tensor, batch: Batch) -> Tensor:
        """The perceptual loss; which slices it looks at is each sample's own draw."""
        assert self._perceptual is not None
        self._perceptual.to(made.device)
        losses = []
        for one, other, draw in zip(made, volumes, batch.draws, strict=True):
            with seeded(int(torch.randint(2**62, (), generator=draw))):
                losses.append(self._perceptual(one[None].float(), other[None].float()))
        return torch.stack(losses).mean()

    def _cropped(self, volumes: Tensor, batch: Batch) -> Tensor:
        """A box of each volume, anywhere."""
        crop = self.settings.crop
        if crop is None:
            return volumes
        boxes = []
        for volume, draw in zip(volumes, batch.draws, strict=True):
            sides = zip(volume.shape[1:], crop, strict=True)
            starts = [int(torch.randint(n - c + 1, (), generator=draw)) for n, c in sides]
            x, y, z = (slice(s, s + c) for s, c in zip(starts, crop, strict=True))
            boxes.append(volume[:, x, y, z])
        return torch.stack(boxes)

    def _reconstructed(self, volumes: Tensor) -> Tensor:
        return self._autoencoder.decode(self._autoencoder.encode(volumes)[0]).float().clamp(0, 1)


def _divergence(mean: Tensor, spread: Tensor) -> Tensor:
    """Kullback-Leibler divergence from N(0, 1), summed over a latent's values."""
    mean, variance = mean.float(), spread.float().square()
    each = 0.5 * (mean.square() + variance - variance.log() - 1)
    return each.flatten(1).sum(1).mean()


def _discriminator(settings: AutoencoderSettings) -> nn.Module:
    """Normalised per sample: a batch norm would make it depend on how a batch is shared."""
    from monai.networks.nets import PatchDiscriminator  # type: ignore[attr-defined]

    given = {"spatial_dims": 3, "in_channels": 1, "norm": "INSTANCE", **settings.discriminator}
    with seeded(settings.seed + 1):
        try:
            return PatchDiscriminator(**given)
        except TypeError as error:
            raise TrainingError(f"setting discriminator: {error}") from None
