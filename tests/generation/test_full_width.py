"""The published latent diffusion system at its full width and size, with random weights.

Needs 12 GB of memory, 6 GB of disk and some minutes: run with ``-m slow``.
"""

import pytest
import torch

from generation import weights
from generation.engine import prepare
from generation.latent import LatentDiffusion
from generation.options import Options
from generation.presets import load_preset
from synthbrain import SynthBrainDataset
from synthbrain.generators import StandInWarning, weights_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

PRESET = load_preset("ukb-ldm")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home with weights installed from checkpoints of the older package, as published."""
    from generative.networks.nets import AutoencoderKL, DiffusionModelUNet

    folder, files = tmp_path_factory.mktemp("home"), {}
    for name, kind in (("autoencoder", AutoencoderKL), ("unet", DiffusionModelUNet)):
        spec = dict(PRESET.networks[name])
        spec["num_channels"] = spec.pop("channels")
        torch.manual_seed(0)
        module = kind(**spec)
        for value in module.parameters():  # the last convolutions start at zero
            if not value.any() and value.ndim > 1:
                torch.nn.init.normal_(value, std=0.02)
        files[name] = folder / f"{name}.pt"
        torch.save(module.state_dict(), files[name])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYNTHBRAIN_HOME", str(folder))
        weights.add("ukb-ldm", files, weights_folder())
        for file in files.values():
            file.unlink()
        yield folder


@pytest.fixture(scope="module")
def installed(home):
    return weights.load("ukb-ldm", weights_folder())


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@torch.inference_mode()
def test_a_step_equals_monai(installed):
    from monai.networks.schedulers import DDIMScheduler

    unet = installed.network("unet")
    x = torch.randn((1, 3, 20, 28, 20), generator=torch.Generator().manual_seed(0))
    values = torch.tensor([[1.0, 0.7, 0.7, 0.5]])
    maps = values[:, :, None, None, None].expand(-1, -1, 20, 28, 20)
    scheduler = DDIMScheduler(
        1000, "scaled_linear_beta", clip_sample=False, beta_start=0.0015, beta_end=0.0205
    )
    scheduler.set_timesteps(50)
    output = unet(torch.cat([x, maps], 1), torch.tensor([980]), context=values[:, None])
    expected, _ = scheduler.step(output, 980, x)
    found = {}
    for rewrite, dtype in ((False, "float32"), (True, "float32"), (True, "bfloat16")):
        options = Options.published(PRESET, rewrite=rewrite, dtype=dtype, device="cpu")
        denoiser = prepare(unet, PRESET, "epsilon", options, constants=4)
        clean = denoiser(x, 0, denoiser.network.condition(values, (20, 28, 20)))
        solution = denoiser.solution
        found[rewrite, dtype] = float(solution.keep[0]) * x + float(solution.carry[0, 0]) * clean
        del denoiser
    assert relative(found[False, "float32"], expected) <= 1e-5
    assert relative(found[True, "float32"], expected) <= 1e-5
    assert relative(found[True, "bfloat16"], expected) < 0.05


@torch.inference_mode()
def test_decoding_equals_monai(installed):
    latent = torch.randn((1, 3, 20, 28, 20), generator=torch.Generator().manual_seed(0))
    ldm = LatentDiffusion(installed, Options(dtype="float32", device="cpu"))
    whole = ldm._decoder(latent)
    assert relative(ldm._decoder.in_slabs(latent), whole) <= 1e-4
    expected = installed.network("autoencoder").decode(latent)
    assert relative(whole, expected) <= 1e-5


def test_a_cohort_is_streamed_end_to_end(home):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error", StandInWarning)
        ds = SynthBrainDataset(split="train", sex="male", limit=1)  # auto: weights are here
    sample = ds[0]
    assert sample["image"].shape == (1, 160, 224, 160)
    assert sample["made_by"].startswith("ukb-ldm-")
    assert 0 <= sample["image"].min() <= sample["image"].max() <= 1
    assert ds.missing() == []
    assert any((home / "store").glob("*/ukb-ldm-*/volumes/block-*/c.*"))
