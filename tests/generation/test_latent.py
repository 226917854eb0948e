import pickle

import numpy as np
import pandas as pd
import pytest
import torch

from generation.covariates import NAMES, CovariateError, conditioning
from generation.latent import LatentDiffusion
from generation.options import Options
from generation.pixel import PixelDiffusion
from generation.testing import RandomWeights, narrow, random_network
from synthbrain.testing import check_generator

FLOAT32 = Options(dtype="float32", steps=6)


def rows(n=4, seed=0):
    draw = np.random.default_rng(seed)
    table = pd.DataFrame({name: draw.random(n) for name in NAMES})
    table["seed"] = draw.integers(0, 2**62, n)
    return table


def published_chain(weights, table, steps=50):
    """MONAI's networks and its DDIM scheduler, one volume at a time, as the bundle drives them."""
    from monai.networks.schedulers import DDIMScheduler

    unet, autoencoder = weights.network("unet"), weights.network("autoencoder")
    scheduler = DDIMScheduler(
        1000, "scaled_linear_beta", clip_sample=False, beta_start=0.0015, beta_end=0.0205
    )
    scheduler.set_timesteps(steps)
    # MONAI 1.6 spaces them evenly over 0..999; the bundle was published with multiples of 20.
    times = torch.arange(steps - 1, -1, -1) * (1000 // steps)
    for seed, vector in zip(table["seed"], conditioning(table), strict=True):
        source = torch.Generator().manual_seed(int(seed))
        x = torch.randn(weights.preset.latent_shape, generator=source)[None]
        values = torch.tensor(vector)[None]
        maps = values[:, :, None, None, None].expand(-1, -1, *x.shape[2:])
        for t in times:
            output = unet(torch.cat([x, maps], 1), t[None], context=values[:, None])
            x, _ = scheduler.step(output, int(t), x)
        yield x, autoencoder.decode(x)


@pytest.fixture(scope="module")
def published():
    """Weights, rows, and the latent and the volume of each as published."""
    weights, table = RandomWeights(narrow("ukb-ldm")), rows(2)
    with torch.inference_mode():
        return weights, table, list(published_chain(weights, table))


@pytest.mark.parametrize("rewrite", [False, True])
@torch.inference_mode()
def test_the_whole_published_chain_equals_monai(published, rewrite):
    weights, table, expected = published
    options = Options.published(weights.preset, rewrite=rewrite)
    ours = LatentDiffusion(weights, options)
    latents = ours.sample_latents(table)
    for i, (latent, volume) in enumerate(expected):
        scale = latent.abs().max()
        assert (latents[i] - latent[0]).abs().max() <= 1e-5 * scale
        found = ours.decode(latents[i : i + 1])
        assert (found - volume.clamp(0, 1)).abs().max() <= 1e-5 * max(1, volume.abs().max())


def test_volumes_do_not_depend_on_their_batch():
    table = rows(6)
    one = LatentDiffusion(RandomWeights(narrow("ukb-ldm")), Options(dtype="float32", steps=3))
    fours = LatentDiffusion(
        RandomWeights(narrow("ukb-ldm")), Options(dtype="float32", steps=3, batch_size=4)
    )
    alone = torch.cat([one.sample(table.iloc[[i]]) for i in range(6)])
    assert (fours.sample(table) - alone).abs().max() < 1e-4
    order = np.random.default_rng(1).permutation(6)
    assert (fours.sample(table.iloc[order]) - alone[order]).abs().max() < 1e-4
    assert alone.std(0).max() > 1e-2  # and they do differ


def test_half_precision_stays_close():
    table = rows(1)
    exact = LatentDiffusion(RandomWeights(narrow("ukb-ldm")), FLOAT32).sample(table)
    half = LatentDiffusion(
        RandomWeights(narrow("ukb-ldm")), Options(dtype="bfloat16", steps=6)
    ).sample(table)
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().mean() < 0.03


def solved_by(solver, **options):
    options = Options(solver, 3, dtype="float32", **options)
    return LatentDiffusion(RandomWeights(narrow("ukb-ldm")), options)


_SLOW = [
    pytest.param(solver, marks=pytest.mark.slow) for solver in ("ddim", "dpm++", "euler", "heun")
]


@pytest.mark.parametrize("solver", ["ddpm", "unipc", *_SLOW])
def test_it_is_a_generator_whatever_the_solver(solver):
    check_generator(solved_by(solver))


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpm++", "unipc", "euler", "heun"])
def test_latents_do_not_depend_on_their_batch_whatever_the_solver(solver):
    table = rows(3)
    one, batches = solved_by(solver), solved_by(solver, batch_size=2)
    alone = torch.cat([one.sample_latents(table.iloc[[i]]) for i in range(3)])
    assert torch.isfinite(alone).all()
    assert (batches.sample_latents(table) - alone).abs().max() < 1e-5 * alone.abs().max()


class TestCovariates:
    def test_volumes_follow_them_also_beyond_the_trained_range(self):
        table = pd.concat([rows(1)] * 3, ignore_index=True)
        table["ventricular_volume"] = [0.5, 1.0, 1.9]
        near, far, beyond = LatentDiffusion(RandomWeights(narrow("ukb-ldm")), FLOAT32).sample(table)
        assert (near - far).abs().max() > 1e-3
        assert (far - beyond).abs().max() > 1e-3

    def test_missing_ones_are_refused(self):
        with pytest.raises(CovariateError, match="age"):
            LatentDiffusion(RandomWeights(narrow("ukb-ldm")), FLOAT32).sample(
                rows().drop(columns="age")
            )

    def test_no_rows_give_no_volumes(self):
        ldm = LatentDiffusion(RandomWeights(narrow("ukb-ldm")), FLOAT32)
        assert ldm.sample(rows(0)).shape == (0, 1, *ldm.shape)
        assert ldm.sample_latents(rows(0)).shape == (0, *ldm.latent_shape)


class TestIdentity:
    def test_digest_follows_what_changes_the_voxels(self):
        def digest(weights=None, **options):
            return LatentDiffusion(
                weights or RandomWeights(narrow("ukb-ldm")), Options(**options)
            ).digest

        assert digest(dtype="float32") == digest(dtype="float32", batch_size=3, graphs=False)
        found = {
            digest(dtype="float32"),
            digest(dtype="bfloat16"),
            digest(dtype="float32", steps=21),
            digest(dtype="float32", solver="dpm++"),
            digest(dtype="float32", spacing="trailing"),
            digest(RandomWeights(narrow("ukb-ldm"), seed=1), dtype="float32"),
        }
        assert len(found) == 6

    def test_provenance_names_weights_sampler_and_versions(self):
        found = LatentDiffusion(RandomWeights(narrow("ukb-ldm")), FLOAT32).provenance
        assert found["weights"] == "random"
        assert (found["solver"], found["steps"], found["dtype"]) == ("unipc", "6", "float32")
        assert found["torch"] == torch.__version__
        assert all(isinstance(value, str) for value in found.values())

    def test_it_survives_pickling_without_its_networks(self):
        ldm, table = (
            LatentDiffusion(RandomWeights(narrow("ukb-ldm")), FLOAT32, decode="slabs"),
            rows(1),
        )
        expected = ldm.sample(table)
        data = pickle.dumps(ldm)
        assert len(data) < 10_000
        again = pickle.loads(data)
        assert again.digest == ldm.digest
        assert torch.equal(again.sample(table), expected)


def test_progress_and_report():
    seen = []
    ldm = LatentDiffusion(
        RandomWeights(narrow("ukb-ldm")), FLOAT32, progress=lambda *told: seen.append(told)
    )
    guess = ldm.seconds_per_volume
    ldm.sample(rows(2))
    assert seen[-1] == ("decoding", 2, 2)
    assert [told for told in seen if told[0] == "sampling"] == [
        ("sampling", i + 1, 12) for i in range(12)
    ]
    assert ldm.report["ms_per_step"] > 0
    assert ldm.report["ms_per_decode"] > 0
    assert ldm.report["peak_gb"] > 0.1
    assert ldm.seconds_per_volume != guess


@torch.inference_mode()
def test_encode_gives_the_means_of_the_latents():
    weights = RandomWeights(narrow("ukb-ldm"))
    volumes = torch.rand((2, 1, *weights.preset.shape))
    means, _ = weights.network("autoencoder").encode(volumes)
    found = LatentDiffusion(weights, FLOAT32).encode(volumes)
    assert found.shape == (2, *weights.preset.latent_shape)
    assert (found - means).abs().max() < 1e-4


def test_low_memory_is_chosen_from_the_free_memory(monkeypatch):
    ldm = LatentDiffusion(RandomWeights(narrow("ukb-ldm")), FLOAT32)
    decoder, used = ldm._decoder, []
    in_slabs = decoder.in_slabs
    monkeypatch.setattr(decoder, "in_slabs", lambda z: used.append(1) or in_slabs(z))
    whole = ldm.sample(rows(1))
    assert not used
    monkeypatch.setattr("generation.latent.free_bytes", lambda device: 1000)
    assert (ldm.sample(rows(1)) - whole).abs().max() < 1e-4
    assert used


class TestBackOff:
    """What a GPU does when a batch does not fit, on a CPU that says it is full."""

    def test_batches_are_halved_until_they_fit(self, monkeypatch):
        ldm = LatentDiffusion(
            RandomWeights(narrow("ukb-ldm")), Options(dtype="float32", steps=2, batch_size=8)
        )
        expected = LatentDiffusion(
            RandomWeights(narrow("ukb-ldm")), Options(dtype="float32", steps=2)
        )
        sampler, sizes = ldm._sampler, []
        integrate = sampler._integrate

        def full(seeds, *rest):
            sizes.append(len(seeds))
            if len(seeds) > 2:
                raise torch.cuda.OutOfMemoryError("full")
            return integrate(seeds, *rest)

        monkeypatch.setattr(sampler, "_integrate", full)
        found, wanted = ldm.sample_latents(rows(8)), expected.sample_latents(rows(8))
        assert sizes == [8, 4, 2, 2, 4, 2, 2]
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()

    def test_one_that_does_not_fit_is_an_error(self, monkeypatch):
        ldm = LatentDiffusion(RandomWeights(narrow("ukb-ldm")), FLOAT32)

        def full(*_):
            raise torch.cuda.OutOfMemoryError("full")

        monkeypatch.setattr(ldm._sampler, "_integrate", full)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            ldm.sample(rows(1))


def clean_and_noise(target, x, y, root, rest):
    """The formulas of Remedios et al. 2025, ``root`` and ``rest`` of the signal's share."""
    if target == "epsilon":
        return (x - rest * y) / root, y
    if target == "sample":
        return y, (x - root * y) / rest
    if target == "velocity":
        return root * x - rest * y, root * y + rest * x
    return (x - rest * y) / (root + rest), (x + root * y) / (root + rest)


TESTED_AS_SOLVERS = ("epsilon", "sample", "velocity")
"""Targets whose whole chain test_solvers.py holds against MONAI's."""


class TestPixel:
    @pytest.mark.parametrize(
        "target",
        ["flow", *(pytest.param(t, marks=pytest.mark.slow) for t in TESTED_AS_SOLVERS)],
    )
    @torch.inference_mode()
    def test_published_chain_equals_its_formulas(self, target):
        weights, table = RandomWeights(narrow("medforj"), chosen_target=target), rows(1)
        ours = PixelDiffusion(weights, Options.published(weights.preset))
        fast = PixelDiffusion(weights, Options.published(weights.preset, rewrite=True))
        found, again = ours.sample(table), fast.sample(table)
        unet = random_network(weights.preset, "unet").double()
        betas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
        signal = torch.cumprod(1 - betas, 0)
        for i, seed in enumerate(table["seed"]):
            source = torch.Generator().manual_seed(int(seed))
            x = torch.randn((1, *weights.preset.shape), generator=source)[None].double()
            for t in range(945, -1, -15):
                a = signal[t]
                before = signal[t - 15] if t >= 15 else torch.ones(())
                output = unet(x, torch.tensor([t]))
                x0, eps = clean_and_noise(target, x, output, a.sqrt(), (1 - a).sqrt())
                x = before.sqrt() * x0.clamp(-1, 1) + (1 - before).sqrt() * eps
            expected = ((x[0] + 1) / 2).clamp(0, 1)
            assert (found[i] - expected).abs().max() < 1e-4
            assert (again[i] - expected).abs().max() < 1e-4

    def test_it_is_a_generator_that_honours_nothing(self):
        generator = PixelDiffusion(
            RandomWeights(narrow("medforj")), Options(steps=2, dtype="float32")
        )
        assert generator.honours == frozenset()
        check_generator(generator)

    def test_volumes_do_not_depend_on_their_batch(self):
        table = rows(4)
        options = Options(steps=3, dtype="float32", batch_size=4)
        together = PixelDiffusion(RandomWeights(narrow("medforj")), options).sample(table)
        alone = PixelDiffusion(RandomWeights(narrow("medforj")), Options(steps=3, dtype="float32"))
        for i in range(4):
            assert (alone.sample(table.iloc[[i]])[0] - together[i]).abs().max() < 1e-4

    def test_report_and_pickle(self):
        generator = PixelDiffusion(
            RandomWeights(narrow("medforj")), Options(steps=2, dtype="float32")
        )
        volume = generator.sample(rows(1))
        assert generator.report["ms_per_step"] > 0
        assert torch.equal(pickle.loads(pickle.dumps(generator)).sample(rows(1)), volume)


def test_systems_are_not_mixed_up():
    with pytest.raises(ValueError, match="is a pixel system, expected a latent one"):
        LatentDiffusion(RandomWeights(narrow("medforj")))
    with pytest.raises(ValueError, match="is a latent system, expected a pixel one"):
        PixelDiffusion(RandomWeights(narrow("ukb-ldm")))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"solver": "plms"}, "one of ddim, ddpm"), ({"steps": 0}, "at least 1, found 0")],
)
def test_options_that_make_no_sense(wrong, message):
    with pytest.raises(ValueError, match=message):
        Options(**wrong)


