"""GANs: networks and what is sampled with them."""

import pickle

import pandas as pd
import pytest
import torch

from generation import weights
from generation.bundle import export
from generation.errors import WeightsError
from generation.gan import GanGenerator, operations
from generation.latent import LatentDiffusion
from generation.options import Options
from generation.presets import load_preset, read_preset
from generation.testing import RandomWeights, narrow, random_network
from synthbrain.testing import check_generator

NAMES = ("vae-gan", "lsgan")
ROWS = pd.DataFrame({"seed": [3, 1, 2]})
CPU = Options(device="cpu")


def gan(seed=0, **options):
    return GanGenerator(RandomWeights(narrow("lsgan"), seed=seed), Options(device="cpu", **options))


@pytest.mark.parametrize("name", NAMES)
def test_full_size_shapes(name):
    preset = load_preset(name)
    assert preset.shape == (160, 224, 160)
    assert preset.affine == load_preset("ukb-ldm").affine
    made = preset.build("generator")(torch.empty(2, 1024, device="meta"))
    assert made.shape == (2, 1, 160, 224, 160)
    scores, seen = preset.build("discriminator").look(made, "layer3")
    assert (scores.shape, seen.shape) == ((2,), (2, 256, 20, 28, 20))
    if name == "vae-gan":
        mean, variance = preset.build("encoder")(made)
        assert mean.shape == variance.shape == (2, 1024)


def test_operations_are_those_of_the_convolutions():
    from torch.utils.flop_counter import FlopCounterMode

    preset = load_preset("lsgan")
    with FlopCounterMode(display=False) as counted:
        preset.build("generator")(torch.empty(1, 1024, device="meta"))
    assert operations(preset) == pytest.approx(counted.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("network", ["generator", "encoder", "discriminator"])
@torch.inference_mode()
def test_samples_of_a_batch_do_not_touch_each_other(network):
    module = random_network(narrow("vae-gan"), network, dtype=torch.float64)
    size = (8,) if network == "generator" else (1, 16, 16, 16)
    source = torch.Generator().manual_seed(1)
    x = torch.randn(3, *size, generator=source, dtype=torch.float64)
    whole, alone = module.train()(x), [module.eval()(one[None]) for one in x]
    if network == "encoder":
        whole, alone = torch.cat(whole, 1), [torch.cat(pair, 1) for pair in alone]
    assert whole.dtype == torch.float64
    torch.testing.assert_close(whole, torch.cat(alone), rtol=1e-12, atol=1e-12)


def test_new_discriminators_start_small():
    from generation.train.networks import new_network

    judge = new_network(narrow("lsgan"), "discriminator", 0)
    values = judge.layers["layer2"].conv.weight.detach()
    assert abs(float(values.mean())) < 2e-3
    assert float(values.std()) == pytest.approx(0.02, rel=0.1)


def test_a_gan_is_a_generator():
    check_generator(gan())


def test_seeds_decide_and_batches_do_not():
    generator = gan()
    volumes = generator.sample(ROWS)
    assert volumes.shape == (3, 1, 16, 16, 16)
    assert volumes.dtype == torch.float32
    for place in range(3):
        assert torch.equal(generator.sample(ROWS.iloc[[place]])[0], volumes[place])
    assert not torch.equal(volumes[0], volumes[1])
    assert generator.sample(ROWS.iloc[:0]).shape == (0, 1, 16, 16, 16)
    assert generator.report["ms_per_volume"] > 0
    assert generator.seconds_per_volume == generator.report["ms_per_volume"] / 1e3


def test_noise_is_one_plain_draw():
    """So that whoever has the weights can make the same volume with PyTorch alone."""
    noise = torch.randn(8, generator=torch.Generator().manual_seed(3))
    network = random_network(narrow("lsgan"), "generator")
    torch.testing.assert_close(gan().sample(ROWS)[0], network(noise[None])[0], rtol=0, atol=1e-6)


def test_the_digest_changes_with_weights_and_type_alone():
    digests = {
        gan().digest, gan(1).digest, gan(dtype="bfloat16").digest,
        GanGenerator(RandomWeights(narrow("vae-gan")), CPU).digest,
    }  # fmt: skip
    assert len(digests) == 4
    assert gan().digest == gan(dtype="float32").digest == gan(steps=3).digest
    assert gan().provenance["dtype"] == "float32"


def test_it_travels_to_other_processes():
    other = pickle.loads(pickle.dumps(gan()))
    assert other.digest == gan().digest
    assert torch.equal(other.sample(ROWS), gan().sample(ROWS))


def test_systems_are_not_mixed_up():
    with pytest.raises(ValueError, match="is a latent system, expected a gan one"):
        GanGenerator(RandomWeights(narrow("ukb-ldm")))
    with pytest.raises(ValueError, match="is a gan system, expected a latent one"):
        LatentDiffusion(RandomWeights(narrow("lsgan")))


def test_presets_of_unknown_systems_are_refused():
    with pytest.raises(ValueError, match="system"):
        read_preset({"system": "flow"})
    wrong = narrow("lsgan").model_dump()
    wrong["networks"]["critic"] = wrong["networks"].pop("generator")
    with pytest.raises(ValueError, match="a GAN has no network 'critic'"):
        read_preset(wrong)


def test_the_generator_alone_is_installed(tmp_path):
    preset = narrow("vae-gan")
    state = random_network(preset, "generator").state_dict()
    found = weights.add("gan", {"generator": state}, tmp_path, preset=preset)
    assert weights.load("gan", tmp_path).preset == preset
    assert (found.target, set(found.files)) == ("", {"generator"})
    assert found.source["generator_layout"] == "synthbrain"
    torch.testing.assert_close(found.network("generator").state_dict(), state, rtol=0, atol=0)
    with pytest.raises(WeightsError, match="a GAN has no target, found 'flow'"):
        weights.add("gan", {"generator": state}, tmp_path, preset=preset, target="flow")
    with pytest.raises(WeightsError, match="no generator of this system: layout unknown"):
        weights.add("gan", {"generator": {"x": torch.zeros(1)}}, tmp_path, preset=preset)


def test_a_gan_is_no_bundle(tmp_path):
    with pytest.raises(WeightsError, match="gan system, expected a latent or pixel one"):
        export(RandomWeights(narrow("lsgan")), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
