"""Training the GAN baselines of Pinaya et al. 2022: LSGAN and VAE-GAN.

The losses are those of Mao et al. 2017, eq. 9 with labels 0 and 1, and of Larsen et al. 2016,
algorithm 1. All players of a step see the same forward pass: what one makes is kept for the next,
so that every gradient is taken at the weights the step began with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from generation.errors import TrainingError
from generation.train.augment import augmented
from generation.train.loop import IMAGE, Batch
from generation.train.networks import new_network
from generation.train.settings import GanSettings, VaeGanSettings
from generation.train.sheets import Picture

ENCODER, GENERATOR, DISCRIMINATOR = "encoder", "generator", "discriminator"


class _GanTask:
    """What both have: players, their turns, samples of noise and how good these are.

    Notes
    -----
    ``energy`` is the energy score (Gneiting & Raftery 2007, sec. 4.3) of samples ``g, g'`` against
    a held-out volume ``x``, ``E|g - x| - E|g - g'| / 2``, over volumes averaged to four times the
    voxels the generator starts at, with the root of the mean square as norm. Its expectation is
    least for the distribution of the data and no other; collapsed samples do badly. It is no
    Fréchet distance and needs no network. ``spread`` is ``|g - g'|``, 0 where all are the same.
    """

    players: tuple[str, ...]

    def __init__(self, settings: GanSettings) -> None:
        absent = [name for name in self.players if name not in settings.system.networks]
        if absent:
            raise TrainingError(
                f"setting system.networks: a {settings.kind} needs {', '.join(self.players)}; "
                f"found no {', '.join(absent)}"
            )
        self.preset = settings.system
        self.augment = settings.augment
        self.modules: dict[str, nn.Module] = {
            name: new_network(self.preset, name, settings.seed + number)
            for number, name in enumerate(self.players)
        }
        self._generator: Any = self.modules[GENERATOR]
        self._discriminator: Any = self.modules[DISCRIMINATOR]

    def turns(self, step: int) -> Sequence[str]:
        """All players, the discriminator last."""
        return self.players

    def validate(self, batch: Batch) -> dict[str, Tensor]:
        """Energy score and spread of samples, see above."""
        x, y, z = (4 * side for side in self.preset.base)
        real, one, other = (
            functional.adaptive_avg_pool3d(volumes.float(), (x, y, z))
            for volumes in (batch.samples[IMAGE], self._sampled(batch), self._sampled(batch))
        )
        spread = _distance(one, other)
        energy = (_distance(one, real) + _distance(other, real) - spread) / 2
        return {"energy": energy, "spread": spread}

    def show(self, batch: Batch) -> Sequence[Picture]:
        """A sample, and a held-out volume to compare it with."""
        made = self._sampled(batch)
        return [Picture("sample", made[0, 0]), Picture("of the data", batch.samples[IMAGE][0, 0])]

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to take back."""

    def _real(self, batch: Batch) -> Tensor:
        return augmented(batch.samples[IMAGE], self.augment, batch.draws)

    def _sampled(self, batch: Batch) -> Tensor:
        return self._generator(batch.normal((self.preset.latent,)))


