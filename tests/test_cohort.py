import numpy as np
import pytest

from generation.covariates import NAMES
from synthbrain import Manifest, SynthBrainDataset, draw_cohort
from synthbrain.cohort import recipes
from synthbrain.errors import CovariateError, UsageError
from synthbrain.rows import split_of
from synthbrain.testing import TINY, TinyGenerator, tiny_manifest


def test_the_same_call_draws_the_same_rows():
    one, two = draw_cohort(50, seed=3), draw_cohort(50, seed=3)
    assert one.header == two.header
    assert one.table.equals(two.table)
    other = draw_cohort(50, seed=4)
    assert not (one.table["seed"] == other.table["seed"]).any()
    assert one.header.rows_digest != other.header.rows_digest


def test_every_row_is_a_recipe_of_its_own():
    table = draw_cohort(500, name="old-men.2").table
    assert table["seed"].is_unique
    assert set(table["origin"]) == {"recipe"}
    assert table.index[0] == "oldmen2000000"
    assert table["split"].tolist() == [split_of(id) for id in table.index]
    assert table[list(NAMES)].min().min() >= 0
    assert table[list(NAMES)].max().max() <= 1


def test_noise_never_repeats_in_a_large_cohort():
    drawn = {name: np.full(200_000, 0.5) for name in NAMES}
    seeds = recipes(drawn, stem="x", seed=1)["seed"].to_numpy()
    plain = np.random.Philox(key=np.array([1, 0x5EED], np.uint64)).random_raw(200_000) >> 1
    assert len(np.unique(plain.astype(np.uint32))) < 200_000  # some would
    assert len(np.unique(seeds.astype(np.uint32))) == 200_000
    assert (seeds != plain).mean() < 1e-4


@pytest.mark.parametrize(
    ("conditions", "column", "low", "high"),
    [
        ({"age_range": (0.25, 0.5)}, "age", 0.25, 0.5),
        ({"age_years": (53.5, 63)}, "age", 0.25, 0.5),
        ({"ventricular_range": (0.3, 0.4)}, "ventricular_volume", 0.3, 0.4),
        ({"brain_mm3": (1_300_000, 1_400_000)}, "brain_volume", 0.23975, 0.39369),
        ({"age_range": (1 / 3, 2 / 3)}, "age", 1 / 3, 2 / 3),
        ({"age_range": (1.0, 1.2), "extrapolate": True}, "age", 1.0, 1.2),
    ],
)
def test_conditions_hold_in_every_row(conditions, column, low, high):
    values = draw_cohort(200, **conditions).table[column]
    assert values.between(low - 1e-5, high + 1e-5).all()
    if "range" in next(iter(conditions)):
        assert values.between(low, high).all()


def test_a_pair_of_equal_numbers_fixes_a_covariate():
    assert (draw_cohort(20, age_range=(0.5, 0.5)).table["age"] == 0.5).all()


@pytest.mark.parametrize(
    ("sex", "males"), [("female", 0), ("male", 30), ("balanced", 15), (1, 30), ("F", 0)]
)
def test_sex_is_as_asked(sex, males):
    assert draw_cohort(30, sex=sex).table["sex"].sum() == males


def test_a_cohort_like_another_has_its_geometry_and_covariates(tmp_path):
    parent = tiny_manifest(200)
    folder = parent.save(tmp_path / "tiny")
    for like in (parent, folder, str(folder)):
        drawn = draw_cohort(20, like=like, name="alike")
        assert drawn.header.geometry == TINY
        assert "like=tiny" in drawn.header.provenance["drawn"]
    ds = SynthBrainDataset(drawn, generator=TinyGenerator(), store=tmp_path / "store")
    assert ds[0]["image"].shape == (1, *TINY.shape)


def test_a_cohort_is_saved_and_opened(tmp_path):
    cohort = draw_cohort(10, name="mine")
    cohort.save()
    assert Manifest.open("mine").table.equals(cohort.table)
    assert cohort.header.licence.status == "unknown"
    assert "n=10" in cohort.header.provenance["drawn"]


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ({"n": 0}, UsageError, "n must be at least 1"),
        ({"n": -5}, UsageError, "found -5"),
        ({"n": 2.5}, UsageError, "found 2.5"),
        ({"name": "Not a name"}, UsageError, "cannot name a manifest"),
        ({"name": "a\n"}, UsageError, "cannot name a manifest"),
        ({"name": "a" * 81}, UsageError, "up to 80"),
        ({"name": ""}, UsageError, "cannot name a manifest"),
        ({"sex": "unknown"}, CovariateError, 'sex must be "female" or "male"'),
        ({"seed": -1}, CovariateError, "seed"),
        ({"age_range": (0.5, 1.5)}, CovariateError, "extrapolate=True"),
        ({"age_range": (0.1, 0.2), "age_years": (50, 60)}, UsageError, "not both"),
    ],
)
def test_cohorts_nobody_can_draw_are_refused(arguments, kind, says):
    with pytest.raises(kind) as refused:
        draw_cohort(**{"n": 3} | arguments)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
