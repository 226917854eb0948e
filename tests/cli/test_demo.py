import numpy as np
import pytest
import torch
from PIL import Image

from generation.covariates import AGE, VENTRICULAR_VOLUME
from synthbrain import Manifest, SynthBrainDataset, generators
from synthbrain.demo import AGES, VENTRICLES, grid_cohort, run_demo
from synthbrain.header import Geometry
from synthbrain.testing import TinyGenerator


@pytest.fixture
def whole_head(monkeypatch):
    """A generator of the demo's geometry that takes no time."""

    class Head(TinyGenerator):
        def sample(self, rows):
            return torch.full((len(rows), 1, *self.shape), 0.5)

    monkeypatch.setitem(generators.GENERATORS, "tiny", lambda: Head(shape=Geometry().shape))


def test_the_grid_has_a_brain_for_every_age_and_ventricular_volume():
    table = grid_cohort(seed=1).table
    years = AGE.denormalise(table["age"]).reshape(len(AGES), len(VENTRICLES))
    volumes = VENTRICULAR_VOLUME.denormalise(table["ventricular_volume"]).reshape(years.shape)
    assert np.abs(years - np.array(AGES)[:, None]).max() < 1e-3
    assert np.abs(volumes / 1000 - np.array(VENTRICLES)).max() < 1e-3
    assert table["sex"].sum() == len(table) / 2
    assert table["brain_volume"].between(0, 1).all()
    assert table["brain_volume"].nunique() == len(table)


def test_the_grid_is_a_function_of_its_seed():
    assert grid_cohort(seed=1).header == grid_cohort(seed=1).header
    assert not grid_cohort(seed=1).table.equals(grid_cohort(seed=2).table)


def test_the_demo_leaves_a_picture_a_cohort_and_volumes(run, whole_head, tmp_path):
    result = run("demo", "--generator", "tiny", "--out", "show")
    assert result.exit_code == 0, result.output
    assert "20 of 20 made by tiny-01234567" in result.stdout
    assert "ms a volume, from the store" in result.stdout
    with Image.open(tmp_path / "show" / "contact-sheet.png") as picture:
        assert min(picture.size) > 1000
    dataset = SynthBrainDataset("show/cohort", generator=None)
    assert (len(dataset), dataset.missing()) == (20, [])
    assert Manifest.open("show/cohort").name == "demo"
    for command in ("synthbrain export show/cohort", "synthbrain draw", "python -c"):
        assert command in result.stderr
    again = run("demo", "--generator", "tiny", "--out", "show")
    assert "20, all stored by an earlier run" in again.stdout


def test_a_small_demo_from_python(whole_head, tmp_path):
    done = run_demo(
        tmp_path / "small", ages=(60,), ventricles=(20, 40), generator="tiny",
        store=tmp_path / "store", progress=False,
    )  # fmt: skip
    assert (done.made, done.volumes) == (2, 2)
    assert done.picture.is_file()
    assert done.store.is_relative_to(tmp_path / "store")


@pytest.mark.filterwarnings("ignore::synthbrain.resolver.ReadOnlyStoreWarning")
def test_a_store_that_keeps_nothing_is_no_hindrance(whole_head, small_disk, tmp_path):
    disk, remount = small_disk("1m")
    remount("ro")
    done = run_demo(tmp_path / "out", ages=(50,), ventricles=(20,), generator="tiny",
                    store=disk / "store", progress=False)  # fmt: skip
    assert (done.made, done.bytes_stored) == (1, 0)
    assert done.picture.exists()