class LsganTask(_GanTask):
    """A generator and a discriminator with least squares (Mao et al. 2017).

    Parameters
    ----------
    settings
        Of kind ``"lsgan"``.

    Notes
    -----
    The discriminator minimises ``((D(x) - 1)^2 + D(G(z))^2) / 2``, the generator
    ``(D(G(z)) - 1)^2 / 2``.
    """

    players = (GENERATOR, DISCRIMINATOR)

    def __init__(self, settings: GanSettings) -> None:
        super().__init__(settings)
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def loss(self, player: str, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of either player; the discriminator judges what the generator just made."""
        if player == GENERATOR:
            real, made = self._real(batch), self._sampled(batch)
            self._made[id(batch)] = real, made.detach()
            return 0.5 * (self._discriminator(made) - 1).square().mean(), {}
        real, made = (self._discriminator(volumes) for volumes in self._made.pop(id(batch)))
        loss = 0.5 * ((real - 1).square().mean() + made.square().mean())
        return loss, {"score_real": real.mean(), "score_made": made.mean()}


class _Pass(NamedTuple):
    """What the players of a step share: volumes, latents of them, noise; and what becomes of it."""

    real: Tensor
    latent: Tensor
    noise: Tensor
    wanted: Tensor
    made: Sequence[Tensor] = ()


class VaeGanTask(_GanTask):
    """An encoder, a generator and a discriminator (Larsen et al. 2016).

    Parameters
    ----------
    settings
        Of kind ``"vae-gan"``.

    Raises
    ------
    TrainingError
        The discriminator has no such layer.

    Notes
    -----
    With ``x~ = G(z)`` for ``z`` of the encoder, ``x_p = G(z_p)`` for noise ``z_p``, ``D_l`` the
    features of a layer and ``D`` the probability of being real,

    - the encoder minimises ``kl KL(z) + |D_l(x~) - D_l(x)|^2 / 2``,
    - the generator ``gamma |D_l(x~) - D_l(x)|^2 / 2 + log(1 - D(x~)) + log(1 - D(x_p))``,
    - the discriminator ``-log D(x) - log(1 - D(x~)) - log(1 - D(x_p))``.

    Signs are those of the paper's text and code, where the discriminator maximises what its
    algorithm 1 calls ``L_GAN``.
    """

    players = (ENCODER, GENERATOR, DISCRIMINATOR)

    def __init__(self, settings: VaeGanSettings) -> None:
        super().__init__(settings)
        self.settings = settings
        layers = list(self._discriminator.layers)
        if settings.features not in layers:
            raise TrainingError(
                f"setting features: the discriminator has no {settings.features!r}, only "
                f"{', '.join(layers)}"
            )
        self._encoder: Any = self.modules[ENCODER]
        self._passes: dict[int, _Pass] = {}

    def loss(self, player: str, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a player; each takes the forward pass of the one before on."""
        if player == ENCODER:
            return self._encoding(batch)
        if player == GENERATOR:
            return self._generating(batch)
        return self._judging(batch)

    def validate(self, batch: Batch) -> dict[str, Tensor]:
        """Energy score and spread of samples; absolute difference and PSNR of reconstructions."""
        real = batch.samples[IMAGE]
        made = self._reconstructed(real)
        return super().validate(batch) | {
            "l1": functional.l1_loss(made, real),
            "psnr": -10 * torch.log10(functional.mse_loss(made, real)),
        }

    def show(self, batch: Batch) -> Sequence[Picture]:
        """A held-out volume, its reconstruction, and a sample."""
        sample, real = super().show(batch)
        made = self._reconstructed(batch.samples[IMAGE])
        return [real, Picture("reconstruction", made[0, 0]), sample]

    def _encoding(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        real = self._real(batch)
        mean, variance = self._encoder(real)
        latent = mean + (0.5 * variance).exp() * batch.normal(mean.shape[1:])
        noise = batch.normal(mean.shape[1:])
        with torch.no_grad():
            _, wanted = self._look(real)
        _, found = self._look(self._generator(latent))
        self._passes[id(batch)] = _Pass(real, latent.detach(), noise, wanted)
        parts = {"kl": _divergence(mean, variance), "features": _difference(found, wanted)}
        return self.settings.kl * parts["kl"] + parts["features"], parts

    def _generating(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        shared = self._passes[id(batch)]
        made = self._generator(shared.latent), self._generator(shared.noise)
        score, found = self._look(made[0])
        scores = score, self._discriminator(made[1])
        self._passes[id(batch)] = shared._replace(made=[volumes.detach() for volumes in made])
        unmasked = sum(functional.softplus(score).mean() for score in scores)
        return self.settings.gamma * _difference(found, shared.wanted) - unmasked, {}

    def _judging(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        shared = self._passes.pop(id(batch))
        real, *made = (self._discriminator(volumes) for volumes in (shared.real, *shared.made))
        loss = functional.softplus(-real).mean()
        for scores in made:
            loss = loss + functional.softplus(scores).mean()
        names = ("score_real", "score_reconstructed", "score_made")
        told = zip(names, (real, *made), strict=True)
        return loss, {name: scores.mean() for name, scores in told}

    def _look(self, volumes: Tensor) -> tuple[Tensor, Tensor]:
        return self._discriminator.look(volumes, self.settings.features)

    def _reconstructed(self, volumes: Tensor) -> Tensor:
        return self._generator(self._encoder(volumes)[0])


def _divergence(mean: Tensor, variance: Tensor) -> Tensor:
    """Kullback-Leibler divergence from N(0, 1) of latents ``(n, k)``, given the log variance."""
    return 0.5 * (mean.square() + variance.exp() - variance - 1).sum(1).mean()


def _difference(found: Tensor, wanted: Tensor) -> Tensor:
    """Half the squared difference, the mean over all features."""
    return 0.5 * functional.mse_loss(found, wanted)


def _distance(some: Tensor, others: Tensor) -> Tensor:
    """Root of the mean square of differences, the mean over a batch."""
    return (some - others).square().flatten(1).mean(1).sqrt().mean()
