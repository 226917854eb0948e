"""Training runs as installed weights."""

import pandas as pd
import pytest
import torch
import trainers
from run_folders import make_run, state_of

from generation import weights
from generation.errors import WeightsError
from generation.gan import GanGenerator
from generation.latent import LatentDiffusion
from generation.options import Options
from generation.pixel import PixelDiffusion
from generation.testing import narrow, random_network
from generation.train import release
from generation.train.diffusion import DiffusionTask
from generation.train.loop import Run
from generation.train.settings import settings

LDM, MEDFORJ = narrow("ukb-ldm"), narrow("medforj")
ROW = pd.DataFrame(
    {"sex": [1.0], "age": [0.5], "ventricular_volume": [0.2], "brain_volume": [0.4], "seed": [1]}
)


def changed(preset, network, **spec):
    networks = {**preset.networks, network: preset.networks[network] | spec}
    return preset.model_copy(update={"networks": networks})


def ldm_run(folder, kind, *, preset=LDM, **others):
    return make_run(folder, kind, preset=preset, **others)


@pytest.fixture
def runs(tmp_path):
    """A run of each network of a latent system."""
    return {
        "autoencoder": ldm_run(tmp_path / "autoencoder", "autoencoder"),
        "unet": ldm_run(tmp_path / "diffusion", "diffusion", scale=0.3),
    }


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "weights"


