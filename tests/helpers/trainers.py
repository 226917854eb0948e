"""Tiny runs of every trainer, in this process and in others."""

import multiprocessing
import os
import socket

import torch

from generation.testing import narrow
from generation.train.autoencoder import AutoencoderTask
from generation.train.diffusion import DiffusionTask
from generation.train.gan import LsganTask, VaeGanTask
from generation.train.loop import Run
from generation.train.regression import RegressionTask
from generation.train.settings import recipe, settings
from generation.train.world import World

UNET = {"channels": [8, 8, 8], "num_res_blocks": 1, "norm_num_groups": 4,
        "num_head_channels": [0, 8, 8]}  # fmt: skip
AUTOENCODER = {"channels": [4, 4, 4, 4], "num_res_blocks": [1, 1, 1, 1], "norm_num_groups": 2}


def tiny(name="ukb-ldm", **changes):
    """A published system of a few channels."""
    preset = narrow(name)
    networks = dict(preset.networks)
    if name == "ukb-ldm":
        networks["unet"] = networks["unet"] | UNET
        networks["autoencoder"] = networks["autoencoder"] | AUTOENCODER
    else:
        networks["unet"] = networks["unet"] | {
            "channels": [4, 4, 4, 4, 4],
            "num_head_channels": 4,
            "num_res_blocks": 1,
            "norm_num_groups": 2,
        }
    return preset.model_copy(update={"networks": networks, **changes}).model_dump(mode="json")


class Latents:
    """Twelve latents, each a smooth pattern whose size its covariate tells."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        draw = torch.Generator().manual_seed(index)
        ramp = torch.linspace(-1, 1, 4)[None, None, :, None].expand(3, 4, 4, 4)
        strength = index / 11
        mean = 2 * strength * ramp + 0.05 * torch.randn(3, 4, 4, 4, generator=draw)
        condition = torch.full((4,), float(strength))
        return {"mean": mean, "sigma": torch.full_like(mean, 0.02), "condition": condition}


class Volumes:
    """Twelve balls, each of its own size."""

    side = 16

    def __len__(self):
        return 12

    def __getitem__(self, index):
        at = torch.linspace(-1, 1, self.side)
        x, y, z = torch.meshgrid(at, at, at, indexing="ij")
        radius = (x**2 + y**2 + z**2).sqrt()
        ball = torch.sigmoid(20 * (0.4 + 0.04 * index - radius))
        return {"image": ball[None], "condition": torch.full((4,), index / 11)}


class Grains(Volumes):
    """The same with noise: in an even background all voxels pass an activation's kink at once."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        draw = torch.Generator().manual_seed(index)
        grain = torch.rand(sample["image"].shape, generator=draw)
        return sample | {"image": 0.8 * sample["image"] + 0.2 * grain}


BASE = {"steps": 6, "batch": 4, "learning_rate": 1e-3, "precision": "float32", "average": 0.9,
        "keep_every": 2, "log_every": 1, "warm_up": 2, "validate_every": 0,
        "sheet_every": 0}  # fmt: skip

REGRESSOR = {"networks": {"regressor": {"channels": [4, 8], "norm": "instance"}},
             "shape": [16, 16, 16], "targets": ["age", "ventricular_volume"]}  # fmt: skip

GAN = {"betas": [0, 0.999], "learning_rate": 1e-4, "rates": {"discriminator": 4e-4}}

KINDS = {
    "diffusion": (DiffusionTask, Latents, {"latent_scale": "measured", "drop_conditions": 0.2}),
    "pixel": (DiffusionTask, Volumes, {"augment": {"flip": 0.5, "affine": 0.5, "degrees": 10}}),
    "autoencoder": (AutoencoderTask, Volumes, {
        "perceptual": 0.1, "perceptual_network": "pyramid", "adversarial": 0.01,
        "adversarial_from": 2, "adversarial_over": 2, "crop": [8, 16, 8],
        "discriminator": {"channels": 4, "num_layers_d": 1},
        "augment": {"flip": 0.5, "affine": 0.5, "degrees": 10, "voxels": 1, "gamma": 0.1},
    }),
    "vae-gan": (VaeGanTask, Grains, {
        **GAN, "features": "layer2", "kl": 0.1,
        "augment": {"flip": 0.5, "affine": 0.5, "degrees": 10},
    }),
    "lsgan": (LsganTask, Grains, {**GAN, "augment": {"flip": 0.5}}),
    "regression": (RegressionTask, Grains, {"augment": {"flip": 0.5, "affine": 0.5, "degrees": 5}}),
}  # fmt: skip
"""By what is trained: the task, its data, and settings besides the common ones."""


def chosen(kind, **changes):
    """Settings of a tiny run."""
    if kind == "regression":
        system = recipe("brain-age").system.model_dump(mode="json") | REGRESSOR
    elif kind in ("vae-gan", "lsgan"):
        system = narrow(kind).model_dump(mode="json")
    else:
        system = tiny("medforj" if kind == "pixel" else "ukb-ldm")
    return settings(BASE | {"kind": kind, "system": system} | KINDS[kind][2] | changes)


def start(kind, folder, world=None, **changes):
    """A run, not yet advanced."""
    how = chosen(kind, **changes)
    make, data, _ = KINDS[kind]
    task = make(how, data()) if make in (DiffusionTask, RegressionTask) else make(how)
    return Run(task, data(), how, folder, world or World())


def trained(kind, folder, until=None, **changes):
    """A run that was advanced, and its log."""
    run = start(kind, folder, **changes)
    return run, list(run.advance(until))


def difference(run, other):
    """The largest one between all weights of two runs."""
    worst = 0.0
    for name, module in run.task.modules.items():
        there = other.task.modules[name].state_dict()
        for key, value in module.state_dict().items():
            worst = max(worst, float((value.double() - there[key].double()).abs().max()))
    return worst


def _train(kind, folder, environment, told):
    os.environ.update(environment)
    for line in start(kind, folder, World.of_environment("cpu")).advance():
        told.send(line["step"])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def in_process(kind, folder, **environment):
    """A process that trains, and what it tells its steps through.

    Forked: with one thread the parent's torch may be used, which spares importing it again.
    """
    fork = multiprocessing.get_context("fork")
    told, telling = fork.Pipe(duplex=False)
    process = fork.Process(target=_train, args=(kind, folder, environment, telling))
    process.start()
    telling.close()
    return process, told


def by_two(kind, folder):
    """Train with two processes, as torchrun would start them."""
    started = [in_process(kind, folder, **environment)[0] for environment in _two()]
    _join(started)


def both(work):
    """Call something in two processes, as torchrun would start them."""

    def one(environment):
        os.environ.update(environment)
        work()
        torch.distributed.destroy_process_group()

    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=one, args=(environment,)) for environment in _two()]
    for process in started:
        process.start()
    _join(started)


def _two():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **common} for rank in range(2)]


def _join(processes):
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
