import itertools
import math

import numpy as np
import pytest
import torch

from generation.errors import EvaluationError
from generation.evaluate.gradient_ssim import (
    FORMS,
    SCALES,
    GradientSsim,
    gradient,
    gradient_ssim,
    name,
)
from generation.evaluate.multiscale import Window


def literal_gradient(v):
    """Voxel by voxel, from the kernel as it is printed."""
    kernel = np.zeros((3, 3, 3))
    for j, k in itertools.product(range(3), repeat=2):
        weight = 0.1 if (j, k) == (1, 1) else 0.05
        kernel[0, j, k], kernel[2, j, k] = -weight, weight
    kernels = [kernel, kernel.transpose(1, 0, 2), kernel.transpose(1, 2, 0)]
    found = np.zeros([side - 2 for side in v.shape])
    for at in np.ndindex(*found.shape):
        box = v[tuple(slice(a, a + 3) for a in at)]
        found[at] = sum(abs((k * box).sum()) for k in kernels)
    return found


def literal_window(size, sigma):
    line = [math.exp(-((k - size // 2) ** 2) / (2 * sigma**2)) for k in range(size)]
    cube = np.einsum("i,j,k->ijk", line, line, line)
    return cube / cube.sum()


def over(a, b):
    return a / b if b else 1.0


def literal_terms(ix, iy, gx, gy, w, form):
    """(with luminance, without) of one window."""
    mx, my, m1, m2 = ((w * v).sum() for v in (ix, iy, gx, gy))
    v1, v2 = (max((w * g * g).sum() - m * m, 0) for g, m in ((gx, m1), (gy, m2)))
    xy = (w * gx * gy).sum() - m1 * m2
    if form == "kcl-star":
        s1 = math.sqrt(v1 + 1e-5 * ((w * gx * gx).sum() + m1 * m1) / 2)
        s2 = math.sqrt(v2 + 1e-5 * ((w * gy * gy).sum() + m2 * m2) / 2)
        luminance = (2 * mx * my + 1e-4) / (mx * mx + my * my + 1e-4)
        contrast = (2 * s1 * s2 + 9e-4) / (v1 + v2 + 9e-4)
        structure = 0 if (s1 == 0) != (s2 == 0) else (xy + 4.5e-4) / (s1 * s2 + 4.5e-4)
        return luminance * contrast * structure, contrast * structure
    s1, s2 = (math.sqrt(v) if v > 1e-6 * (v + m * m) else 0.0 for v, m in ((v1, m1), (v2, m2)))
    r = 1.0 if s1 == s2 == 0 else 0.0 if s1 * s2 == 0 else xy / (s1 * s2)
    if form == "r":
        return r, r
    contrast = over(2 * s1 * s2, s1 * s1 + s2 * s2)
    return over(2 * mx * my, mx * mx + my * my) * contrast * r, contrast * r


def literal_scale(x, y, size, sigma, form):
    """Scores of one scale, with and without luminance, by loops."""
    gx, gy, w, half = (
        literal_gradient(x),
        literal_gradient(y),
        literal_window(size, sigma),
        size // 2,
    )
    t1, t2 = 0.12 * gx.max(), 0.06 * gx.max()
    regions = {"preserved": [], "changed": [], "smooth": [], "texture": []}
    for at in np.ndindex(*(side - size + 1 for side in gx.shape)):
        box = tuple(slice(a, a + size) for a in at)
        inside = tuple(slice(a + 1, a + 1 + size) for a in at)
        middle = tuple(a + half for a in at)
        p, q = gx[middle], gy[middle]
        if p > t1 and q > t1:
            region = "preserved"
        elif p > t1 or q > t1:
            region = "changed"
        elif p < t2 and q <= t1:
            region = "smooth"
        else:
            region = "texture"
        regions[region].append(literal_terms(x[inside], y[inside], gx[box], gy[box], w, form))
    there = [np.mean(values, 0) for values in regions.values() if values]
    return np.maximum(np.mean(there, 0), 0)


def halved(v):
    """Means over 2 x 2 x 2 voxels; an odd voxel at the end is left out."""
    a, b, c = (side // 2 for side in v.shape)
    return v[: 2 * a, : 2 * b, : 2 * c].reshape(a, 2, b, 2, c, 2).mean((1, 3, 5))


def literal(x, y, *, size, sigma, form, scales, weights):
    if scales == "single":
        return literal_scale(x, y, size, sigma, form)[0]
    found = 1.0
    for scale, weight in enumerate(weights):
        whole, part = literal_scale(x, y, size, sigma, form)
        found *= (whole if scale == len(weights) - 1 else part) ** weight
        x, y = halved(x), halved(y)
    return found


@pytest.fixture(scope="module")
def couple():
    """Blobs, two corners of which are exactly 0: in both, and in one."""
    draw = torch.Generator().manual_seed(3)
    coarse = torch.rand(2, 1, 4, 5, 4, generator=draw)
    image = torch.nn.functional.interpolate(coarse, size=(12, 14, 12), mode="trilinear")
    x, y = image[:1] ** 2, (0.6 * image[:1] + 0.4 * image[1:]) ** 2
    x[..., :6, :6, :], y[..., :6, :6, :] = 0, 0
    x[..., -6:, -6:, :] = 0
    return x, y


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("form", FORMS)
def test_as_loops_over_voxels(couple, scales, form):
    x, y = couple
    settings = {"scales": scales, "form": form, "weights": (0.4, 0.6)}
    expected = literal(
        x[0, 0].double().numpy(), y[0, 0].double().numpy(), size=3, sigma=1.5, **settings
    )
    found = gradient_ssim(x, y, window=Window(3, 1.5), **settings).item()
    assert 0.05 < found < 0.999, "the volumes tell nothing"
    assert found == pytest.approx(expected, abs=1e-5)


def test_gradient_of_a_ramp_is_its_slope():
    """Two apart: 2 * slope, over lobes that sum to 1/2: slope; axes add up."""
    at = [torch.arange(float(side)) for side in (6, 7, 8)]
    x, y, z = torch.meshgrid(*at, indexing="ij")
    found = gradient((0.1 * x - 0.2 * y + 0.05 * z)[None])
    assert found.shape == (1, 4, 5, 6)
    torch.testing.assert_close(found, torch.full_like(found, 0.35))


def test_gradient_of_one_voxel():
    """Along each axis a lone 1 gives 0.1 to both neighbours, 0.05 to what is aside of them."""
    image = torch.zeros(1, 5, 5, 5)
    image[0, 2, 2, 2] = 1
    found = gradient(image)[0]
    assert found[1, 1, 1] == 0
    assert found[0, 1, 1].item() == pytest.approx(0.1)
    assert found[0, 0, 1].item() == pytest.approx(0.05 + 0.05)
    assert found[0, 0, 0].item() == pytest.approx(0.15)


def line(*values):
    """A volume (1, 1, 3, 3, n) that varies along its last axis."""
    return torch.tensor(values).expand(1, 1, 3, 3, -1).contiguous()


def test_by_hand_on_a_line():
    """A window of 1 voxel has no variance, so that luminance and the zero rules are all there is.

    x = 0 0 0 1 1: gradients 0 .5 .5 (differences two apart, halved), middle intensities 0 0 1.
    y = 0 0 0 0 0: gradients 0 0 0, intensities 0 0 0.
    gmax .5, T1 .06: the first voxel is smooth, the others are changed edges; two regions.

    star: deviations are all 0, so that contrast and structure are 1. Luminance: 0 / 0 is 1, again
    1, 2 * 1 * 0 / (1 + 0) = 0. Smooth 1, changed (1 + 0) / 2: the mean is 0.75. r: 1 throughout.

    kcl-star: the gradient vanishes in y alone at the last two: structure 0 there. Smooth 1,
    changed 0: the mean is 0.5.
    """
    x, y = line(0.0, 0.0, 0.0, 1.0, 1.0), line(0.0, 0.0, 0.0, 0.0, 0.0)
    settings = {"scales": "single", "window": Window(1, 1.0)}
    assert gradient_ssim(x, y, form="star", **settings).item() == pytest.approx(0.75)
    assert gradient_ssim(x, y, form="r", **settings).item() == pytest.approx(1)
    assert gradient_ssim(x, y, form="kcl-star", **settings).item() == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_a_volume_is_itself(couple, form):
    found = gradient_ssim(couple[0], couple[0], scales="single", form=form, window=Window(3))
    assert found.item() == pytest.approx(1, abs=1e-4 if form == "kcl-star" else 1e-6)


def test_the_first_is_the_reference(couple):
    x, y = couple
    settings = {"scales": "single", "form": "star", "window": Window(3)}
    forth, back = gradient_ssim(x, 0.5 * y, **settings), gradient_ssim(0.5 * y, x, **settings)
    assert abs(forth - back).item() > 1e-3


def test_variants_together_are_what_they_are_alone(couple):
    measure = GradientSsim(window=Window(3), weights=(0.4, 0.6))
    found = measure.compare(*(measure.prepare(volume) for volume in couple))
    assert tuple(found) == measure.names
    assert len(found) == 6
    for scales, form in measure.variants:
        alone = gradient_ssim(
            *couple, scales=scales, form=form, window=Window(3), weights=(0.4, 0.6)
        )
        assert torch.equal(alone, found[name(scales, form)])


def test_the_batch_makes_no_difference(couple):
    x, y = couple
    settings = {"scales": "single", "form": "star", "window": Window(3)}
    both = gradient_ssim(torch.cat([x, y]), torch.cat([y, x]), **settings)
    alone = torch.cat([gradient_ssim(x, y, **settings), gradient_ssim(y, x, **settings)])
    torch.testing.assert_close(both, alone, atol=1e-6, rtol=0)


def test_what_cannot_be_is_refused(couple):
    with pytest.raises(EvaluationError, match="found variants"):
        GradientSsim([("single", "plain")])
    with pytest.raises(EvaluationError, match="at least 9"):
        gradient_ssim(
            torch.zeros(1, 1, 8, 9, 9), torch.zeros(1, 1, 8, 9, 9), scales="single", form="r"
        )
    with pytest.raises(EvaluationError, match="not finite"):
        gradient_ssim(couple[0] / 0, couple[1], scales="single", form="kcl-star", window=Window(3))