class TestFolding:
    @pytest.mark.parametrize("scale", [0.3, 1.0, 4.7])
    @torch.inference_mode()
    def test_latents_are_multiplied_and_decode_to_the_same(self, scale):
        ours = random_network(LDM, "autoencoder", dtype=torch.float64)
        other = LDM.build("autoencoder")
        state = release.folded(ours.state_dict(), scale)
        other.load_state_dict(state, assign=True)
        source = torch.Generator().manual_seed(1)
        volume = torch.rand(1, 1, 16, 32, 16, generator=source, dtype=torch.float64)
        (mean, sigma), (scaled_mean, scaled_sigma) = ours.encode(volume), other.encode(volume)
        torch.testing.assert_close(scaled_mean, mean * scale, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(scaled_sigma, sigma * scale, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            other.decode(mean * scale), ours.decode(mean), rtol=1e-12, atol=1e-12
        )

    def test_what_is_folded_is_left_alone(self):
        state = state_of(LDM, "autoencoder")
        before = {key: value.clone() for key, value in state.items()}
        found = release.folded(state, 0.3)
        assert all(torch.equal(state[key], before[key]) for key in state)
        differ = {key.split(".")[0] for key in state if not torch.equal(found[key], state[key])}
        assert differ == {"quant_conv_mu", "quant_conv_log_sigma", "post_quant_conv"}
        assert {value.dtype for value in found.values()} == {torch.float32}


class TestAdd:
    def test_two_runs_are_a_generator_at_scale_one(self, runs, folder):
        found = release.add("mine", runs, folder)
        assert found.preset == LDM
        assert found.target == "epsilon"
        system = LatentDiffusion(found, Options(steps=2, dtype="float32"))
        latent = system.sample_latents(ROW)
        plain = random_network(LDM, "autoencoder")
        expected = plain.decode(latent / 0.3).clamp(0, 1)
        torch.testing.assert_close(system.decode(latent), expected, rtol=0, atol=1e-5)

    def test_source_says_which_run(self, runs, folder):
        source = release.add("mine", runs, folder).source
        assert source == {
            "unet": str(runs["unet"]), "unet_step": "7", "unet_kind": "diffusion",
            "unet_recipe": "a recipe", "unet_latent_scale": "0.3", "unet_layout": "MONAI",
            "autoencoder": str(runs["autoencoder"]), "autoencoder_step": "7",
            "autoencoder_kind": "autoencoder", "autoencoder_recipe": "a recipe",
            "autoencoder_layout": "MONAI",
        }  # fmt: skip

    def test_the_last_checkpoint_or_the_one_named(self, runs, folder):
        ldm_run(runs["unet"], "diffusion", step=9, seed=5, scale=1.0)
        last = release.add("last", runs, folder).network("unet").state_dict()
        torch.testing.assert_close(last, state_of(LDM, "unet", 5), rtol=0, atol=0)
        named = {**runs, "unet": runs["unet"] / "step-000000007.pt"}
        first = release.add("first", named, folder)
        assert first.source["unet_step"] == "7"
        torch.testing.assert_close(
            first.network("unet").state_dict(), state_of(LDM, "unet"), rtol=0, atol=0
        )

    def test_averages_are_preferred(self, runs, folder):
        ldm_run(runs["unet"], "diffusion", step=9, average=True, scale=1.0)
        found = release.add("mine", runs, folder).network("unet").state_dict()
        torch.testing.assert_close(found, state_of(LDM, "unet", 100), rtol=0, atol=0)

    def test_the_autoencoder_of_its_run_replaces_the_system_s(self, runs, folder):
        wider = changed(LDM, "autoencoder", channels=[8, 16, 16, 24])
        ldm_run(runs["autoencoder"], "autoencoder", preset=wider, step=9)
        found = release.add("mine", runs, folder)
        assert found.preset == wider
        found.network("autoencoder")

    def test_a_file_and_a_run(self, runs, folder, tmp_path):
        file = tmp_path / "published.pt"
        torch.save({"model": state_of(LDM, "autoencoder")}, file)
        mixed = release.add("mixed", {**runs, "autoencoder": file}, folder)
        assert mixed.source["autoencoder"] == str(file)
        assert mixed.digest == release.add("mine", runs, folder).digest

    def test_a_run_and_a_file(self, runs, folder, tmp_path):
        torch.save(state_of(LDM, "unet"), tmp_path / "unet.pt")
        given = {**runs, "unet": tmp_path / "unet.pt"}
        found = release.add("mixed", given, folder, preset=LDM, target="velocity")
        assert found.target == "velocity"
        state = found.network("autoencoder").state_dict()
        torch.testing.assert_close(state, state_of(LDM, "autoencoder"), rtol=0, atol=0)

    def test_pixel_runs_need_no_autoencoder(self, folder, tmp_path):
        run = ldm_run(tmp_path / "pixel", "pixel", preset=MEDFORJ, scale=1.0)
        found = release.add("pixel", {"unet": run}, folder, target="velocity")
        volume = PixelDiffusion(found, Options(steps=2)).sample(pd.DataFrame({"seed": [1]}))
        assert volume.shape == (1, 1, *MEDFORJ.shape)

    def test_what_the_trainer_really_writes(self, runs, folder, tmp_path):
        small = changed(LDM, "unet", channels=[8, 8, 8], num_head_channels=[0, 8, 8])
        latent = {"mean": torch.ones(3, 4, 8, 4), "sigma": torch.full((3, 4, 8, 4), 0.1),
                  "condition": torch.zeros(4)}  # fmt: skip
        chosen = settings({
            "kind": "diffusion", "system": small.model_dump(mode="json"), "steps": 1,
            "learning_rate": 1e-3, "average": 0.9, "latent_scale": 0.5, "precision": "float32",
        })  # fmt: skip
        run = Run(DiffusionTask(chosen), [latent], chosen, tmp_path / "run")
        list(run.advance())
        found = release.add("mine", {**runs, "unet": tmp_path / "run"}, folder)
        assert found.source["unet_latent_scale"] == "0.5"
        state = found.network("unet").state_dict()
        torch.testing.assert_close(state, run.weights("unet"), rtol=0, atol=0)

    def test_files_alone_are_added_as_before(self, folder, tmp_path):
        torch.save(state_of(MEDFORJ, "unet"), tmp_path / "ema.pt")
        found = release.add("pixel", {"unet": tmp_path / "ema.pt"}, folder, preset=MEDFORJ)
        assert found.source["unet"] == str(tmp_path / "ema.pt")


def spoil(runs, how, tmp_path):
    """Change runs so that they are no generator; what to give besides."""
    unet, autoencoder = runs["unet"], runs["autoencoder"]
    if how == "swapped":
        runs["unet"], runs["autoencoder"] = autoencoder, unet
    elif how == "given alone":
        runs["unet"] = runs.pop("autoencoder")
    elif how == "two of a kind":
        runs["autoencoder"] = unet
    elif how == "no checkpoint":
        (unet / "step-000000007.pt").unlink()
    elif how == "no run":
        (unet / "settings.json").unlink()
    elif how == "gone":
        runs["unet"] = unet / "step-000000008.pt"
    elif how == "damaged":
        (unet / "step-000000007.pt").write_bytes(b"half")
    elif how == "not of a run":
        torch.save({"model": {}}, unet / "step-000000009.pt")
    elif how == "unknown kind":
        ldm_run(unet, "segmentation", step=9)
    elif how == "scale":
        ldm_run(unet, "diffusion", step=9, scale=float("nan"))
    elif how == "channels":
        four = changed(LDM, "autoencoder", latent_channels=4)
        ldm_run(autoencoder, "autoencoder", preset=four, step=9)
    elif how == "reduction":
        two = changed(LDM, "autoencoder", channels=[8, 16], num_res_blocks=[1, 1],
                      attention_levels=[False, False])  # fmt: skip
        ldm_run(autoencoder, "autoencoder", preset=two, step=9)
    elif how == "volumes":
        small = LDM.model_copy(update={"shape": (32, 32, 32)})
        ldm_run(autoencoder, "autoencoder", preset=small, step=9)
    elif how == "no covariates":
        ldm_run(unet, "diffusion", preset=changed(LDM, "unet", in_channels=3), step=9, scale=1.0)
    elif how == "pixel and autoencoder":
        ldm_run(unet, "pixel", preset=MEDFORJ, step=9)
    elif how == "latent alone":
        del runs["autoencoder"]
    elif how == "weights of another system":
        other = {"unet": {"conv_in.conv.bias": torch.zeros(5)}}
        ldm_run(unet, "diffusion", step=9, scale=1.0, modules=other)
    asked = {"other preset": {"preset": "ukb-ldm"}, "other target": {"target": "velocity"}}
    return asked.get(how, {})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "swapped",
            "kind 'diffusion', expected 'autoencoder' for --autoencoder; give it as --diff",
        ),
        ("given alone", "kind 'autoencoder', expected 'diffusion' or 'pixel' for --diffusion"),
        ("two of a kind", "kind 'diffusion', expected 'autoencoder' for --autoencoder"),
        ("no checkpoint", "has no checkpoint yet, expected step-.*train on"),
        ("no run", "is no training run: it holds no settings.json"),
        ("gone", "cannot read .*step-000000008.pt"),
        ("damaged", "cannot read .*step-000000007.pt"),
        ("not of a run", "is no checkpoint of a training run .* found model, expected step"),
        ("unknown kind", "kind 'segmentation', expected one of autoencoder, diffusion, pixel"),
        ("scale", "multiplied by nan, expected a positive number"),
        ("channels", r"latents of \(4, 4, 8, 4\), and the U-Net draws 3 channels of \(3, 4, 8, 4"),
        ("reduction", r"latents of \(3, 16, 32, 16\), and the U-Net draws"),
        ("volumes", r"trained for volumes of \(32, 32, 32\), and .* has \(32, 64, 32\)"),
        ("no covariates", "takes 3 channels, expected 3 to draw and 4 covariates"),
        ("pixel and autoencoder", "pixel system, which has no autoencoder"),
        ("latent alone", "needs its autoencoder too"),
        ("weights of another system", r"is no unet of this system: layout unknown, of \d+ keys"),
        ("other preset", "another system than --preset: networks, shape, latent_shape differ"),
        ("other target", "predicts 'epsilon', found --target 'velocity'"),
    ],
)
def test_what_does_not_fit_is_told_and_harms_nothing(runs, folder, how, message, tmp_path):
    good = release.add("mine", runs, folder)
    asked = spoil(runs, how, tmp_path)
    with pytest.raises(WeightsError, match=message) as caught:
        release.add("mine", runs, folder, **asked)
    assert "\n" not in str(caught.value)
    assert weights.load("mine", folder) == good
    assert len(list((folder / "mine").iterdir())) == 3


