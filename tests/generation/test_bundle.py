"""Bundles: MONAI alone must give what the package gives."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from bundles import run_bundle

from generation import bundle
from generation.covariates import COVARIATES
from generation.errors import WeightsError
from generation.latent import LatentDiffusion
from generation.options import Options
from generation.pixel import PixelDiffusion
from generation.presets import SamplerSpec
from generation.testing import RandomWeights, narrow

TOLERANCE = 1e-5
"""Both compute in float32; MONAI cumulates its schedule in it too, which moved the full 50 steps by
1.4e-6 of values in [0, 1]."""

SEED = 2**62 + 5
VALUES = {"sex": 1.0, "age": 0.7, "ventricular_volume": 0.3, "brain_volume": 0.5}
REQUIRED = [
    "schema", "version", "monai_version", "pytorch_version", "numpy_version",
    "required_packages_version", "task", "description", "authors", "copyright",
    "network_data_format",
]  # fmt: skip


def weights(name, target=None, steps=3):
    """A narrow system of few steps."""
    preset = narrow(name)
    sampler = SamplerSpec(solver="ddim", steps=steps, spacing="leading")
    return RandomWeights(preset.model_copy(update={"sampler": sampler}), chosen_target=target)


def expected(system, found, seed=SEED):
    rows = pd.DataFrame({**{key: [value] for key, value in VALUES.items()}, "seed": [seed]})
    options = Options.published(found.preset, device="cpu")
    return system(found, options).sample(rows)[0, 0].numpy()


class TestTheSameVolume:
    def test_of_a_latent_system(self, tmp_path):
        found = weights("ukb-ldm")
        out = bundle.export(found, tmp_path / "bundle")
        given = [f"--{bundle.ARGUMENTS[name]}={value}" for name, value in VALUES.items()]
        image, volume = run_bundle(out, tmp_path, *given, "--seed", SEED)
        assert np.abs(volume - expected(LatentDiffusion, found)).max() <= TOLERANCE
        assert np.abs(volume - expected(LatentDiffusion, found, seed=1)).max() > 0.1
        assert np.array_equal(image.affine, np.array(found.preset.affine, np.float32))
        assert image.get_data_dtype() == np.float32

    def test_of_a_pixel_system(self, tmp_path):
        found = weights("medforj", "sample")
        out = bundle.export(found, tmp_path / "bundle")
        image, volume = run_bundle(out, tmp_path, "--seed", SEED)
        assert np.abs(volume - expected(PixelDiffusion, found)).max() <= TOLERANCE
        assert np.array_equal(image.affine, np.array(found.preset.affine, np.float32))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The bundle of a narrow latent system."""
    return bundle.export(weights("ukb-ldm", steps=50), tmp_path_factory.mktemp("x") / "bundle")


class TestTheFolder:
    def test_is_laid_out_like_the_published_one(self, out):
        files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
        assert files == {
            "LICENSE", "configs/inference.json", "configs/logging.conf", "configs/metadata.json",
            "docs/README.md", "models/autoencoder.pt", "models/model.pt",
        }  # fmt: skip
        assert [path.name for path in out.parent.iterdir()] == ["bundle"]

    def test_models_are_plain_state_dicts(self, out):
        found = weights("ukb-ldm")
        for name, file in (("autoencoder", "autoencoder.pt"), ("unet", "model.pt")):
            state = torch.load(out / "models" / file, weights_only=True)
            torch.testing.assert_close(
                state, dict(found.network(name).state_dict()), rtol=0, atol=0
            )

    def test_the_configuration_names_no_other_package(self, out):
        text = (out / "configs" / "inference.json").read_text()
        imported = set(re.findall(r"\$(?:from|import) (\w+)", text))
        assert imported == {"torch", "pathlib", "monai"}
        assert "synthbrain" not in text
        assert "generation" not in text

    def test_the_timesteps_are_the_published_ones(self, out):
        from monai.bundle import ConfigParser

        parser = ConfigParser(json.loads((out / "configs" / "inference.json").read_text()))
        found = weights("ukb-ldm", steps=50)
        wanted = Options.published(found.preset).solution(found.preset).timesteps
        assert parser.get_parsed_content("timesteps").tolist() == wanted.tolist()

    def test_metadata_has_what_monai_s_schema_requires(self, out):
        told = json.loads((out / "configs" / "metadata.json").read_text())
        assert set(REQUIRED) <= set(told)
        assert set(told["required_packages_version"]) == {"einops", "fire", "nibabel"}
        inputs = told["network_data_format"]["inputs"]
        assert list(inputs) == ["noise", "covariates"]
        assert inputs["covariates"]["channel_def"]["3"] == "brain_volume"
        fields = {"type", "format", "num_channels", "spatial_shape", "dtype", "value_range"}
        for tensor in (*inputs.values(), *told["network_data_format"]["outputs"].values()):
            assert fields <= set(tensor)

    def test_the_readme_says_how_to_run_it_and_what_numbers_mean(self, out):
        text = (out / "docs" / "README.md").read_text()
        assert "pip install monai einops fire nibabel" in text
        assert "--solver ddim --steps 50 --spacing leading" in text
        assert "`--ventricular_vol` | 6,995.68 to 171,375 | mm³" in text
        assert len(re.findall(r"^\| `--", text, re.MULTILINE)) == len(COVARIATES)


class TestWhatCannotBe:
    def test_a_target_monai_does_not_know(self, tmp_path):
        with pytest.raises(WeightsError, match="target 'flow'; MONAI's sampler does ddim, leading"):
            bundle.export(weights("medforj", "flow"), tmp_path / "bundle")
        assert list(tmp_path.iterdir()) == []

    def test_other_steps(self, tmp_path):
        found = weights("ukb-ldm")
        sampler = SamplerSpec(solver="unipc", steps=5, spacing="logsnr")
        other = RandomWeights(found.preset.model_copy(update={"sampler": sampler}))
        with pytest.raises(WeightsError, match="samples with unipc, logsnr steps"):
            bundle.export(other, tmp_path / "bundle")

    def test_a_folder_that_holds_something(self, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(WeightsError, match="is there already; choose another folder"):
            bundle.export(weights("ukb-ldm"), tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

    def test_a_network_that_cannot_be_read_leaves_nothing(self, tmp_path):
        class Broken(RandomWeights):
            def network(self, name):
                if name == "unet":
                    raise WeightsError("cannot read it")
                return super().network(name)

        with pytest.raises(WeightsError, match="cannot read it"):
            bundle.export(Broken(narrow("ukb-ldm")), tmp_path / "bundle")
        assert list(tmp_path.iterdir()) == []
