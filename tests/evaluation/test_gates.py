import pytest

from synthbrain.errors import UsageError
from synthbrain.evaluation.gates import Gate

FIGURES = {"ventricles.r": 0.97, "age.mae": 4.0, "copies.p": 1.0}


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("ventricles.r>=0.95", True),
        ("ventricles.r >= 0.98", False),
        ("age.mae < 4", False),
        (" age.mae<=4e0 ", True),
        ("copies.p > .05", True),
        ("ventricles.r<-1", False),
    ],
)
def test_conditions_on_figures(text, passes):
    assert (Gate.read(text).failure(FIGURES) is None) == passes


def test_a_failure_says_what_was_found_and_required():
    assert Gate.read("age.mae<3").failure(FIGURES) == "age.mae is 4, required < 3"


@pytest.mark.parametrize("text", ["", "age.mae", "age.mae=3", "age.mae>", ">3", "age.mae>x"])
def test_what_is_no_condition_is_refused(text):
    with pytest.raises(UsageError, match="no condition"):
        Gate.read(text)


def test_an_unknown_figure_names_the_nearest_before_anything_is_measured():
    with pytest.raises(UsageError, match=r"did you mean 'ventricles.r'"):
        Gate.read("ventricle.r>0")


def test_what_was_not_measured_is_no_pass():
    with pytest.raises(UsageError, match=r"'sex.auc' was not measured; there are age.mae"):
        Gate.read("sex.auc>0").failure(FIGURES)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("real.fd", "fidelity"),
        ("clipped_density", "fidelity"),
        ("real.4-g-r-ssim/multi/star", "diversity"),
        ("age.extrapolated.slope", "conditioning"),
        ("sex.sweep.slope", "conditioning"),
        ("copies.above.latents", "memorisation"),
        ("utility.age.mixed.mae", "utility"),
    ],
)
def test_every_figure_is_of_a_part(name, part):
    assert Gate.read(f"{name} > 0").part == part
