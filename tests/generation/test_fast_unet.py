import copy

import pytest
import torch
from torch.nn import functional as F

from generation import layers, rewrites
from generation.fast_unet import FastUNet
from generation.presets import Preset
from generation.testing import narrow, random_network

TIMES = [980, 500, 20, 0]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


class TestRewrites:
    """Each against the plain construct, in float64."""

    @pytest.mark.parametrize("size", [(1, 1, 1), (2, 3, 4), (5, 4, 3)])
    def test_upsampling_kernel(self, size):
        x, weight, bias = draw(2, 3, *size), draw(5, 3, 3, 3, 3, seed=1), draw(5, seed=2)
        plain = F.conv3d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)
        kernel = rewrites.upsampling_kernel(weight)
        assert relative(F.conv_transpose3d(x, kernel, bias, stride=2, padding=1), plain) < 1e-13

    @pytest.mark.parametrize("size", [(1, 1, 1), (2, 3, 4), (5, 4, 3)])
    def test_upsampling_in_phases(self, size):
        x, weight, bias = draw(2, 3, *size), draw(5, 3, 3, 3, 3, seed=1), draw(5, seed=2)
        whole = layers.Upsampling(weight, None, torch.float64)(x, bias)
        phases = layers.PhaseUpsampling(weight, None, torch.float64)(x, bias)
        assert relative(phases, whole) < 1e-13
        assert phases.is_contiguous(memory_format=torch.channels_last_3d)

    @pytest.mark.parametrize("parts", [1, 2, 4])
    def test_split_convolution(self, parts):
        x, weight, bias = draw(2, 8, 3, 4, 5), draw(6, 8, 3, 3, 3, seed=1), draw(6, seed=2)
        plain = F.conv3d(x, weight, bias, padding=1)
        split = layers.SplitConvolution(weight, bias, torch.float64, parts)
        assert relative(split(x), plain) < 1e-13
        assert relative(split(x, 0 * bias), F.conv3d(x, weight, padding=1)) < 1e-13

    @pytest.mark.parametrize(("channels", "parts"), [(384, 1), (512, 2), (1280, 4), (1536, 4)])
    def test_convolutions_are_split_by_their_channels(self, channels, parts):
        found = layers.convolution(draw(1, channels, 3, 3, 3), None, torch.float32)
        assert len(getattr(found, "others", [])) + 1 == parts

    @pytest.mark.parametrize("qkv_bias", [False, True])
    def test_single_token_attention(self, qkv_bias):
        from monai.networks.blocks.crossattention import CrossAttentionBlock

        block = CrossAttentionBlock(
            hidden_size=8, num_heads=2, dim_head=4, hidden_input_size=8, context_input_size=4,
            qkv_bias=qkv_bias,
        ).double().eval().requires_grad_(False)  # fmt: skip
        x, context = draw(3, 7, 8), draw(3, 1, 4, seed=1)
        weight, bias = rewrites.single_token_attention(block)
        plain = block(x, context=context)
        assert relative(F.linear(context, weight, bias).expand_as(plain), plain) < 1e-12

    def test_constant_channels(self):
        weight, constants = draw(6, 4, 3, 3, 3), draw(2, 4, seed=1)
        maps = constants[:, :, None, None, None].expand(-1, -1, 3, 5, 2)
        plain = F.conv3d(maps, weight, padding=1)
        assert relative(rewrites.constant_channels(weight, constants, (3, 5, 2)), plain) < 1e-13

    def test_time_table(self):
        from monai.networks.nets.diffusion_model_unet import get_timestep_embedding

        unet = random_network(narrow("ukb-ldm"), "unet", dtype=torch.float64)
        table = rewrites.time_table(unet, torch.tensor(TIMES))
        for row, t in zip(table, TIMES, strict=True):
            embedding = unet.time_embed(get_timestep_embedding(torch.tensor([t]), 16).double())
            assert relative(row, F.silu(embedding)[0]) < 1e-14

    def test_behind_layer_norm_and_stacked(self):
        norm = torch.nn.LayerNorm(6).double().requires_grad_(False)
        norm.weight.data, norm.bias.data = draw(6), draw(6, seed=1)
        linears = [torch.nn.Linear(6, 4).double().requires_grad_(False) for _ in range(3)]
        x = draw(2, 5, 6, seed=2)
        weight, bias = rewrites.behind_layer_norm(norm, rewrites.stacked(linears))
        plain = torch.cat([linear(norm(x)) for linear in linears], -1)
        assert relative(F.linear(F.layer_norm(x, (6,)), weight, bias), plain) < 1e-12

    def test_grouped_norm(self):
        x, weight, bias = draw(2, 8, 3, 4, 5), draw(8, seed=1), draw(8, seed=2)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        found = layers.grouped_norm(x, 4, weight, bias, 1e-6)
        assert relative(found, F.group_norm(x, 4, weight, bias, 1e-6)) < 1e-13
        assert found.is_contiguous(memory_format=torch.channels_last_3d)


@torch.inference_mode()
def compare(preset: Preset, dtype, latent, rows=2):
    """Largest relative difference of the fast and the plain U-Net over some timesteps."""
    unet = random_network(preset, "unet", dtype=torch.float64)
    constants = unet.in_channels - latent[0]
    exact = torch.promote_types(dtype, torch.float32)
    fast = FastUNet(copy.deepcopy(unet).to(exact), TIMES, constants=constants, dtype=dtype)
    x, values = draw(rows, *latent), draw(rows, constants, seed=1).abs()
    extra, vectors = fast.condition(values, latent[1:])
    worst = 0.0
    for i, t in enumerate(TIMES):
        maps = values[:, :, None, None, None].expand(-1, -1, *latent[1:])
        context = values[:, None] if constants else None
        plain = unet(torch.cat([x, maps], 1), torch.tensor([t] * rows), context=context)
        found = fast(x.to(dtype), fast.table[i], extra, vectors)
        worst = max(worst, relative(found.double(), plain))
    return worst


CASES = {"ukb-ldm": (3, 8, 12, 8), "medforj": (1, 32, 16, 16)}


@pytest.mark.parametrize("most_channels", [384, 8])
@pytest.mark.parametrize("name", CASES)
def test_whole_unet_in_float64(name, most_channels, monkeypatch):
    monkeypatch.setattr(layers, "MOST_CHANNELS", most_channels)
    assert compare(narrow(name), torch.float64, CASES[name]) < 1e-10


@pytest.mark.parametrize("name", CASES)
def test_whole_unet_in_float32(name):
    assert compare(narrow(name), torch.float32, CASES[name]) < 1e-4


@pytest.mark.parametrize("name", ["ukb-ldm", pytest.param("medforj", marks=pytest.mark.slow)])
def test_whole_unet_in_bfloat16(name):
    assert compare(narrow(name), torch.bfloat16, CASES[name]) < 0.1


def test_rows_do_not_mix():
    preset = narrow("ukb-ldm")
    unet = random_network(preset, "unet")
    fast = FastUNet(unet, TIMES, constants=4, dtype=torch.float32)
    x, values = draw(3, 3, 4, 8, 4).float(), draw(3, 4, seed=1).float()
    together = fast(x, fast.table[1], *fast.condition(values, x.shape[2:]))
    for i in range(3):
        one = slice(i, i + 1)
        alone = fast(x[one], fast.table[1], *fast.condition(values[one], x.shape[2:]))
        assert relative(together[one], alone) < 1e-5
