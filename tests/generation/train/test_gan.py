"""Trainers of the GAN baselines."""

import math

import pytest
import torch
import trainers
from torch import nn
from trainers import Volumes, chosen, trained

from generation.errors import TrainingError
from generation.testing import narrow
from generation.train.gan import LsganTask, VaeGanTask
from generation.train.loop import Batch
from generation.train.world import draws

TASKS = {"lsgan": LsganTask, "vae-gan": VaeGanTask}
FAST = {"betas": [0.5, 0.99], "learning_rate": 3e-3, "rates": {}, "augment": {}, "keep_every": 0,
        "average": 0, "batch": 2, "warm_up": 0, "steps": 25}  # fmt: skip


def a_batch(count=2):
    volumes = torch.stack([Volumes()[index]["image"] for index in range(count)])
    return Batch({"image": volumes}, [draws(0, 0, place) for place in range(count)])


class Constant(nn.Module):
    """The same values whatever goes in, and a parameter to have a gradient."""

    def __init__(self, *values):
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))

    def forward(self, x):
        return self.values.expand(len(x), -1)


class ConstantGenerator(Constant):
    def forward(self, x):
        return super().forward(x)[:, 0, None, None, None, None].expand(-1, 1, 16, 16, 16)


class ConstantEncoder(Constant):
    def forward(self, x):
        mean, variance = super().forward(x).chunk(2, 1)
        return mean.expand(-1, 8), variance.expand(-1, 8)


class MeanDiscriminator(nn.Module):
    """The score is ``a`` and ``b`` times the mean of a volume, the feature is the volume's mean."""

    def __init__(self, a, b):
        super().__init__()
        self.values = nn.Parameter(torch.tensor([a, b]))

    def forward(self, x):
        return self.look(x, "")[0]

    def look(self, x, layer):
        mean = x.mean((1, 2, 3, 4))
        return self.values[0] + self.values[1] * mean, mean[:, None]


def fixed(kind, discriminator, **changes):
    """A task of networks whose losses can be worked out by hand; volumes are 0.25 everywhere."""
    task = TASKS[kind](chosen(kind, augment={}, **changes))
    networks = {"generator": ConstantGenerator(0.75), "discriminator": discriminator,
                "encoder": ConstantEncoder(0.5, math.log(4.0))}  # fmt: skip
    task.modules = {name: networks[name] for name in task.modules}
    task._generator, task._discriminator = networks["generator"], discriminator
    task._encoder = networks["encoder"]
    volumes = torch.full((2, 1, 16, 16, 16), 0.25)
    return task, Batch({"image": volumes}, [draws(0, 0, place) for place in range(2)])


def played(task, batch):
    """The losses of all players of a step."""
    return {player: task.loss(player, batch, 0)[0].item() for player in task.turns(0)}


def test_least_squares_by_hand():
    task, batch = fixed("lsgan", MeanDiscriminator(0.5, 1.0))
    scores = {"x": 0.75, "G(z)": 1.25}
    assert played(task, batch) == pytest.approx({
        "generator": 0.5 * (scores["G(z)"] - 1) ** 2,
        "discriminator": 0.5 * ((scores["x"] - 1) ** 2 + scores["G(z)"] ** 2),
    })  # fmt: skip


def test_losses_of_the_vae_gan_by_hand():
    task, batch = fixed("vae-gan", MeanDiscriminator(0.5, 1.0), kl=0.01, gamma=3.0)
    kl = 8 * 0.5 * (0.5**2 + 4 - math.log(4) - 1)
    features = 0.5 * (0.75 - 0.25) ** 2
    real, made = (1 / (1 + math.exp(-score)) for score in (0.75, 1.25))
    assert played(task, batch) == pytest.approx({
        "encoder": 0.01 * kl + features,
        "generator": 3 * features + 2 * math.log(1 - made),
        "discriminator": -math.log(real) - 2 * math.log(1 - made),
    })  # fmt: skip


def test_the_generator_descends_where_the_discriminator_ascends():
    task, batch = fixed("vae-gan", MeanDiscriminator(0.5, 1.0), gamma=0)
    for player in ("encoder", "generator"):
        loss, _ = task.loss(player, batch, 0)
    (gradient,) = torch.autograd.grad(loss, task.modules["generator"].values)
    probability = 1 / (1 + math.exp(-1.25))
    assert float(gradient) == pytest.approx(-2 * probability)


def gradients(task, player, batch):
    """Which networks a player's loss reaches when all may have gradients."""
    for module in task.modules.values():
        module.requires_grad_(True).zero_grad(set_to_none=True)
    task.loss(player, batch, 0)[0].backward()
    return {
        name: [p.grad.clone() for p in module.parameters() if p.grad is not None]
        for name, module in task.modules.items()
    }


