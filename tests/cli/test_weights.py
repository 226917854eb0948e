import json
from pathlib import Path

import pytest
import torch
from run_folders import make_run

from generation import weights
from generation.errors import WeightsError
from generation.hub import PUBLISHED
from generation.presets import load_preset
from generation.testing import narrow, random_network


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "load_preset", narrow)
    preset = narrow("ukb-ldm")
    for name in preset.networks:
        torch.save(random_network(preset, name).state_dict(), tmp_path / f"{name}.pt")
    return ("--autoencoder", "autoencoder.pt", "--diffusion", "unet.pt")


def test_list_names_what_is_published(run):
    done = run("weights", "list")
    assert done.exit_code == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines[1:]] == list(PUBLISHED)
    assert lines[1][1:5] == ["latent", "all", "four", "no"]
    assert lines[2][1:4] == ["pixel", "none", "no"]


def test_add_list_path_generate_remove(run, checkpoints, tmp_path):
    done = run("weights", "add", "ours", *checkpoints)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "home" / "weights" / "ours")
    assert "next: synthbrain generate -n 1 --generator ours --out brains" in done.stderr
    listed = json.loads(run("weights", "list", "--json").stdout)
    ours = next(entry for entry in listed if entry["name"] == "ours")
    assert ours["installed"].endswith("MB")
    assert len(ours["digest"]) == 64
    assert "ours" in json.loads(run("info", "--json").stdout)["generators"]
    assert run("weights", "path", "ours").stdout.strip().endswith("/weights/ours")
    done = run("generate", "--generator", "ours", "--steps", 2, "--solver", "ddim", "--out", "x")
    assert done.exit_code == 0, done.stderr
    assert run("weights", "remove", "ours").exit_code == 0
    assert run("weights", "path", "ours").exit_code == 2


@pytest.fixture
def runs(tmp_path):
    """Folders of two training runs."""
    preset = narrow("ukb-ldm")
    make_run(tmp_path / "runs" / "autoencoder", "autoencoder", preset=preset)
    make_run(tmp_path / "runs" / "diffusion", "diffusion", preset=preset, scale=0.3)
    return ("--autoencoder", "runs/autoencoder", "--diffusion", "runs/diffusion")


def test_training_runs_are_a_generator(run, runs):
    done = run("weights", "add", "mine", *runs)
    assert done.exit_code == 0, done.stderr
    (mine,) = [e for e in json.loads(run("weights", "list", "--json").stdout) if e["digest"]]
    assert mine["source"] == "training"
    done = run("generate", "--generator", "mine", "--steps", 2, "--solver", "ddim", "--out", "x")
    assert done.exit_code == 0, done.stderr


def test_weights_to_hand_on_are_not_installed(run, runs, tmp_path):
    done = run("weights", "add", "mine", *runs, "--half", "--folder", "handed")
    assert done.exit_code == 0, done.stderr
    assert Path(done.stdout.strip()) == Path("handed/mine")
    assert len(list((tmp_path / "handed" / "mine").glob("*.safetensors"))) == 2
    assert run("weights", "path", "mine").exit_code == 2


def test_gans_are_generators_too(run, tmp_path):
    make_run(tmp_path / "runs" / "lsgan", "lsgan", preset=narrow("lsgan"))
    done = run("weights", "add", "gan", "--generator", "runs/lsgan")
    assert done.exit_code == 0, done.stderr
    (gan,) = [e for e in json.loads(run("weights", "list", "--json").stdout) if e["digest"]]
    assert (gan["system"], gan["covariates"], gan["source"]) == ("gan", "none", "training")
    done = run("generate", "--generator", "gan", "-n", 2, "--out", "x")
    assert done.exit_code == 0, done.stderr
    assert len(list((tmp_path / "x").glob("*.nii.gz"))) == 2
    for wrong, message in (
        (("--steps", 5, "--solver", "ddim"), "is a GAN, which makes a volume in one pass: it takes "
                                             "no solver, steps"),
        (("--precision", "int8"), "dtype must be"),
        (("--sex", "male"), "gan follows no covariates"),
    ):  # fmt: skip
        done = run("generate", "--generator", "gan", *wrong, "--out", "y")
        assert done.exit_code == 2, done.stdout
        assert message in done.stderr
        assert done.stderr.count("error:") == 1
    done = run("export-bundle", "gan", "bundle")
    assert done.exit_code == 2
    assert "gan is a gan system, expected a latent or pixel one" in done.stderr


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--preset", "ukb-ldm"), "the run knows its system"),
        (("--target", "flow"), "predicts 'epsilon', found --target 'flow'"),
        (("--diffusion", "runs/autoencoder"), "give it as --autoencoder"),
        (("--diffusion", "runs"), "runs is no training run"),
    ],
)
def test_runs_that_are_no_generator_are_told_in_one_line(run, runs, wrong, message):
    done = run("weights", "add", "mine", *runs, *wrong)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("error:") == 1


@pytest.mark.usefixtures("checkpoints")
def test_options_that_do_not_fit_a_generator(run, checkpoints):
    run("weights", "add", "ours", *checkpoints)
    for wrong, message in (
        (("--solver", "plms"), "solver must be one of ddim"),
        (("--steps", "1001"), "steps must lie between 1 and 1000"),
        (("--precision", "int8"), "dtype must be"),
        (("--device", "toaster"), "toaster"),
    ):
        done = run("generate", "--generator", "ours", *wrong, "--out", "x")
        assert done.exit_code == 2, done.stdout
        assert message in done.stderr
        assert done.stderr.count("error:") == 1


def test_pull_says_what_the_weights_are_for(run, monkeypatch):
    def refused(*_, **__):
        raise WeightsError("the Hub answered 500; try again later")

    monkeypatch.setattr(weights, "pull", refused)
    done = run("weights", "pull", "ukb-ldm")
    assert done.exit_code == 2
    assert "intended use: Research" in done.stderr
    assert "not for clinical use" in done.stderr
    assert "never re-hosts" in done.stderr
    assert "error: the Hub answered 500" in done.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("pull", "nobody"), "unknown weights 'nobody'"),
        (("path", "ukb-ldm"), "synthbrain weights pull ukb-ldm"),
        (("remove", "ukb-ldm"), "no weights 'ukb-ldm'"),
        (("add", "x", "--diffusion", "gone.pt"), "expected files of autoencoder, unet"),
        (("add", "x", "--diffusion", "gone.pt", "--preset", "x"), "--preset must be"),
        (("add", "x", "--diffusion", "gone.pt", "--target", "x"), "--target must be one of"),
        (("add", "x", "--generator", "gone.pt"), "gone.pt cannot be read"),
        (("add", "x", "--generator", "a.pt", "--diffusion", "b.pt"), "one of the two"),
        (("add", "x", "--autoencoder", "a.pt"), "give --diffusion, or --generator for a GAN"),
        (("add", "x", "--generator", "a.pt", "--autoencoder", "b.pt"), "expected files of gener"),
    ],
)
def test_errors_are_one_line(run, line, message):
    done = run("weights", *line)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("error:") == 1


def test_presets_are_those_the_options_name():
    assert load_preset("ukb-ldm").system == "latent"
    assert load_preset("medforj").system == "pixel"
    assert load_preset("vae-gan").system == load_preset("lsgan").system == "gan"