def test_options_take_each_solvers_favourite_spacing():
    preset = narrow("ukb-ldm")
    assert Options("ddim", 10).words()["spacing"] == "trailing"
    assert Options("dpm++", 10).words()["spacing"] == "logsnr"
    assert Options.published(preset).words()["spacing"] == "leading"
    assert Options.published(preset).solution(preset).timesteps[0] == 980


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestGpu:
    """What a machine with a GPU adds to the checks above."""

    @pytest.mark.parametrize("how", [{}, {"graphs": False}, {"compile": True}])
    def test_volumes_equal_the_cpus(self, how):
        table = rows(5)
        cpu = LatentDiffusion(
            RandomWeights(narrow("ukb-ldm")), Options(steps=4, dtype="float32", device="cpu")
        )
        gpu = LatentDiffusion(
            RandomWeights(narrow("ukb-ldm")),
            Options(steps=4, dtype="float32", device="cuda", batch_size=2, **how),
        )
        found, expected = gpu.sample_latents(table).cpu(), cpu.sample_latents(table)
        assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
        assert (gpu.decode(expected).cpu() - cpu.decode(expected)).abs().max() < 1e-2

    def test_slabs_equal_whole(self):
        latents = torch.randn((1, 3, 4, 8, 4), generator=torch.Generator().manual_seed(0))
        whole, slabs = (
            LatentDiffusion(
                RandomWeights(narrow("ukb-ldm")),
                Options(dtype="float32", device="cuda"),
                decode=mode,
            ).decode(latents)
            for mode in ("whole", "slabs")
        )
        assert (whole - slabs).abs().max() < 1e-3
