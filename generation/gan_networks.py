"""Networks of the GAN baselines: a generator, its mirror, and a discriminator.

Pinaya et al. 2022 compare with a VAE-GAN and an LSGAN and name no sizes. The generator follows the
decoder of their autoencoder (nearest neighbours, convolutions, group norms, residuals), the
discriminator the patch discriminators of Isola et al. 2017. Every norm is taken over one sample:
how a batch is shared changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

_LEAST, _MOST = -30.0, 20.0
_SLOPE, _SPREAD = 0.2, 0.02


class Generator(nn.Module):
    """Volumes of noise: fully connected to a few voxels, then doubled level by level.

    Parameters
    ----------
    latent
        Length of the noise.
    base
        Voxels of the first level, ``(x, y, z)``.
    channels
        Of each level; there is one doubling less than there are levels.
    groups
        Of the norms; divides all channels.
    """

    def __init__(
        self, latent: int, base: Sequence[int], channels: Sequence[int], groups: int
    ) -> None:
        super().__init__()
        self.base = tuple(base)
        self.start = nn.Linear(latent, channels[0] * math.prod(base))
        self.first = Residual(channels[0], groups)
        self.levels = nn.ModuleList(Up(a, b, groups) for a, b in pairwise(channels))
        self.norm = nn.GroupNorm(groups, channels[-1])
        self.end = nn.Conv3d(channels[-1], 1, 3, padding=1)

    def forward(self, noise: Tensor) -> Tensor:
        """Volumes ``(n, 1, x, y, z)`` in (0, 1), float32 or wider, of noise ``(n, latent)``."""
        x = self.first(self.start(noise).unflatten(1, (-1, *self.base)))
        for level in self.levels:
            x = level(x)
        return torch.sigmoid(_wide(self.end(functional.silu(self.norm(x)))))


class Encoder(nn.Module):
    """The generator's mirror: what noise a volume may be made of.

    Parameters
    ----------
    latent, base, groups
        As of the generator.
    channels
        Of each level, the largest first.
    """

    def __init__(
        self, latent: int, base: Sequence[int], channels: Sequence[int], groups: int
    ) -> None:
        super().__init__()
        self.start = nn.Conv3d(1, channels[0], 3, padding=1)
        self.levels = nn.ModuleList(Down(a, b, groups) for a, b in pairwise(channels))
        self.last = Residual(channels[-1], groups)
        self.norm = nn.GroupNorm(groups, channels[-1])
        self.end = nn.Linear(channels[-1] * math.prod(base), 2 * latent)

    def forward(self, volumes: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance, each ``(n, latent)``, of volumes ``(n, 1, x, y, z)``.

        The log variance is clamped to [-30, 20], as MONAI's autoencoder does.
        """
        x = self.start(volumes)
        for level in self.levels:
            x = level(x)
        x = functional.silu(self.norm(self.last(x)))
        mean, variance = _wide(self.end(x.flatten(1))).chunk(2, 1)
        return mean, variance.clamp(_LEAST, _MOST)


class Discriminator(nn.Module):
    """Convolutions that halve a volume, and one score of what is left.

    Kernels of 4 voxels, stride 2, LeakyReLU 0.2 and parameters from N(0, 0.02), as in patch
    discriminators; instance norms but for the first layer; a fully connected score at the end, not
    one score a patch.

    Parameters
    ----------
    shape
        Voxels of a volume, ``(x, y, z)``.
    channels
        Of each layer; each halves the volume.
    """

    def __init__(self, shape: Sequence[int], channels: Sequence[int]) -> None:
        super().__init__()
        # A bias before a norm would have no gradient but rounding errors, which Adam enlarges.
        blocks = {"layer1": Judging(1, channels[0], nn.Identity(), bias=True)}
        for number, (a, b) in enumerate(pairwise(channels), 2):
            norm = nn.InstanceNorm3d(b, affine=True)
            blocks[f"layer{number}"] = Judging(a, b, norm, bias=False)
        self.layers = nn.ModuleDict(blocks)
        left = math.prod(side // 2 ** len(channels) for side in shape)
        self.score = nn.Linear(channels[-1] * left, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv3d | nn.Linear):
                nn.init.normal_(module.weight, 0.0, _SPREAD)
                if module.bias is not None:
                    # Not 0: an empty background would lie on the activation's kink.
                    nn.init.normal_(module.bias, 0.0, _SPREAD)

    def forward(self, volumes: Tensor) -> Tensor:
        """Scores ``(n,)`` of volumes ``(n, 1, x, y, z)``; no activation at the end."""
        return self.look(volumes, "layer1")[0]

    def look(self, volumes: Tensor, layer: str) -> tuple[Tensor, Tensor]:
        """Scores ``(n,)``, and what a layer sees: ``(n, c, x, y, z)``.

        Parameters
        ----------
        volumes
            ``(n, 1, x, y, z)``.
        layer
            ``"layer1"`` to the last one.
        """
        seen, x = volumes, volumes
        for name, block in self.layers.items():
            x = block(x)
            seen = x if name == layer else seen
        return _wide(self.score(x.flatten(1)))[:, 0], _wide(seen)


class Residual(nn.Module):
    """Two convolutions, each after a group norm and SiLU, added to what goes in."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, c, x, y, z)`` to the same shape."""
        inner = self.conv1(functional.silu(self.norm1(x)))
        return x + self.conv2(functional.silu(self.norm2(inner)))


class Up(nn.Module):
    """Twice the voxels along each axis, by nearest neighbours and a convolution; a residual."""

    def __init__(self, channels: int, after: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, after, 3, padding=1)
        self.block = Residual(after, groups)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, c, x, y, z)`` to ``(n, after, 2 x, 2 y, 2 z)``."""
        return self.block(self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest")))


class Down(nn.Module):
    """A residual, then half the voxels along each axis by a convolution of stride 2."""

    def __init__(self, channels: int, after: int, groups: int) -> None:
        super().__init__()
        self.block = Residual(channels, groups)
        self.conv = nn.Conv3d(channels, after, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, c, x, y, z)`` to ``(n, after, x / 2, y / 2, z / 2)``."""
        return self.conv(self.block(x))


class Judging(nn.Module):
    """A layer of the discriminator."""

    def __init__(self, channels: int, after: int, norm: nn.Module, *, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, after, 4, stride=2, padding=1, bias=bias)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """``(n, c, x, y, z)`` to ``(n, after, x / 2, y / 2, z / 2)``."""
        return functional.leaky_relu(self.norm(self.conv(x)), _SLOPE)


def _wide(values: Tensor) -> Tensor:
    """Float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
