"""The published architectures at reduced width, with random weights."""

import torch

from generation.presets import Preset, load_preset

WIDTHS = {
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
SHAPES = {
    "ukb-ldm": {"shape": (32, 64, 32), "latent_shape": (3, 4, 8, 4)},
    "medforj": {"shape": (16, 16, 16)},
}


def tiny_preset(name: str) -> Preset:
    """The preset of that name, narrow and small."""
    preset = load_preset(name)
    networks = {key: {**spec, **WIDTHS[name][key]} for key, spec in preset.networks.items()}
    return preset.model_copy(update={"networks": networks, **SHAPES[name]})


def network(preset: Preset, name: str, seed: int = 0, dtype=torch.float32):
    """A network whose every parameter is random, also those MONAI starts at zero."""
    module = preset.build(name).to_empty(device="cpu").to(dtype)
    source = torch.Generator().manual_seed(seed)
    for key, value in module.named_parameters():
        fan_in = max(1, value[0].numel()) if value.ndim > 1 else 4
        noise = torch.randn(value.shape, generator=source, dtype=dtype) / fan_in**0.5
        value.data = noise + (1.0 if "norm" in key and key.endswith("weight") else 0.0)
    return module.requires_grad_(False)


class TinyWeights:
    """A checkpoint in memory."""

    def __init__(self, preset="ukb-ldm", name=None, target=None, seed=0):
        self.preset = tiny_preset(preset) if isinstance(preset, str) else preset
        self.name = name or f"tiny-{self.preset.system}"
        self.target = target or self.preset.target
        self.digest = f"{seed:064x}"
        self.seed = seed

    def network(self, name):
        return network(self.preset, name, self.seed)
