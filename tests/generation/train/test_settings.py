import math

import pytest

from generation.errors import TrainingError
from generation.train.settings import recipe

RECIPES = ("ldm-epsilon", "ldm-velocity", "medforj")


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_read_and_name_their_source(name):
    found = recipe(name)
    assert found.source
    assert found.system.schedule.steps == 1000


@pytest.mark.parametrize("name", ["lsgan", "vae-gan"])
def test_recipes_of_gans_say_what_is_whose(name):
    found = recipe(name)
    assert found.kind == name
    assert "Pinaya et al. 2022 name the method only. Ours: " in found.source
    assert (found.steps, found.batch, found.system.latent) == (80_000, 4, 1024)
    assert (found.learning_rate, found.rates, found.betas) == (
        1e-4, {"discriminator": 4e-4}, (0.0, 0.999)
    )  # fmt: skip


def test_equal_weights_of_both_sums_are_one_over_the_features():
    found = recipe("vae-gan")
    channels = found.system.networks["discriminator"].channels[2]
    voxels = math.prod(side // 8 for side in found.system.shape)
    assert found.features == "layer3"
    assert found.kl == pytest.approx(1 / (channels * voxels), rel=0.01)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("lsgan", "gamma=2", "no setting 'gamma'"),
        ("lsgan", "system.networks.generator.chanels=[8]", "did you mean 'channels'"),
        ("vae-gan", "system.networks.generator.channels=[8, 8]", r"make \(10, 14, 10\) of base"),
        ("vae-gan", "system.networks.encoder.groups=7", "channels of the encoder must be multi"),
        ("lsgan", "system.networks.discriminator.channels=[8, 8, 8, 8, 8, 8]", "whole numbers"),
        ("lsgan", "system.shape=[160, 224, 161]", "expected shape"),
    ],
)
def test_gans_that_cannot_be_are_refused(name, change, says):
    with pytest.raises(TrainingError, match=says) as refused:
        recipe(name, [change])
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


def test_every_value_can_be_changed():
    found = recipe("ldm-epsilon", ["batch=4", "system.target=velocity", "latent_scale=0.5"])
    assert (found.batch, found.system.target, found.latent_scale) == (4, "velocity", 0.5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("bacth=4", "no setting 'bacth' .did you mean 'batch'"),
        ("system.tarjet=flow", "did you mean 'target'"),
        ("sytem.target=flow", "did you mean 'system'"),
        ("batch", "write key=value"),
        ("batch=0", "setting batch: "),
        ("batch=many", "setting batch: "),
        ("system.target=noise", "setting system.target"),
        ("average=1", "setting average"),
        ("betas=[1.5,0.9]", "setting betas.0"),
        ("latent_scale=0", "setting latent_scale"),
        ("system.schedule.end=2", "setting system.schedule.end"),
        ("system.schedule.steps=0", "setting system.schedule.steps"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(change, says):
    with pytest.raises(TrainingError, match=says) as refused:
        recipe("ldm-epsilon", [change])
    assert "\n" not in str(refused.value)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(TrainingError, match="did you mean 'medforj'"):
        recipe("medfroj")
