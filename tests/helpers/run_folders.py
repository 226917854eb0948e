"""Folders of training runs with random weights."""

import json

import torch

from generation.testing import random_network
from generation.train import checkpoints
from generation.train.release import RELEASED


def state_of(preset, name, seed=0):
    return random_network(preset, name, seed).state_dict()


def make_run(folder, kind, *, preset, step=7, seed=0, scale=None, average=False, **more):
    """A run's folder with one checkpoint, as the loop writes it."""
    player = RELEASED.get(kind, "unet")
    facts = {"kind": kind, "system": preset.model_dump(mode="json"), "source": "a recipe"}
    modules = {player: state_of(preset, player, seed)}
    averages = {player: state_of(preset, player, seed + 100)} if average else {}
    if kind == "autoencoder":
        modules["discriminator"] = {"weight": torch.zeros(3)}
    state = {
        "step": step, "settings": json.dumps(facts), "modules": modules, "averages": averages,
        "optimisers": {}, "task": {} if scale is None else {"scale": scale}, **more,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(facts))
    checkpoints.write(folder, step, state, keep=3)
    return folder
