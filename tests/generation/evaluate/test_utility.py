"""Training on synthetic and on real volumes."""

import json
import shutil

import numpy as np
import pytest
import torch

from generation.covariates import VENTRICULAR_VOLUME
from generation.errors import EvaluationError
from generation.evaluate.comparison import Arm
from generation.evaluate.utility import _StudyData, _Trial, utility
from generation.train.settings import recipe, settings

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 32


class Blobs:
    """Balls in noise whose volume is the ventricular volume; men's are brighter."""

    def __init__(self, count, seed, *, shuffled=False):
        draw = np.random.default_rng(seed)
        self.size, self.sex = draw.uniform(0, 1, count), draw.integers(0, 2, count)
        self.told = draw.permutation(self.size) if shuffled else self.size
        self.images = [self._image(index, 1000 * seed + index) for index in range(count)]

    def __len__(self):
        return len(self.size)

    def _image(self, index, seed):
        at = torch.linspace(-1, 1, SIDE)
        radius = sum(x**2 for x in torch.meshgrid(at, at, at, indexing="ij")).sqrt()
        ball = torch.sigmoid(15 * (0.3 + 0.5 * self.size[index] - radius))
        noise = torch.rand(radius.shape, generator=torch.Generator().manual_seed(seed))
        return ((0.5 + 0.3 * self.sex[index]) * ball + 0.2 * noise)[None].float()

    def __getitem__(self, index):
        told = [self.sex[index], 0.5, self.told[index], 0.5]
        return {"image": self.images[index], "condition": torch.tensor(told).float()}


def how(*targets, steps=60, **changes):
    system = recipe("brain-age").system.model_dump(mode="json") | {
        "networks": {"regressor": {"channels": [8, 16]}}, "shape": [SIDE] * 3,
        "targets": list(targets), "downsample": 4,
    }  # fmt: skip
    fields = {"kind": "regression", "system": system, "steps": steps, "batch": 8,
              "learning_rate": 3e-3, "precision": "float32"}  # fmt: skip
    return settings(fields | changes)


@pytest.fixture(scope="module")
def data():
    return {"real_train": Blobs(24, 1), "real_test": Blobs(30, 2), "synthetic": Blobs(24, 3)}


def by_name(found, arm, target, metric):
    return next(one for one in found if (one.arm, one.target, one.metric) == (arm, target, metric))


@pytest.fixture(scope="module")
def study(data, tmp_path_factory):
    """A study with its arguments, what it found, its folder and the steps it told."""
    given_ = {"settings": how("ventricular_volume", "sex"), "fractions": (0.1,)}
    folder, steps = tmp_path_factory.mktemp("study"), []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = utility(
        **data, **given_, folder=folder,
        told=lambda arm, seed, step: steps.append((arm, seed, step)),
    )  # fmt: skip
    torch.set_num_threads(threads)
    return given_, found, folder, steps