def test_each_player_of_the_vae_gan_learns_through_what_larsen_says():
    """The encoder through generator and features, the generator not through the encoder."""
    task, batch = VaeGanTask(chosen("vae-gan", augment={})), a_batch()
    reached = {}
    for player in task.turns(0):
        found = gradients(task, player, batch)
        reached[player] = {name for name, values in found.items() if values}
    assert reached == {
        "encoder": {"encoder", "generator", "discriminator"},
        "generator": {"generator", "discriminator"},
        "discriminator": {"discriminator"},
    }


@pytest.mark.parametrize("kind", list(TASKS))
def test_the_moving_player_alone_has_gradients(tmp_path, kind):
    run, _ = trained(kind, tmp_path, until=1)
    task, batch = run.task, a_batch()
    for player in task.turns(0):
        for name, module in task.modules.items():
            module.requires_grad_(name == player).zero_grad(set_to_none=True)
        task.loss(player, batch, 0)[0].backward()
        for name, module in task.modules.items():
            moved = [p.grad is not None for p in module.parameters()]
            assert any(moved) == (name == player)


def test_features_past_the_chosen_layer_do_not_matter_to_the_encoder():
    found = []
    for change in (0.0, 1.0):
        task, batch = VaeGanTask(chosen("vae-gan", augment={}, features="layer1")), a_batch()
        task.modules["discriminator"].layers["layer2"].conv.weight.data += change
        found.append(gradients(task, "encoder", batch)["encoder"])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_all_gradients_of_a_step_are_of_one_forward_pass():
    """A generator that moved leaves what the discriminator judges as it was."""
    for kind, task_of in TASKS.items():
        verdicts = []
        for moves in (False, True):
            task, batch = task_of(chosen(kind, augment={})), a_batch()
            for player in task.turns(0)[:-1]:
                task.loss(player, batch, 0)
                if moves:
                    task.modules[player].requires_grad_(False).end.weight.add_(0.1)
            verdicts.append(task.loss("discriminator", batch, 0)[0].item())
        assert verdicts[0] == verdicts[1]


@pytest.mark.parametrize("kind", list(TASKS))
def test_a_score_does_not_depend_on_the_others_of_a_batch(kind):
    judge, volumes = TASKS[kind](chosen(kind))._discriminator, a_batch(3).samples["image"]
    alone = torch.cat([judge(volume[None]) for volume in volumes])
    torch.testing.assert_close(judge(volumes), alone)


def test_samples_of_the_lsgan_come_nearer_to_the_data(tmp_path, monkeypatch):
    monkeypatch.setitem(trainers.KINDS, "lsgan", (LsganTask, Volumes, trainers.GAN))
    run, _ = trained("lsgan", tmp_path, until=1, **FAST)
    before = run.validate()
    list(run.advance())
    after = run.validate()
    assert after["validation/energy"] < 0.7 * before["validation/energy"]


def test_reconstructions_of_the_vae_gan_get_better(tmp_path, monkeypatch):
    others = trainers.KINDS["vae-gan"][2]
    monkeypatch.setitem(trainers.KINDS, "vae-gan", (VaeGanTask, Volumes, others))
    run, _ = trained("vae-gan", tmp_path, until=1, **FAST | {"kl": 1e-4})
    before = run.validate()
    list(run.advance())
    after = run.validate()
    assert after["validation/psnr"] > before["validation/psnr"] + 3
    assert after["validation/energy"] < before["validation/energy"]


def test_the_energy_score_tells_collapse_and_distance():
    task, batch = fixed("lsgan", MeanDiscriminator(0.0, 1.0))
    task._generator.requires_grad_(False)
    assert task.validate(batch) == pytest.approx({"energy": 0.5, "spread": 0.0})
    drawn = iter([0.0, 0.5])
    task._generator = lambda noise: torch.full((len(noise), 1, 16, 16, 16), next(drawn))
    assert task.validate(batch) == pytest.approx({"energy": 0.0, "spread": 0.5})


def test_a_layer_that_is_not_there_is_told():
    with pytest.raises(TrainingError, match="has no 'layer7', only layer1, layer2"):
        VaeGanTask(chosen("vae-gan", features="layer7"))


def test_a_vae_gan_needs_an_encoder():
    system = narrow("lsgan").model_dump(mode="json")
    with pytest.raises(TrainingError, match=r"a vae-gan needs encoder.*found no encoder"):
        VaeGanTask(chosen("vae-gan", system=system))
