"""The trainer of regressors; also run by the tests of the loop."""

import numpy as np
import pytest
import torch
import trainers
from trainers import Grains, chosen

from generation.covariates import AGE, VENTRICULAR_VOLUME
from generation.errors import TrainingError
from generation.train.loop import Batch
from generation.train.regression import RegressionRun, RegressionTask
from generation.train.settings import recipe
from generation.train.world import draws

FAST = {"steps": 80, "learning_rate": 3e-3, "keep_every": 0, "average": 0, "augment": {},
        "validate_every": 80, "warm_up": 0}  # fmt: skip


class Sexes(Grains):
    """Men's balls are the larger ones."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        _, age, *others = sample["condition"].tolist()
        return sample | {"condition": torch.tensor([float(index > 5), age, *others])}


def started(folder, data=None, **changes):
    how = chosen("regression", **changes)
    data = data or Grains()
    return RegressionRun(RegressionTask(how, data), data, how, folder)


def with_targets(*targets, norm="instance"):
    system = recipe("brain-age").system.model_dump(mode="json") | trainers.REGRESSOR
    networks = {"regressor": {"channels": [4, 8], "norm": norm}}
    return {"system": system | {"targets": list(targets), "networks": networks}}


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_the_loss_falls_and_validation_gets_better(tmp_path, norm):
    run = started(tmp_path, **FAST, **with_targets("age", "ventricular_volume", norm=norm))
    lines = list(run.advance())
    losses = [line["regressor"] for line in lines if "regressor" in line]
    assert np.mean(losses[-10:]) < 0.4 * np.mean(losses[:10])
    first, last = (line for line in lines if "validation/loss" in line)
    assert last["validation/age_mae"] < 0.5 * first["validation/age_mae"]
    assert last["validation/age_r"] > 0.95
    span = (VENTRICULAR_VOLUME.high - VENTRICULAR_VOLUME.low) / (AGE.high - AGE.low)
    ratio = last["validation/ventricular_volume_mae"] / last["validation/age_mae"]
    assert 0.1 * span < ratio < 10 * span


def test_validation_is_what_the_network_says_of_the_samples(tmp_path):
    run = started(tmp_path, **FAST)
    found = run.validate()
    data = [Grains()[index] for index in range(12)]
    network, targets = run.task.modules["regressor"].eval(), run.task.targets
    with torch.no_grad():
        told = targets.natural(network(torch.stack([sample["image"] for sample in data])))[:, 0]
    asked = torch.tensor(AGE.denormalise([index / 11 for index in range(12)]))
    expected = float((told - asked).abs().mean())
    assert found["validation/age_mae"] == pytest.approx(expected, rel=1e-4)
    r = np.corrcoef(told, asked)[0, 1]
    assert found["validation/age_r"] == pytest.approx(r, abs=1e-4)
    assert run.validate() == found


def test_losses_by_hand():
    task = RegressionTask(chosen("regression", **with_targets("age", "sex")), Sexes())
    spread = torch.arange(12) / 11
    assert task.targets.means == (pytest.approx(float(spread.mean())), 0)
    assert task.targets.deviations == (pytest.approx(float(spread.std(correction=0))), 1)
    batch = Batch(
        {name: torch.stack([Sexes()[index][name] for index in (1, 9)]) for name in Sexes()[0]},
        [draws(0, 0, place) for place in range(2)],
    )
    task._network = lambda volumes: torch.tensor([[0.5, -1.0], [-0.25, 3.0]])
    task.settings = chosen("regression", augment={}, **with_targets("age", "sex"))
    loss, parts = task.loss("regressor", batch, 0)
    wanted = (torch.tensor([1 / 11, 9 / 11]) - spread.mean()) / spread.std(correction=0)
    age = float((torch.tensor([0.5, -0.25]) - wanted).abs().mean())
    probability = torch.tensor([1 - torch.tensor(-1.0).sigmoid(), torch.tensor(3.0).sigmoid()])
    sex = float(-probability.log().mean())
    assert float(parts["age"]) == pytest.approx(age, rel=1e-5)
    assert float(parts["sex"]) == pytest.approx(sex, rel=1e-5)
    assert float(loss) == pytest.approx((age + sex) / 2, rel=1e-5)


def test_sex_is_told_by_a_probability(tmp_path):
    run = started(tmp_path, Sexes(), **FAST, **with_targets("sex"))
    *_, last = (line for line in run.advance() if "validation/loss" in line)
    assert last["validation/sex_accuracy"] == 1
    assert "validation/sex_mae" not in last


def test_targets_stay_standardised_as_the_run_began(tmp_path):
    run = started(tmp_path / "run", steps=4, keep_every=1)
    list(run.advance(2))
    means = run.task.targets.means

    class Others(Grains):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return sample | {"condition": 2 * sample["condition"]}

    again = started(tmp_path / "run", Others(), steps=4, keep_every=1)
    assert again.step == 2
    assert again.task.targets.means == means


@pytest.mark.parametrize(
    ("data", "changes", "says"),
    [
        (type("Same", (Grains,), {"__getitem__": lambda self, i: Grains()[3]}), {},
         "age is 0.272727 in all 12 rows"),
        (type("Bare", (Grains,), {"__getitem__": lambda self, i: {"image": Grains()[i]["image"]}}),
         {}, "the data has none"),
        (Grains, {"augment": {"affine": 1, "scale": 0.1}}, "augment.scale changes ventricular_vol"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_from_is_refused(data, changes, says):
    with pytest.raises(TrainingError, match=says):
        RegressionTask(chosen("regression", **changes), data())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ('system.targets=["hair"]', "system.targets.0"),
        ("system.targets=[]", "system.targets"),
        ('system.targets=["age", "age"]', "named twice"),
        ("system.downsample=3", "system.downsample"),
        ("system.shape=[160, 224, 16]", "5 blocks need 32 voxels a side"),
        ("system.networks.regressor.norm=group", "norm"),
        ("system.networks.regressor.channels=[]", "channels"),
    ],
)
def test_regressors_that_cannot_be_are_refused(change, says):
    with pytest.raises(TrainingError, match=says) as refused:
        recipe("brain-age", [change])
    assert "\n" not in str(refused.value)


def test_the_recipe_is_the_published_network():
    found = recipe("brain-age")
    network = found.system.build("regressor")
    assert found.system.targets == ("age",)
    assert network.end.in_features == 128 * 5 * 7 * 5
    assert "Cole et al. 2017" in found.source
    assert 0.97 ** (found.half_life / 1984) == pytest.approx(0.5, rel=0.01)
