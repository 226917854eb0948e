"""Evaluations of toy cohorts whose truth is known."""

import html.parser
import json
import os
import re
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from readable import SHAPE, Means, Readable, Reader

from generation.evaluate.multiscale import Window
from generation.evaluate.planted import DOSES
from generation.evaluate.ssim import Ssim
from synthbrain import SynthBrainDataset
from synthbrain.errors import UsageError
from synthbrain.evaluation import diversity
from synthbrain.evaluation.memorisation import memorisation
from synthbrain.evaluation.metrics import part_of
from synthbrain.evaluation.opening import Inputs
from synthbrain.evaluation.run import Evaluation, plain
from synthbrain.evaluation.sets import VolumeSet
from synthbrain.header import Geometry
from synthbrain.manifest import Manifest
from synthbrain.testing import tiny_manifest

GRID = Geometry(
    shape=SHAPE,
    chunks=SHAPE,
    affine=((-10, 0, 0, 80), (0, 14, 0, -125), (0, 0, 10, -60), (0, 0, 0, 1)),
)


SMALL = {"ms-ssim": lambda: Ssim((1.0,), Window(5, 1.0))}
"""One scale and a small window, for volumes of 16 voxels a side."""


def toys(store, n=40, seed=0, name="toys", grid=GRID, made_by=Readable, **options):
    """A set of readable volumes."""
    tiny = tiny_manifest(n, seed=seed)
    header = tiny.header.model_copy(update={"geometry": grid, "name": name})
    manifest = Manifest.create(header, tiny.table)
    dataset = SynthBrainDataset(manifest, generator=made_by(**options), store=store)
    return VolumeSet(name, dataset)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(diversity, "MEASURES", SMALL)


