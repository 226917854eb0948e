import nibabel
import numpy as np
import pytest
import torch
from bundles import run_bundle

from generation import weights
from generation.testing import narrow, random_network
from synthbrain.manifest import Manifest


@pytest.fixture
def installed(run, tmp_path, monkeypatch):
    """Weights of a narrow system called ``mine``."""
    monkeypatch.setattr(weights, "load_preset", narrow)
    preset = narrow("ukb-ldm")
    for name in preset.networks:
        torch.save(random_network(preset, name).state_dict(), tmp_path / f"{name}.pt")
    done = run("weights", "add", "mine", "--autoencoder", "autoencoder.pt", "--diffusion",
               "unet.pt")  # fmt: skip
    assert done.exit_code == 0, done.stderr


@pytest.mark.usefixtures("installed")
def test_the_bundle_gives_what_generate_gives(run, tmp_path):
    given = ("--gender", "1.0", "--age", "0.7", "--ventricular_vol", "0.3", "--brain_vol", "0.5")
    done = run("export-bundle", "mine", "bundle")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "bundle")
    assert "fire" in done.stderr
    done = run("generate", "--generator", "mine", "--solver", "ddim", "--steps", 4, "--spacing",
               "leading", "--precision", "float32", "--device", "cpu", *given, "--dtype",
               "float32", "--out", "brains")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    (row,) = Manifest.open(tmp_path / "brains" / "cohort").table.itertuples()
    image, volume = run_bundle(
        tmp_path / "bundle", tmp_path, *given, "--seed", row.seed, "--num_inference_steps", 4
    )
    (path,) = (tmp_path / "brains").glob("*.nii.gz")
    ours = nibabel.load(path)
    # The store keeps 256 levels; the rewritten networks of `generate` add 1e-4 at most.
    step = 1 / 255
    assert np.abs(ours.get_fdata() - volume).max() <= step / 2 + 1e-4
    assert np.array_equal(ours.affine, image.affine)


@pytest.mark.usefixtures("installed")
def test_errors_are_one_line(run, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").write_text("")
    for line, message in (
        (("nobody", "x"), "no weights 'nobody'"),
        (("mine", "there"), "there is there already"),
    ):
        done = run("export-bundle", *line)
        assert done.exit_code == 2
        assert message in done.stderr
        assert done.stderr.count("error:") == 1