class TestGans:
    @pytest.fixture
    def run(self, tmp_path):
        return make_run(tmp_path / "lsgan", "lsgan", preset=narrow("lsgan"), average=True)

    def test_a_run_is_a_generator(self, run, folder):
        found = release.add("gan", {"generator": run}, folder)
        assert found.preset == narrow("lsgan")
        assert found.source == {
            "generator": str(run), "generator_step": "7", "generator_kind": "lsgan",
            "generator_recipe": "a recipe", "generator_layout": "synthbrain",
        }  # fmt: skip
        state = found.network("generator").state_dict()
        expected = state_of(narrow("lsgan"), "generator", 100)
        torch.testing.assert_close(state, expected, rtol=0, atol=0)
        volume = GanGenerator(found).sample(pd.DataFrame({"seed": [1]}))
        assert volume.shape == (1, 1, 16, 16, 16)

    @pytest.mark.parametrize("kind", ["vae-gan", "lsgan"])
    def test_what_the_trainers_really_write(self, folder, tmp_path, kind):
        run, _ = trainers.trained(kind, tmp_path / "run", steps=1)
        found = release.add("gan", {"generator": tmp_path / "run"}, folder)
        state = found.network("generator").state_dict()
        torch.testing.assert_close(state, run.weights("generator"), rtol=0, atol=0)

    def test_what_does_not_fit_is_told(self, run, folder, tmp_path):
        ldm = ldm_run(tmp_path / "diffusion", "diffusion", scale=1.0)
        for paths, asked, message in (
            ({"unet": run}, {}, "'lsgan', expected 'diffusion' or 'pixel' for --diffusion; give it "
                                "as --generator"),
            ({"generator": ldm}, {}, "expected 'vae-gan' or 'lsgan' for --generator; give it as"),
            ({"generator": run, "unet": ldm}, {}, "a GAN is its generator alone"),
            ({"generator": run}, {"preset": "ukb-ldm"}, "another system than --preset: system, "),
            ({"generator": run}, {"target": "flow"}, "a GAN has no target, found 'flow'"),
        ):  # fmt: skip
            with pytest.raises(WeightsError, match=message) as caught:
                release.add("gan", paths, folder, **asked)
            assert "\n" not in str(caught.value)
        assert not (folder / "gan").exists()