@pytest.fixture
def volumes(tmp_path):
    """Makes sets of readable volumes."""
    return partial(toys, tmp_path / "store")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A whole evaluation but for utility: results, and the folder."""
    folder = tmp_path_factory.mktemp("evaluated")
    real = toys(folder / "store", seed=1, name="real")
    job = Evaluation(
        synthetic=toys(folder / "store"), real=real, training=real, network=Means(),
        measurer=Reader(), folder=folder / "out", pairs=60,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diversity, "MEASURES", SMALL)
        patch.setenv("SYNTHBRAIN_HOME", str(folder / "home"))
        return job.run(progress=False), folder / "out"


def test_every_part_is_measured_and_what_is_not_is_told(evaluated):
    results, folder = evaluated
    assert set(results["not_measured"]) == {"utility"}
    assert json.loads((folder / "results.json").read_text()) == results
    figures = results["metrics"]
    assert figures["ventricles.r"] > 0.99
    assert figures["ventricles.slope"] == pytest.approx(1, abs=0.05)
    assert abs(figures["kid"]) < 1
    assert {"fd", "real.fd", "ms-ssim", "real.ms-ssim", "copies.p", "brain.mae"} <= set(figures)
    assert results["memorisation"]["verdict"] == "no copy found"
    assert results["fidelity"]["network"]["pretrained"] is False
    measured = {"fidelity", "diversity", "conditioning", "memorisation"}
    assert set(results["seconds"]) == measured
    assert {part_of(name) for name in figures} == measured


class _Page(html.parser.HTMLParser):
    void = frozenset({"meta", "link", "img", "tr", "td", "th", "li"})

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.addresses += [v for k, v in attrs if k in ("src", "href") and v]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_stands_alone(evaluated):
    results, folder = evaluated
    text = (folder / "report.html").read_text()
    page = _Page(text)
    assert page.open == []
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not re.search(r"<script|@import|url\((?!#)", text)
    for heading in ("Fidelity", "Diversity", "Conditioning", "Copies of training", "Not measured"):
        assert f"<h2>{heading}" in text
    assert "random weights" in text
    assert f"{results['metrics']['ventricles.r']:.5g}" in text


def test_a_second_run_measures_nothing_again(volumes, tmp_path, monkeypatch):
    reader, synthetic = Reader(), volumes(12)
    options = {"folder": tmp_path / "out", "measurer": reader}
    first = Evaluation(synthetic=synthetic, **options).run(progress=False)
    assert reader.calls == 12
    again = Evaluation(synthetic=synthetic.first(10), **options).run(progress=False)
    assert reader.calls == 12
    assert (
        again["conditioning"]["covariates"]["brain_volume"]["asked"]
        == (first["conditioning"]["covariates"]["brain_volume"]["asked"][:10])
    )


def test_a_line_cut_short_is_measured_again(volumes, tmp_path):
    reader, synthetic = Reader(), volumes(6)
    options = {"folder": tmp_path, "measurer": reader, "parts": ("conditioning",)}
    first = Evaluation(synthetic=synthetic, **options).run(progress=False)
    (kept,) = (tmp_path / "measured").glob("*.jsonl")
    kept.write_bytes(kept.read_bytes()[:-20])
    again = Evaluation(synthetic=synthetic, **options).run(progress=False)
    assert reader.calls == 7
    assert again["metrics"] == first["metrics"]


def test_volumes_that_cannot_be_measured_are_counted(volumes, tmp_path):
    limit = float(np.median([volumes(20)[i].flatten()[0] for i in range(20)]))
    job = Evaluation(
        synthetic=volumes(20), folder=tmp_path, measurer=Reader(limit), parts=("conditioning",)
    )
    results = job.run(progress=False)
    assert results["metrics"]["ventricles.failed"] == 10
    assert "too bright to read" in (tmp_path / "report.html").read_text()


def test_sweeps_move_one_covariate_alone(volumes, tmp_path):
    job = Evaluation(
        synthetic=volumes(8), folder=tmp_path, measurer=Reader(), sweeps=3, parts=("conditioning",)
    )
    results = job.run(progress=False)
    assert results["metrics"]["ventricles.sweep.monotone"] == 1
    assert results["metrics"]["brain.sweep.slope"] == pytest.approx(1, abs=0.05)
    found = results["conditioning"]["sweeps"]["brain_volume"]
    assert found["n"] == 15
    assert found["slopes"]["ventricular_volume"][0] == pytest.approx(0, abs=0.05)
    assert "<h3>sweeps" in (tmp_path / "report.html").read_text()
    assert {part_of(name) for name in results["metrics"]} == {"conditioning"}


def test_shuffled_covariates_are_seen(volumes, tmp_path):
    synthetic = volumes(60)
    table = synthetic.table.copy()
    order = np.random.default_rng(0).permutation(len(table))
    told = Reader()

    class Shuffled(Reader):
        def measure(self, volume, affine):
            self.calls += 1
            return told.measure(synthetic[order[self.calls - 1]].numpy(), affine)

    options = {"synthetic": synthetic, "parts": ("conditioning",)}
    good = Evaluation(folder=tmp_path / "a", measurer=Reader(), **options).run(progress=False)
    bad = Evaluation(folder=tmp_path / "b", measurer=Shuffled(), **options).run(progress=False)
    assert good["metrics"]["brain.r"] > 0.99
    assert abs(bad["metrics"]["brain.r"]) < 0.35


def test_copies_of_training_volumes_are_found(volumes, tmp_path):
    real = volumes(80, seed=1, name="real", sigma=0.15)
    members = real.split("train")
    job = Evaluation(
        synthetic=members.part(list(range(0, len(members), 2))), training=real, folder=tmp_path,
        parts=("memorisation",),
    )  # fmt: skip
    results = job.run(progress=False)
    assert results["memorisation"]["verdict"] != "no copy found"
    assert results["metrics"]["copies.p"] < 0.01
    worst = results["memorisation"]["worst"][0]
    assert worst["similarity"] == pytest.approx(1)
    assert worst["synthetic"] == worst["training"]


def test_features_of_volumes_and_of_planted_copies_are_computed_once(volumes, tmp_path):
    real, network = volumes(40, seed=1, name="real"), Means()
    computed = []
    features = network.features
    network.features = lambda batch: computed.append(len(batch)) or features(batch)
    job = Evaluation(
        synthetic=volumes(12), real=real, training=real, network=network, folder=tmp_path / "out",
        parts=("fidelity", "memorisation"),
    )  # fmt: skip
    first = job.run(progress=False)
    assert sum(computed) == 12 + 40 + 20 * len(DOSES)
    again = job.run(progress=False)
    assert sum(computed) == 12 + 40 + 20 * len(DOSES)
    assert again["memorisation"] == first["memorisation"]
    assert [space["space"] for space in again["memorisation"]["spaces"]] == ["voxels", network.name]


def test_a_worse_generator_is_farther_from_real_volumes(volumes, tmp_path):
    real = volumes(60, seed=1, name="real")
    found = [
        Evaluation(
            synthetic=volumes(60, sigma=sigma), real=real, network=Means(), folder=tmp_path,
            parts=("fidelity",),
        ).run(progress=False)["metrics"]["kid"]
        for sigma in (0.05, 0.15, 0.25)
    ]  # fmt: skip
    assert found == sorted(found)


@pytest.mark.parametrize(
    ("options", "part", "words"),
    [
        ({}, "fidelity", "--real"),
        ({}, "conditioning", "--segmenter"),
        ({}, "memorisation", "--training"),
        ({}, "utility", "--utility"),
        ({"parts": ("diversity",)}, "fidelity", "not asked for"),
    ],
)
def test_what_lacks_is_told_with_the_option_that_gives_it(volumes, tmp_path, options, part, words):
    job = Evaluation(synthetic=volumes(4), folder=tmp_path, **options)
    assert words in job.run(progress=False)["not_measured"][part]


class Flat(Readable):
    """Readable volumes without their last planes."""

    shape = (16, 16, 12)

    def sample(self, rows):
        return super().sample(rows)[..., :12]


def test_volumes_on_another_grid_are_not_compared(volumes, tmp_path):
    grid = GRID.model_copy(update={"shape": Flat.shape, "chunks": Flat.shape})
    real = volumes(40, seed=1, name="real", grid=grid, made_by=Flat)
    job = Evaluation(
        synthetic=volumes(4), real=real, training=real, network=Means(), folder=tmp_path,
        parts=("fidelity", "memorisation"),
    )  # fmt: skip
    found = job.run(progress=False)["not_measured"]
    for part in ("fidelity", "memorisation"):
        assert "real has volumes of 16 x 16 x 12 voxels, toys of 16 x 16 x 16" in found[part]


def test_one_volume_is_measured_as_far_as_it_goes(volumes, tmp_path):
    real = volumes(40, seed=1, name="real")
    job = Evaluation(
        synthetic=volumes(1), real=real, training=real, network=Means(), measurer=Reader(),
        folder=tmp_path,
    )  # fmt: skip
    results = job.run(progress=False)
    assert "three volumes or more" in results["not_measured"]["diversity"]
    assert "at least 2 volumes, found 1" in results["fidelity"]["rows"][0]["missing"]["fd"]
    assert (
        "too few for a line"
        in (results["conditioning"]["covariates"]["brain_volume"]["agreement"]["trained"]["note"])
    )
    assert "2 or more" in results["memorisation"]["duplicates"]["voxels"]["missing"]
    assert (tmp_path / "report.html").exists()


def test_more_synthetic_than_real_volumes_are_no_collapse(volumes):
    real, made = volumes(40, seed=1, name="real"), volumes(200)
    found = memorisation(made, real.split("train"), real.without("train"), progress=False)
    share = found["duplicates"]["voxels"]["share"]
    assert share["of"] == 20
    assert share["count"] <= 5


def test_a_device_that_is_not_there_is_told_before_anything_is_opened(tmp_path):
    with pytest.raises(UsageError, match="unknown device 'gpu'"):
        Inputs(synthetic="nothing", folder=tmp_path, device="gpu").open()


def test_label_maps_cannot_be_swept(volumes, tmp_path):
    with pytest.raises(UsageError, match=r"has no label maps of them; give --segmenter"):
        Evaluation(synthetic=volumes(4), folder=tmp_path, labels=tmp_path, sweeps=1)


def test_an_unknown_part_is_refused(volumes, tmp_path):
    with pytest.raises(UsageError, match="unknown part 'fid'"):
        Evaluation(synthetic=volumes(4), folder=tmp_path, parts=("fid",))


def test_the_same_recipe_has_the_same_key_in_any_cohort(volumes):
    whole = volumes(12)
    part = whole.part([3, 5])
    assert part.keys == [whole.keys[3], whole.keys[5]]
    assert volumes(12, sigma=0.2).keys[3] != whole.keys[3]
    assert len(set(whole.keys)) == 12


def test_halves_share_nothing_and_leave_nothing(volumes):
    whole = volumes(11)
    one, other = whole.halves(0)
    assert sorted(one.ids + other.ids) == sorted(whole.ids)
    assert len(one) == 5


def test_plain_values_are_json():
    given = {1: np.float32(2), "a": (np.nan, np.arange(2)), "b": [np.int64(3), None, True]}
    assert plain(given) == {"1": 2.0, "a": [None, [0, 1]], "b": [3, None, True]}


_KILLED = """
import sys, os, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from readable import Readable, Reader, SHAPE
from synthbrain import SynthBrainDataset
from synthbrain.evaluation.run import Evaluation
from synthbrain.evaluation.sets import VolumeSet
from synthbrain.manifest import Manifest

class Slow(Reader):
    def measure(self, volume, affine):
        print("measured", flush=True)
        time.sleep(0.02)
        return super().measure(volume, affine)

folder = Path(sys.argv[1])
dataset = SynthBrainDataset(
    Manifest.open(folder / "cohort"), generator=Readable(), store=folder / "store"
)
job = Evaluation(synthetic=VolumeSet("toys", dataset), folder=folder / "out", measurer=Slow(),
                 parts=("conditioning",))
job.run(progress=False)
"""


def test_a_killed_evaluation_is_gone_on_with(volumes, tmp_path):
    synthetic = volumes(30)
    synthetic.dataset.fill(progress=False)
    synthetic.dataset.manifest.save(tmp_path / "cohort")
    helpers = os.path.dirname(sys.modules["readable"].__file__)
    command = [sys.executable, "-c", _KILLED, str(tmp_path), helpers]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(10):
            assert process.stdout.readline() == "measured\n"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out" / "report.html").exists()
    reader = Reader()
    options = {"synthetic": synthetic, "folder": tmp_path / "out", "parts": ("conditioning",)}
    results = Evaluation(measurer=reader, **options).run(progress=False)
    assert reader.calls <= 21
    assert results["metrics"]["ventricles.failed"] == 0