class TestStudy:
    def test_good_synthetic_data_help_where_real_ones_are_few(self, data, study):
        given_, found, folder, steps = study
        assert {score.arm for score in found.scores} == {
            "real-1", "synthetic", "real-0.1", "mixed-0.1"
        }  # fmt: skip
        assert {(one.arm, one.baseline) for one in found.differences} == {
            ("synthetic", "real-1"), ("mixed-0.1", "real-0.1")
        }  # fmt: skip
        assert len(steps) == 4 * 3 * 60
        span = VENTRICULAR_VOLUME.high - VENTRICULAR_VOLUME.low
        score = by_name(found.scores, "synthetic", "ventricular_volume", "mae")
        assert score.estimate.value < 0.2 * span
        assert len(score.by_seed) == 3
        assert by_name(found.scores, "synthetic", "ventricular_volume", "r").estimate.value > 0.9
        few = by_name(found.differences, "mixed-0.1", "ventricular_volume", "mae")
        assert few.verdict == "helps"
        assert few.estimate.high < 0
        assert str(few).endswith("synthetic data help")
        again = utility(
            **data, **given_, folder=folder, told=lambda *told: pytest.fail("trained again")
        )
        assert again == found
        kept = json.loads((folder / "mixed-0.1-seed-2.json").read_text())
        assert np.shape(kept["predicted"]) == np.shape(kept["asked"]) == (30, 2)

    def test_shuffled_labels_hurt_and_it_is_said(self, data, study, tmp_path):
        given_, _, folder, _ = study
        for kept in folder.glob("real-1-seed-*.json"):  # these know nothing of synthetic volumes
            shutil.copy(kept, tmp_path)
        spoilt = data | {"synthetic": Blobs(24, 3, shuffled=True)}
        found = utility(**spoilt, **given_ | {"fractions": ()}, folder=tmp_path)
        worse = by_name(found.differences, "synthetic", "ventricular_volume", "mae")
        assert worse.verdict == "hurts"
        assert worse.estimate.low > 0
        assert worse in found.harms
        assert "synthetic against real-1, mae of ventricular_volume: +" in str(worse)
        assert str(worse).endswith("synthetic data hurt")

    def test_what_was_cut_short_is_gone_on_with(self, data, tmp_path):
        class StopError(Exception):
            pass

        def stop(arm, seed, step):
            if (arm, seed, step) == ("synthetic", 1, 3):
                raise StopError

        given_ = data | {
            "settings": how("ventricular_volume", steps=5, keep_every=2), "fractions": ()
        }  # fmt: skip
        with pytest.raises(StopError):
            utility(**given_, folder=tmp_path / "a", told=stop)
        assert len(list((tmp_path / "a").glob("*.json"))) == 4
        steps = []
        found = utility(**given_, folder=tmp_path / "a", told=lambda *told: steps.append(told))
        assert steps[0] == ("synthetic", 1, 3)
        assert len(steps) == 3 + 5
        assert found == utility(**given_, folder=tmp_path / "b")

    def test_another_study_is_not_mixed_in(self, data, tmp_path):
        given_ = {"settings": how("ventricular_volume", steps=1), "fractions": ()}
        utility(**data, **given_, folder=tmp_path)
        with pytest.raises(EvaluationError, match="of a study with other settings or volumes"):
            utility(**data | {"synthetic": Blobs(9, 3)}, **given_, folder=tmp_path)
        (tmp_path / "real-1-seed-0.json").write_text("{")
        with pytest.raises(EvaluationError, match=r"cannot read .*delete it and run again"):
            utility(**data, **given_, folder=tmp_path)

    def test_studies_that_make_no_sense_are_refused(self, data, tmp_path):
        given_ = {"settings": how("ventricular_volume", steps=1), "folder": tmp_path}
        for changes, says in (
            ({"seeds": (0, 1)}, r"at least 3 different seeds, found \[0, 1\]"),
            ({"seeds": (0, 1, 1)}, "different seeds"),
            ({"fractions": (1.5,)}, r"lie in \(0, 1\], found 1\.5"),
            ({"fractions": (0.01,)}, "of 24 real volumes is fewer than 2"),
            ({"synthetic": Blobs(0, 1)}, "synthetic holds no volumes"),
        ):
            with pytest.raises(EvaluationError, match=says):
                utility(**data | given_ | changes)


def test_parts_of_the_real_volumes_are_nested_and_the_same_in_both_arms(data, tmp_path):
    def rows(arm, seed):
        how_ = how("age", seed=seed)
        trial = _Trial(arm=arm, settings=how_, data=_StudyData(**data), folder=tmp_path)
        return trial._parts()[0][1]

    half, tenth = rows(Arm(0.5, False), 1), rows(Arm(0.1, True), 1)
    assert len(half) == 12
    assert set(tenth) < set(half)
    assert rows(Arm(0.5, True), 1) == half != rows(Arm(0.5, True), 2)
