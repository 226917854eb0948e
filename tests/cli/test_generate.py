import json
import os
import signal
import subprocess
import sys

import nibabel
import numpy as np
import pytest

from generation.latent import LatentDiffusion
from generation.options import Options
from generation.pixel import PixelDiffusion
from generation.testing import RandomWeights, narrow
from synthbrain import SynthBrainDataset, generators


@pytest.fixture(autouse=True)
def narrow_models(monkeypatch):
    def ldm():
        return LatentDiffusion(RandomWeights(narrow("ukb-ldm")), Options(steps=2))

    def medforj():
        return PixelDiffusion(RandomWeights(narrow("medforj")), Options(steps=2))

    monkeypatch.setitem(generators.GENERATORS, "ldm", ldm)
    monkeypatch.setitem(generators.GENERATORS, "medforj", medforj)


def images(folder):
    return sorted(folder.rglob("*.nii.gz"))


class TestFiles:
    def test_brains_with_the_covariates_asked_for(self, run, tmp_path):
        done = run(
            *("generate", "-n", 3, "--sex", "male", "--age", "70y", "--ventricles", "0.7"),
            *("--brain", "0.5", "--generator", "ldm", "--out", "men"),
        )
        assert done.exit_code == 0, done.stderr
        assert done.stdout.strip() == str(tmp_path / "men")
        assert len(images(tmp_path / "men")) == 3
        sidecar = json.loads((tmp_path / "men" / "generated000000.json").read_text())
        found = sidecar["NormalisedCovariates"]
        assert found["sex"] == 1.0
        assert found["age"] == pytest.approx(26 / 38, abs=1e-6)
        assert (found["ventricular_volume"], found["brain_volume"]) == (0.7, 0.5)

    def test_every_file_says_how_it_was_made(self, run, tmp_path):
        run("generate", "--generator", "ldm", "--out", "now")
        run("generate", "--generator", "ldm", "--out", "later")
        now, later = (
            json.loads((tmp_path / out / "generated000000.json").read_text())
            for out in ("now", "later")
        )
        for name in ("weights_digest", "solver", "steps", "dtype", "torch", "monai"):
            assert now["GeneratedWith"][name] == later["GeneratedWith"][name]
        assert isinstance(now["Seed"], int)
        assert now["GenerationCost"].keys() == {"ms_per_step", "ms_per_decode", "peak_gb"}
        assert "GenerationCost" not in later  # it came from the store

    def test_the_bundles_own_names_are_understood(self, run, tmp_path):
        published = ("--gender", "1.0", "--age", "0.7", "--ventricular_vol", "0.7")
        ours = ("--sex", "male", "--age", "0.7", "--ventricles", "0.7")
        for out, line in (("theirs", published), ("ours", ours)):
            done = run("generate", *line, "--generator", "ldm", "--seed", 3, "--out", out)
            assert done.exit_code == 0, done.stderr
        theirs, ours = images(tmp_path / "theirs"), images(tmp_path / "ours")
        assert theirs[0].read_bytes() == ours[0].read_bytes()

    def test_affine_and_values(self, run, tmp_path):
        run("generate", "--generator", "ldm", "--out", "one", "--dtype", "float32")
        image = nibabel.load(images(tmp_path / "one")[0])
        assert image.shape == (32, 64, 32)
        assert np.allclose(image.affine[:3, 3], (80.481, -125.477, -60.554), atol=1e-3)
        values = image.get_fdata()
        assert 0 <= values.min() < values.max() <= 1

    def test_bids(self, run, tmp_path):
        done = run("generate", "-n", 2, "--generator", "ldm", "--format", "bids", "--out", "b")
        assert done.exit_code == 0, done.stderr
        assert (tmp_path / "b" / "dataset_description.json").is_file()

    def test_the_cohort_beside_the_files_can_be_loaded(self, run, tmp_path):
        run("generate", "-n", 2, "--generator", "ldm", "--out", "two")
        ds = SynthBrainDataset(tmp_path / "two" / "cohort", generator=None)
        assert len(ds) == 2
        assert ds.missing() == []
        assert tuple(ds[0]["image"].shape) == (1, 32, 64, 32)

    def test_again_makes_nothing(self, run, monkeypatch):
        line = ("generate", "-n", 2, "--generator", "ldm", "--out", "two")
        assert run(*line).exit_code == 0
        monkeypatch.setattr(LatentDiffusion, "sample", None)
        done = run(*line)
        assert done.exit_code == 0, done.stderr
        assert "0 new, 2 volumes" in done.stderr


KILLED = """
import os, signal
from generation.latent import LatentDiffusion
from generation.options import Options
from generation.testing import RandomWeights, narrow
from synthbrain import generators
class Killed(LatentDiffusion):
    made = 0
    def sample(self, rows):
        if Killed.made == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        Killed.made += 1
        return super().sample(rows)
generators.GENERATORS["ldm"] = lambda: Killed(RandomWeights(narrow("ukb-ldm")), Options(steps=2))
from synthbrain.cli import main
main()
"""


def test_killed_and_run_again_it_makes_only_what_is_missing(run, tmp_path, home, monkeypatch):
    line = ("generate", "-n", "8", "--generator", "ldm", "--out", "eight")
    env = os.environ | {"SYNTHBRAIN_HOME": str(home)}
    command = [sys.executable, "-c", KILLED, *line]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    sample, made = LatentDiffusion.sample, []

    def counted(self, rows):
        made.extend(rows.index)
        return sample(self, rows)

    monkeypatch.setattr(LatentDiffusion, "sample", counted)
    done = run(*line)
    assert done.exit_code == 0, done.stderr
    assert len(made) == 5
    assert len(images(tmp_path / "eight")) == 8


class TestUnconditional:
    def test_seeds_alone_make_brains(self, run, tmp_path):
        done = run("generate", "-n", 2, "--generator", "medforj", "--out", "m")
        assert done.exit_code == 0, done.stderr
        sidecar = json.loads((tmp_path / "m" / "generated000001.json").read_text())
        assert "NormalisedCovariates" not in sidecar
        lines = (tmp_path / "m" / "participants.tsv").read_text().splitlines()
        assert lines[1].split("\t")[2:4] == ["n/a", "n/a"]
        assert nibabel.aff2axcodes(nibabel.load(images(tmp_path / "m")[0]).affine) == tuple("LPS")

    def test_covariates_are_refused(self, run):
        done = run("generate", "--generator", "medforj", "--age", "70y", "--out", "m")
        assert done.exit_code == 2
        assert "follows no covariates: leave out" in done.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("--ventricles", "1.9"), "extrapolate"),
        (("--age", "70"), "has no unit"),
        (("--sex", "other"), "sex"),
        (("--format", "minc"), "must be one of bids, nifti"),
        (("-n", "0"), "at least 1"),
        (("--generator", "tiny", "--steps", "3"), "takes no steps"),
        (("--generator", "nobody"), "unknown generator 'nobody'"),
        (("--generator", "ukb-ldm"), "synthbrain weights pull ukb-ldm"),
    ],
)
def test_what_makes_no_sense_is_one_line(run, tmp_path, line, message):
    done = run("generate", "--out", "x", *(line if "--generator" in line else
               (*line, "--generator", "ldm")))  # fmt: skip
    assert done.exit_code == 2
    assert done.stderr.count("error:") == 1
    assert message in done.stderr
    assert not (tmp_path / "x").exists()


def test_extrapolation_on_the_explicit_word(run):
    done = run(
        "generate", "--ventricles", "1.9", "--extrapolate", "--generator", "ldm", "--out", "x"
    )
    assert done.exit_code == 0, done.stderr
