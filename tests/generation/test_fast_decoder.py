import copy

import pytest
import torch

from generation import layers
from generation.fast_decoder import FastDecoder
from generation.testing import narrow, random_network

LATENT = (3, 3, 4, 2)


def latents(n=1, dtype=torch.float64):
    return torch.randn(
        (n, *LATENT), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(dtype)


def relative(found, expected):
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def autoencoder():
    return random_network(narrow("ukb-ldm"), "autoencoder", dtype=torch.float64)


@pytest.fixture(scope="module")
def expected(autoencoder):
    with torch.inference_mode():
        return autoencoder.decode(latents())


def decoder(autoencoder, dtype):
    exact = torch.promote_types(dtype, torch.float32)
    return FastDecoder(copy.deepcopy(autoencoder).to(exact), dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
class TestAgainstMonai:
    def test_whole(self, autoencoder, expected, dtype, limit):
        found = decoder(autoencoder, dtype)(latents())
        assert found.dtype == dtype
        assert relative(found, expected) < limit

    @pytest.mark.parametrize("slab_bytes", [1, 20_000, 10**9])
    def test_in_slabs(self, autoencoder, expected, dtype, limit, slab_bytes):
        fast = decoder(autoencoder, dtype)
        found = fast.in_slabs(latents(), slab_bytes=slab_bytes)
        assert found.dtype == dtype
        assert relative(found, expected) < limit


def test_a_large_offset_does_not_harm_the_statistics(autoencoder):
    """The variance is not a difference of large numbers."""
    fast = decoder(autoencoder, torch.float32)
    with torch.inference_mode():
        z = latents() * 1e-3 + 1e3
        assert relative(fast.in_slabs(z, slab_bytes=5000), autoencoder.decode(z)) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_of_large_tensors_are_exact(dtype):
    """PyTorch's own loses a thousandth here."""
    source = torch.Generator().manual_seed(0)
    x = torch.randn((2, 4, 150, 150, 150), generator=source) + 3
    norm = torch.nn.GroupNorm(2, 4).requires_grad_(False).double()
    norm.weight.copy_(torch.rand(4, generator=source) + 0.5)
    expected = torch.nn.functional.silu(norm(x.double()))
    exact = layers.Norm(norm.to(dtype))
    found = exact(x.to(dtype, memory_format=torch.channels_last_3d), activate=True)
    assert relative(found, expected) < 1e-6


def test_rows_do_not_mix(autoencoder):
    fast = decoder(autoencoder, torch.float32)
    z = latents(3)
    together = fast(z)
    for i in range(3):
        assert relative(together[i : i + 1], fast(z[i : i + 1]).double()) < 1e-5


def test_progress_and_refusals(autoencoder):
    fast, seen = decoder(autoencoder, torch.float32), []
    fast.in_slabs(latents(), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, 11) for i in range(11)]
    with pytest.raises(ValueError, match="one latent at a time, found 2"):
        fast.in_slabs(latents(2))


def test_attention_is_refused():
    preset = narrow("ukb-ldm")
    spec = {**preset.networks["autoencoder"], "with_decoder_nonlocal_attn": True}
    preset = preset.model_copy(update={"networks": {"autoencoder": spec}})
    with pytest.raises(ValueError, match="SpatialAttentionBlock cannot be prepared"):
        FastDecoder(random_network(preset, "autoencoder"), dtype=torch.float32)
