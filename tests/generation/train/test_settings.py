import pytest

from generation.errors import TrainingError
from generation.train.settings import recipe

RECIPES = ("ldm-epsilon", "ldm-velocity", "medforj")


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_read_and_name_their_source(name):
    found = recipe(name)
    assert found.source
    assert found.system.schedule.steps == 1000


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
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(change, says):
    with pytest.raises(TrainingError, match=says) as refused:
        recipe("ldm-epsilon", [change])
    assert "\n" not in str(refused.value)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(TrainingError, match="did you mean 'medforj'"):
        recipe("medfroj")
