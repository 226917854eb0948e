"""Trainers of denoisers, and the loop they share."""

import json
import os
import subprocess
import sys

import pytest
import torch

from generation.errors import TrainingError
from generation.testing import narrow
from generation.train import checkpoints
from generation.train.diffusion import DiffusionTask
from generation.train.loop import Run
from generation.train.settings import settings
from generation.train.world import World, draws, order, row_of

SCRIPT = """
import sys, json
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from test_diffusion import Latents, small
from generation.train.diffusion import DiffusionTask
from generation.train.loop import Run
from generation.train.world import World
world = World.of_environment("cpu")
chosen = small(**json.loads(sys.argv[3]))
run = Run(DiffusionTask(chosen, Latents()), Latents(), chosen, Path(sys.argv[2]), world)
for line in run.advance():
    print(line["step"], flush=True)
"""


UNET = {"channels": [8, 8, 8], "num_res_blocks": 1, "norm_num_groups": 4,
        "num_head_channels": [0, 8, 8]}  # fmt: skip


def tiny(name="ukb-ldm", **changes):
    """A published system of a few channels."""
    preset = narrow(name)
    unet = preset.networks["unet"] | (UNET if name == "ukb-ldm" else {"channels": [8, 8, 8, 8, 8]})
    networks = {**preset.networks, "unet": unet}
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


def small(**changes):
    fields = {
        "kind": "diffusion", "system": tiny(), "steps": 6,
        "batch": 4, "learning_rate": 1e-3, "precision": "float32", "average": 0.9,
        "latent_scale": "measured", "keep_every": 2, "log_every": 1, "warm_up": 2,
    }  # fmt: skip
    return settings(fields | changes)


def trained(folder, until=None, world=None, **changes):
    chosen = small(**changes)
    run = Run(DiffusionTask(chosen, Latents()), Latents(), chosen, folder, world or World())
    lines = list(run.advance(until))
    return run, lines


def same(a, b, tolerance=0.0):
    first, second = a.task.modules["unet"].state_dict(), b.task.modules["unet"].state_dict()
    worst = max(float((first[n].double() - second[n].double()).abs().max()) for n in first)
    return worst <= tolerance


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("target", ["epsilon", "sample", "velocity", "flow"])
def test_the_loss_falls(tmp_path, target):
    changes = {"system": tiny(target=target), "steps": 60, "batch": 8, "keep_every": 0}
    _, lines = trained(tmp_path, learning_rate=3e-3, **changes)
    losses = [line["unet"] for line in lines]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_volumes_are_learned_without_an_autoencoder(tmp_path):
    class Volumes:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return {"image": torch.full((1, 16, 16, 16), index / 4)}

    chosen = small(kind="pixel", system=tiny("medforj", target="sample"), steps=40, batch=4,
                   latent_scale=1.0, learning_rate=3e-3, keep_every=0)  # fmt: skip
    run = Run(DiffusionTask(chosen), Volumes(), chosen, tmp_path)
    losses = [line["unet"] for line in run.advance()]
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8])


@pytest.mark.parametrize("stop", [2, 4])
def test_a_run_that_stopped_goes_on_bit_for_bit(tmp_path, stop):
    whole, _ = trained(tmp_path / "whole")
    trained(tmp_path / "parts", until=stop)
    rest, _ = trained(tmp_path / "parts")
    assert rest.step == 6
    assert same(whole, rest)
    assert all(torch.equal(whole.averages["unet"][n], v) for n, v in rest.averages["unet"].items())


def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path):
    whole, _ = trained(tmp_path / "whole")
    line = [sys.executable, "-c", SCRIPT, os.path.dirname(__file__), tmp_path / "parts", "{}"]
    process = subprocess.Popen(list(map(str, line)), stdout=subprocess.PIPE, text=True)
    for text in process.stdout:
        if int(text) == 3:
            process.kill()
            break
    process.communicate()
    rest, _ = trained(tmp_path / "parts")
    assert same(whole, rest)


def test_two_processes_equal_one_on_the_same_batch(tmp_path):
    alone, _ = trained(tmp_path / "one")
    spread(tmp_path / "two", "{}")
    both, _ = trained(tmp_path / "two")
    assert both.step == 6
    assert same(alone, both, 1e-5)


def test_a_checkpoint_of_two_processes_is_gone_on_with_by_one(tmp_path):
    alone, _ = trained(tmp_path / "one")
    spread(tmp_path / "two", "{}")
    (tmp_path / "two" / "step-000000006.pt").unlink()
    rest, lines = trained(tmp_path / "two")
    assert [line["step"] for line in lines] == [5, 6]
    assert same(alone, rest, 1e-5)


def spread(folder, changes):
    """Train with two processes."""
    port = 29500 + os.getpid() % 1000
    line = [sys.executable, "-c", SCRIPT, os.path.dirname(__file__), folder, changes]
    processes = [
        subprocess.Popen(
            list(map(str, line)),
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
                              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            stdout=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]  # fmt: skip
    assert [process.wait(timeout=120) for process in processes] == [0, 0]


def test_parts_of_a_batch_give_the_same_step(tmp_path):
    whole, _ = trained(tmp_path / "a", until=2)
    parts, _ = trained(tmp_path / "b", until=2, accumulate=4)
    assert same(whole, parts, 1e-5)


def test_checkpoints_are_few_and_whole(tmp_path):
    run, _ = trained(tmp_path, keep=2)
    assert checkpoints.steps(tmp_path) == [4, 6]
    (tmp_path / "step-000000006.pt").write_bytes(b"half")
    with pytest.raises(TrainingError, match="delete it to go on from the one before"):
        trained(tmp_path, keep=2)
    (tmp_path / "step-000000006.pt").unlink()
    again, _ = trained(tmp_path, keep=2)
    assert same(run, again)


def test_other_settings_are_not_mixed_in(tmp_path):
    trained(tmp_path, until=1)
    with pytest.raises(TrainingError, match="holds a run of other settings"):
        trained(tmp_path, batch=2)


def test_the_log_is_kept(tmp_path):
    trained(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["samples_per_second"] > 0 for line in lines)


def test_a_gradient_that_is_not_finite_ends_the_run_in_words(tmp_path):
    class Broken(Latents):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return sample | {"mean": sample["mean"] * float("nan")}

    chosen = small(latent_scale=1.0)
    run = Run(DiffusionTask(chosen), Broken(), chosen, tmp_path)
    with pytest.raises(TrainingError, match="not finite at step 0"):
        list(run.advance())


def test_nothing_to_train_on_is_told(tmp_path):
    chosen = small(latent_scale=1.0)
    with pytest.raises(TrainingError, match="nothing to train on"):
        Run(DiffusionTask(chosen), [], chosen, tmp_path)


def test_every_row_comes_equally_often():
    rows = [row_of(1, step, place, 4, 6) for step in range(9) for place in range(4)]
    assert sorted(rows) == sorted(list(range(6)) * 6)
    assert sorted(order(1, 0, 100)) == list(range(100))
    assert rows != [row_of(2, step, place, 4, 6) for step in range(9) for place in range(4)]


def test_draws_differ_by_step_and_place_alone():
    drawn = {
        float(torch.rand((), generator=draws(seed, step, place)))
        for seed in range(3)
        for step in range(5)
        for place in range(5)
    }
    assert len(drawn) == 75


def test_a_batch_that_cannot_be_shared_is_refused():
    assert list(World(1, 2).places(6)) == [3, 4, 5]
    with pytest.raises(ValueError, match="cannot be shared by 2 processes"):
        World(0, 2).places(5)
