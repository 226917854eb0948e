"""The published systems with random weights, at full or reduced width: to test and time with."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import nn

from generation.presets import AnyPreset, GanPreset, Preset, System, load_preset

_NARROW: dict[str, dict[str, dict[str, object]]] = {
    "ukb-ldm": {
        "autoencoder": {"channels": [8, 16, 16, 16], "norm_num_groups": 8},
        "unet": {
            "channels": [16, 32, 32],
            "norm_num_groups": 8,
            "num_head_channels": [0, 32, 32],
            "upcast_attention": False,  # MONAI upcasts to float32: an error in float64
        },
    },
    "medforj": {"unet": {"channels": [8, 8, 16, 16, 16], "norm_num_groups": 4}},
}
_NARROW_GAN: dict[str, dict[str, object]] = {
    "encoder": {"channels": [4, 4, 8], "groups": 2},
    "generator": {"channels": [8, 4, 4], "groups": 2},
    "discriminator": {"channels": [4, 8]},
}


def narrow(name: str) -> AnyPreset:
    """A preset with a few channels and voxels: milliseconds instead of minutes.

    Parameters
    ----------
    name
        Of a preset: ``"ukb-ldm"``, ``"medforj"``, ``"vae-gan"`` or ``"lsgan"``.
    """
    preset = load_preset(name)
    if isinstance(preset, GanPreset):
        few = {key: _NARROW_GAN[key] for key in preset.networks}
        sizes = {"networks": few, "latent": 8, "base": (4, 4, 4), "shape": (16, 16, 16)}
        return GanPreset.model_validate(preset.model_dump() | sizes)
    networks = {key: {**spec, **_NARROW[name][key]} for key, spec in preset.networks.items()}
    latent = None if preset.latent_shape is None else (3, 4, 8, 4)
    shape = (32, 64, 32) if latent else (16, 16, 16)
    return preset.model_copy(update={"networks": networks, "shape": shape, "latent_shape": latent})


def random_network(
    preset: System, name: str, seed: int = 0, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A network whose every parameter is random, also those MONAI starts at zero.

    Parameters
    ----------
    preset
        Its architecture.
    name
        One of its networks.
    seed
        Of the weights.
    dtype
        Of the weights.
    """
    module = preset.build(name).to_empty(device="cpu").to(dtype)
    source = torch.Generator().manual_seed(seed)
    for key, value in module.named_parameters():
        fan_in = max(1, value[0].numel()) if value.ndim > 1 else 4
        noise = torch.randn(value.shape, generator=source, dtype=dtype) / fan_in**0.5
        value.data = noise + (1.0 if "norm" in key and key.endswith("weight") else 0.0)
    return module.requires_grad_(False)


@dataclass(frozen=True)
class RandomWeights:
    """A checkpoint made of nothing but a seed.

    Parameters
    ----------
    preset
        Architecture, schedule and sampler.
    name
        What it is called.
    target
        What the U-Net is taken to predict; by default the preset's target, nothing for GANs.
    seed
        Of the weights.
    """

    preset: System
    name: str = "random"
    seed: int = 0
    chosen_target: str | None = None

    @property
    def target(self) -> str:
        """What the U-Net is taken to predict."""
        usual = self.preset.target if isinstance(self.preset, Preset) else ""
        return self.chosen_target or usual

    @property
    def digest(self) -> str:
        """Hex SHA-256 of preset and seed."""
        return hashlib.sha256(f"{self.preset!r} {self.seed}".encode()).hexdigest()

    def network(self, name: str) -> nn.Module:
        """One of its networks."""
        return random_network(self.preset, name, self.seed)
