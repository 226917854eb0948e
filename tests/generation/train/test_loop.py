"""What all trainers share: the loop, checkpoints, randomness; run with every kind of task."""

import json
import os
import random
import resource
import signal

import pytest
import torch
import trainers
from trainers import by_two, difference, in_process, trained

from generation.errors import TrainingError
from generation.train import checkpoints
from generation.train.world import World, draws, order, row_of

EVERY = pytest.mark.parametrize("kind", list(trainers.KINDS))


@EVERY
def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path, kind):
    whole, _ = trained(kind, tmp_path / "whole")
    (process, told), stop = in_process(kind, tmp_path / "parts"), random.Random(kind).randint(1, 5)
    while told.recv() != stop:
        pass
    process.kill()
    process.join()
    rest, _ = trained(kind, tmp_path / "parts")
    assert rest.step == 6
    assert difference(whole, rest) == 0
    for player, average in whole.averages.items():
        assert all(torch.equal(rest.averages[player][n], value) for n, value in average.items())


@EVERY
def test_two_processes_equal_one_and_one_goes_on_with_their_checkpoint(tmp_path, kind):
    alone, _ = trained(kind, tmp_path / "one")
    by_two(kind, tmp_path / "two")
    both, _ = trained(kind, tmp_path / "two")
    assert both.step == 6
    assert 0 <= difference(alone, both) <= 1e-5
    (tmp_path / "two" / "step-000000006.pt").unlink()
    rest, lines = trained(kind, tmp_path / "two")
    assert lines[0]["step"] == 5
    assert difference(alone, rest) <= 1e-5


@EVERY
def test_parts_of_a_batch_give_the_same_step(tmp_path, kind):
    whole, _ = trained(kind, tmp_path / "a", until=3)
    parts, _ = trained(kind, tmp_path / "b", until=3, accumulate=4)
    assert difference(whole, parts) <= 1e-5


@EVERY
def test_parts_of_different_size_give_the_same_step(tmp_path, kind):
    whole, _ = trained(kind, tmp_path / "a", until=2, batch=3)
    parts, _ = trained(kind, tmp_path / "b", until=2, batch=3, accumulate=2)
    assert difference(whole, parts) <= 1e-5


def test_dropout_is_random_by_the_seed_alone_and_goes_on_with_a_run(tmp_path):
    judge = {"channels": 4, "num_layers_d": 1}
    changes = {"steps": 3, "adversarial_from": 0, "discriminator": judge | {"dropout": 0.5}}
    whole, _ = trained("autoencoder", tmp_path / "whole", **changes)
    trained("autoencoder", tmp_path / "parts", until=2, keep_every=1, **changes)
    rest, _ = trained("autoencoder", tmp_path / "parts", keep_every=1, **changes)
    assert difference(whole, rest) == 0
    plain, _ = trained("autoencoder", tmp_path / "plain", **changes | {"discriminator": judge})
    assert difference(whole, plain) > 0


@EVERY
def test_readers_beside_change_nothing(tmp_path, kind):
    alone, _ = trained(kind, tmp_path / "a", until=3)
    other = trainers.start(kind, tmp_path / "b")
    other.workers = 2
    list(other.advance(3))
    assert difference(alone, other) == 0


@EVERY
def test_validation_and_sheets_change_nothing_and_can_be_looked_at(tmp_path, kind):
    from PIL import Image

    plain, _ = trained(kind, tmp_path / "a", until=4)
    told, lines = trained(kind, tmp_path / "b", until=4, validate_every=2, sheet_every=4)
    assert difference(plain, told) == 0
    checks = [line for line in lines if any(name.startswith("validation/") for name in line)]
    assert [line["step"] for line in checks] == [0, 2, 4]
    sheets = sorted((tmp_path / "b" / "sheets").iterdir())
    assert [path.name for path in sheets] == [f"step-{step:09d}.png" for step in (0, 4)]
    assert Image.open(sheets[0]).getextrema()[1] > 200


def test_checkpoints_are_few_and_whole(tmp_path):
    run, _ = trained("diffusion", tmp_path, keep=2)
    assert checkpoints.steps(tmp_path) == [4, 6]
    (tmp_path / "step-000000006.pt").write_bytes(b"half")
    with pytest.raises(TrainingError, match="delete it to go on from the one before"):
        trained("diffusion", tmp_path, keep=2)
    (tmp_path / "step-000000006.pt").unlink()
    again, _ = trained("diffusion", tmp_path, keep=2)
    assert difference(run, again) == 0


def test_what_a_killed_run_left_half_written_is_taken_away(tmp_path):
    old, new = (tmp_path / f"step-{step:09d}.1.partial" for step in (1, 2))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    checkpoints.write(tmp_path, 3, {"a": torch.zeros(8)}, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [new.name, "step-000000003.pt"]


def test_a_full_disk_is_told_and_leaves_the_checkpoints_before(tmp_path):
    checkpoints.write(tmp_path, 1, {"a": torch.zeros(8)}, keep=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(TrainingError, match="earlier checkpoints are intact"):
            checkpoints.write(tmp_path, 2, {"a": torch.zeros(1 << 20)}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, kept)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001.pt"]


def test_other_settings_are_not_mixed_in(tmp_path):
    trained("diffusion", tmp_path, until=1)
    with pytest.raises(TrainingError, match="holds a run of other settings"):
        trained("diffusion", tmp_path, batch=2)


def test_the_log_is_kept(tmp_path):
    trained("diffusion", tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["samples_per_second"] > 0 for line in lines)


def test_a_gradient_that_is_not_finite_ends_the_run_in_words(tmp_path):
    class Broken(trainers.Latents):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return sample | {"mean": sample["mean"] * float("nan")}

    run = trainers.start("diffusion", tmp_path)
    run.data = Broken()
    with pytest.raises(TrainingError, match="not finite at step 0"):
        list(run.advance())


def test_nothing_to_train_on_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(trainers.Latents, "__len__", lambda self: 0)
    with pytest.raises(TrainingError, match="nothing to train on"):
        trainers.start("diffusion", tmp_path, latent_scale=1.0)


def test_rates_of_networks_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(TrainingError, match="rates names critic; the networks trained are unet"):
        trainers.start("diffusion", tmp_path, rates={"critic": 1e-3})


def test_rates_rise_and_halve(tmp_path):
    run = trainers.start("diffusion", tmp_path, warm_up=4, half_life=2, rates={"unet": 1.0})
    rates = []
    for run.step in (0, 3, 4, 6):
        rates.append(run._rate("unet"))
    assert rates == [0.25, 2**-1.5, 0.25, 0.125]


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


@pytest.mark.parametrize(
    ("device", "says"), [("gpu", "unknown device 'gpu'"), ("cuda:64", "'cuda:64' needs a GPU")]
)
def test_a_device_that_is_not_there_is_told(device, says):
    with pytest.raises(TrainingError, match=says):
        World.of_environment(device)


def test_a_batch_that_cannot_be_shared_is_refused():
    assert list(World(1, 2).places(6)) == [3, 4, 5]
    with pytest.raises(ValueError, match="cannot be shared by 2 processes"):
        World(0, 2).places(5)
