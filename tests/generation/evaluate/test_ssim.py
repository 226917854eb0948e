import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from generation.errors import EvaluationError
from generation.evaluate.multiscale import WEIGHTS, Window, pyramid
from generation.evaluate.ssim import Ssim, ms_ssim, ssim

SHAPE = (112, 128, 112)


def volumes(count, shape=SHAPE, seed=0):
    """Blobs with noise, in [0, 1], dark outside."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, *(max(2, side // 8) for side in shape), generator=draw)
    image = torch.nn.functional.interpolate(coarse, size=shape, mode="trilinear")
    image = image + 0.05 * torch.randn(image.shape, generator=draw)
    image[..., : shape[2] // 4] = 0
    return image.clamp(0, 1)


@pytest.fixture(scope="module")
def couple():
    first = volumes(2)
    return first, (0.7 * first + 0.3 * volumes(2, seed=1)).clamp(0, 1)


def halved(v):
    """Means over 2 x 2 x 2 voxels; an odd voxel at the end is left out."""
    a, b, c = (side // 2 for side in v.shape)
    return v[: 2 * a, : 2 * b, : 2 * c].reshape(a, 2, b, 2, c, 2).mean((1, 3, 5))


def in_float64(x, y, *, scales=5, weights=WEIGHTS):
    """By SciPy, from the definition; window 7, sigma 1.5."""

    def smooth(v):
        v = ndimage.gaussian_filter(v, 1.5, radius=3)
        return v[3:-3, 3:-3, 3:-3]

    x, y, found = x.astype(np.float64), y.astype(np.float64), 1.0
    for scale in range(scales):
        mx, my = smooth(x), smooth(y)
        vx, vy, xy = (smooth(a * b) - m for a, b, m in
                      ((x, x, mx * mx), (y, y, my * my), (x, y, mx * my)))  # fmt: skip
        terms = (2 * xy + 9e-4) / (vx + vy + 9e-4)
        if scale == scales - 1:
            terms = terms * (2 * mx * my + 1e-4) / (mx * mx + my * my + 1e-4)
        found *= max(terms.mean(), 0) ** weights[scale]
        x, y = halved(x), halved(y)
    return found


def test_both_are_what_the_definition_says(couple):
    first, second = couple
    found, single = ms_ssim(first, second), ssim(first, second)
    for i in range(2):
        x, y = first[i, 0].numpy(), second[i, 0].numpy()
        assert found[i].item() == pytest.approx(in_float64(x, y), abs=2e-6)
        assert single[i].item() == pytest.approx(in_float64(x, y, scales=1, weights=[1]), abs=2e-6)


def test_as_pytorch_msssim(couple):
    couple = [volume[:1] for volume in couple]
    peer = pytest.importorskip("pytorch_msssim")
    settings = {"data_range": 1.0, "win_size": 7, "win_sigma": 1.5, "size_average": False}
    torch.testing.assert_close(
        ms_ssim(*couple), peer.ms_ssim(*couple, **settings), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(ssim(*couple), peer.ssim(*couple, **settings), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_as_monai():
    from monai.metrics import MultiScaleSSIMMetric

    first, second = volumes(1, (160, 224, 160)), volumes(1, (160, 224, 160), seed=1)
    peer = MultiScaleSSIMMetric(3, kernel_size=7, reduction="none")
    torch.testing.assert_close(ms_ssim(first, second), peer(first, second)[:, 0], atol=1e-5, rtol=0)


def test_constant_volumes_differ_in_luminance_alone():
    """0.25 and 0.5: no variance, so that SSIM is (2 * 0.125 + 1e-4) / (0.0625 + 0.25 + 1e-4)."""
    first, second = (torch.full((1, 1, 9, 9, 9), value) for value in (0.25, 0.5))
    assert ssim(first, second).item() == pytest.approx(0.2501 / 0.3126, abs=1e-5)


def test_a_window_of_one_voxel_knows_luminance_alone():
    """Voxels 0 and 1 against 1 and 1: the mean of 1e-4 / 1.0001 and 1."""
    first, second = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1, 1), torch.ones(1, 1, 2, 1, 1)
    found = ssim(first, second, window=Window(1, 1.0)).item()
    assert found == pytest.approx((1e-4 / 1.0001 + 1) / 2, abs=1e-6)


@given(seed=st.integers(0, 1000), shape=st.tuples(*[st.integers(7, 20)] * 3))
def test_symmetric_one_for_the_same_and_within_bounds(seed, shape):
    first, second = torch.rand(2, 1, 1, *shape, generator=torch.Generator().manual_seed(seed))
    found = ssim(first, second)
    assert torch.equal(found, ssim(second, first))
    assert -1 <= found.item() < 1
    assert ssim(first, first).item() == pytest.approx(1, abs=1e-6)
    half = ssim(first / 2, second / 2, data_range=0.5)
    torch.testing.assert_close(half, found, atol=1e-5, rtol=0)


def test_opposites_are_below_nothing_over_scales():
    first = volumes(1)
    assert ssim(first, 1 - first).item() < 0
    assert ms_ssim(first, 1 - first).item() == 0


def test_the_batch_makes_no_difference(couple):
    first, second = couple
    whole = ms_ssim(first, second)
    alone = torch.cat([ms_ssim(first[i : i + 1], second[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(whole, alone, atol=1e-6, rtol=0)


def test_prepared_volumes_serve_many_pairs(couple):
    measure = Ssim()
    first, second = (measure.prepare(volume) for volume in couple)
    for _ in range(2):
        found = measure.compare(first, second)
        assert torch.equal(found["ms-ssim"], ms_ssim(*couple))
        assert torch.equal(found["ssim"], ssim(*couple))


def test_full_size_fits_five_scales():
    levels = pyramid(torch.zeros(1, 1, 160, 224, 160), 5, Window())
    assert [tuple(level.shape[1:]) for level in levels][-1] == (10, 14, 10)


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ((1, 1, 111, 120, 112), None, r"\(111, 120, 112\) voxels are too small.*at least 112"),
        ((1, 112, 112, 112), None, r"expected \(n, 1, x, y, z\)"),
        ((1, 2, 112, 112, 112), None, r"expected \(n, 1, x, y, z\)"),
        ((1, 1, 112, 112, 112), (1, 1, 112, 112, 113), "cannot compare volumes of shapes"),
    ],
)
def test_what_does_not_fit_is_refused(first, second, says):
    with pytest.raises(EvaluationError, match=says):
        ms_ssim(torch.zeros(first), torch.zeros(second or first))


def test_voxels_that_are_not_numbers_are_refused():
    volume = torch.zeros(1, 1, 8, 8, 8)
    volume[0, 0, 4, 4, 4] = torch.nan
    with pytest.raises(EvaluationError, match="ssim is not finite"):
        ssim(volume, torch.zeros_like(volume))


@pytest.mark.parametrize("window", [(6, 1.5), (7, 0.0), (-1, 1.0)])
def test_windows_that_cannot_be(window):
    with pytest.raises(EvaluationError, match="cannot be"):
        Window(*window)


@pytest.mark.parametrize("options", [{"weights": ()}, {"data_range": 0.0}])
def test_settings_that_cannot_be(options):
    with pytest.raises(EvaluationError, match="expected a weight a scale and a range above 0"):
        Ssim(**options)
