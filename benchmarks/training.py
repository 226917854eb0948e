"""What training at the published sizes takes: operations, memory, and steps timed on a part.

``python benchmarks/training.py --out benchmarks/training.md`` takes some minutes on two cores and
8 GB. Operations and activations are counted at full size without computing (PyTorch's meta
device); steps are timed in float32 on smaller boxes and compared with their operations, which
gives the rate of this machine. Hours on a GPU follow from an assumed rate, which is printed.
"""

from __future__ import annotations

import argparse
import gc
import platform
import time
from pathlib import Path
from typing import Any, NamedTuple

import monai
import torch
from torch.utils.flop_counter import FlopCounterMode

from generation.presets import Preset
from generation.train.networks import new_network
from generation.train.settings import Settings, recipe

RECIPES = ("autoencoder-brlp", "autoencoder-generative-brain", "ldm-epsilon", "ldm-velocity",
           "medforj")  # fmt: skip
BOXES = {"autoencoder": (64, 64, 64), "diffusion": (20, 28, 20), "pixel": (64, 64, 64)}
PLAIN = {"upcast_attention": False}
ASSUMED = 100e12
"""Operations a second a data-centre GPU is assumed to sustain on 3D convolutions in bfloat16: a
third of the peak of an A100. Nobody measured it for these networks."""


class Cost(NamedTuple):
    """What one sample of a step takes at full size."""

    parameters: int
    operations: float
    activations: float


def main() -> None:
    """Count, time, print and keep the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each network (3)")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    text = "\n".join([*counted(), "", *timed(options.rounds), ""])
    print(text)
    if options.out:
        options.out.write_text(text)


def counted() -> list[str]:
    """Operations and memory at full size."""
    lines = [
        "# Training at the published sizes",
        "",
        f"Counted at full size, not run. PyTorch {torch.__version__}, MONAI {monai.__version__}.",
        "Memory: activations in bfloat16 of one sample that the backward pass needs, and float32",
        "parameters, gradients, two moments and the average, without discriminator and perceptual",
        f"network. Hours: at an assumed {ASSUMED / 1e12:.0f} TFLOP/s, for the recipe's steps.",
        "",
        "| recipe | M parameters | PFLOP a step | GB a sample | GB of state | steps | batch "
        "| GPU hours |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in RECIPES:
        settings = recipe(name)
        cost = of_a_sample(settings)
        step = cost.operations * settings.batch
        hours = step * settings.steps / ASSUMED / 3600
        lines.append(
            f"| {name} | {cost.parameters / 1e6:.1f} | {step / 1e15:.2f} "
            f"| {cost.activations / 1e9:.1f} | {cost.parameters * 20 / 1e9:.1f} "
            f"| {settings.steps:,} | {settings.batch} | {hours:,.0f} |"
        )
    return lines


def timed(rounds: int) -> list[str]:
    """Steps of full-width networks on smaller boxes, here."""
    lines = [
        f"Timed: forward and backward of one sample in float32, least of {rounds}, "
        f"{torch.get_num_threads()} threads, {platform.machine()}.",
        "",
        "| recipe | box | s a step | GFLOP/s |",
        "|---|---|---:|---:|",
    ]
    for name in ("autoencoder-brlp", "ldm-epsilon", "medforj"):
        settings = recipe(name)
        box = BOXES[settings.kind]
        operations = of_a_sample(settings, box).operations
        module, inputs = network(settings, box, torch.device("cpu"))
        seconds = min(step_seconds(module, inputs) for _ in range(rounds))
        size = "×".join(map(str, box))
        lines.append(f"| {name} | {size} | {seconds:.1f} | {operations / seconds / 1e9:.0f} |")
        del module, inputs
        gc.collect()
    return lines


def of_a_sample(settings: Settings, box: tuple[int, int, int] | None = None) -> Cost:
    """Operations of a forward and a backward pass, and what is kept between them."""
    preset = settings.system
    box = box or (preset.latent_shape[1:] if settings.kind == "diffusion" else preset.shape)
    module, inputs = network(settings, box, torch.device("meta"))
    module.to(torch.bfloat16)
    inputs = {
        key: value.bfloat16() if value.is_floating_point() else value
        for key, value in inputs.items()
    }
    kept: dict[tuple[int, ...], int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            alive.append(tensor.untyped_storage())
            kept[id(alive[-1]), tensor.storage_offset()] = tensor.nbytes
        return tensor

    alive: list[torch.UntypedStorage] = []  # so that no identity is used twice
    with (
        FlopCounterMode(display=False) as forward,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        output(module, inputs)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return Cost(parameters, 3.0 * forward.get_total_flops(), float(sum(kept.values())))


def network(
    settings: Settings, box: tuple[int, int, int], device: torch.device
) -> tuple[Any, dict[str, torch.Tensor]]:
    """A full-width network and inputs of some size."""
    preset: Preset = settings.system
    name = "autoencoder" if settings.kind == "autoencoder" else "unet"
    if device.type == "meta":
        # Attention in float32 does not mix with weights in bfloat16, and counts the same.
        spec = {**preset.networks[name], **({} if name == "autoencoder" else PLAIN)}
        module: Any = preset.model_copy(update={"networks": {name: spec}}).build(name)
    else:
        module = new_network(preset, name, 0)
    module.train().requires_grad_(True)
    if name == "autoencoder":
        return module, {"x": torch.rand(1, 1, *box, device=device)}
    channels = preset.networks["unet"]["in_channels"]
    inputs = {
        "x": torch.rand(1, channels, *box, device=device),
        "timesteps": torch.zeros(1, dtype=torch.int64, device=device),
    }
    if preset.networks["unet"].get("with_conditioning"):
        inputs["context"] = torch.rand(1, 1, 4, device=device)
    return module, inputs


def output(module: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the network makes."""
    made = module(**inputs)
    return made[0] if isinstance(made, tuple) else made


def step_seconds(module: Any, inputs: dict[str, torch.Tensor]) -> float:
    """Seconds of one forward and backward pass."""
    module.zero_grad(set_to_none=True)
    began = time.perf_counter()
    output(module, inputs).square().mean().backward()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
