import functools

import numpy as np
import pytest
from scipy import ndimage

from generation.volumetry import REFERENCE_ICV, measure

SHAPE = (160, 224, 160)
CENTRE = np.array((79.5, 111.5, 74.5))
HEAD, SKULL, INNER, BRAIN, CORE = [
    np.array(axes)
    for axes in ((76, 96, 72), (71, 90, 68), (66, 84, 63), (61, 78, 58), (53, 68, 50))
]
AIR, SKIN, BONE, CSF, GREY, WHITE = 0.0, 0.6, 0.03, 0.16, 0.5, 0.72


def ellipsoid(axes, offset=(0, 0, 0)):
    """Part of each voxel inside, and the volume in mm³."""
    at = [a - c for a, c in zip(np.ogrid[:160, :224, :160], CENTRE + offset, strict=True)]
    radius = np.sqrt(sum((x / r) ** 2 for x, r in zip(at, axes, strict=True)))
    slope = np.sqrt(sum((x / r**2) ** 2 for x, r in zip(at, axes, strict=True)))
    inside = np.clip(0.5 - radius * (radius - 1) / np.maximum(slope, 1e-6), 0, 1)
    return inside, 4 / 3 * np.pi * np.prod(axes)


@functools.cache
def shells():
    """A head without ventricles, and its intracranial and brain volume."""
    image, volumes = np.full(SHAPE, AIR), []
    for axes, value in ((HEAD, SKIN), (SKULL, BONE), (INNER, CSF), (BRAIN, GREY), (CORE, WHITE)):
        inside, volume = ellipsoid(axes)
        image += (value - image) * inside
        volumes.append(volume)
    return image, volumes[2], volumes[3]


def head(horns, *, aside=14):
    """A head of nested shells whose ventricles are ellipsoids, and what there is to measure."""
    image, intracranial, brain = shells()
    image = image.copy()
    ventricles = 0.0
    for axes, side in zip(horns, (-aside, aside), strict=False):
        inside, volume = ellipsoid(axes, (side, -5, 3))
        image += (CSF - image) * inside
        ventricles += volume
    return image.astype(np.float32), ventricles, brain - ventricles, intracranial


def check(image, ventricles, brain, intracranial, *, within=0.03):
    found = measure(image)
    assert found.ventricular_volume == pytest.approx(ventricles, rel=within)
    assert found.intracranial_volume == pytest.approx(intracranial, rel=within)
    assert found.brain_volume == pytest.approx(brain * REFERENCE_ICV / intracranial, rel=within)


@pytest.fixture(scope="module")
def ordinary():
    return head([(8, 30, 12), (8, 30, 12)])


@pytest.mark.parametrize(
    "horns",
    [
        [(5, 16, 7), (5, 16, 7)],
        [(7, 30, 12), (9, 24, 10)],
        [(12, 44, 22), (12, 44, 22)],
    ],
    ids=["small", "lopsided", "large"],
)
def test_known_ellipsoids_are_measured(horns):
    check(*head(horns))


def test_ventricles_that_touch_are_measured_together():
    check(*head([(13, 40, 18), (13, 40, 18)], aside=13))


def test_shading_and_noise_change_little(ordinary):
    image, *volumes = ordinary
    draw = np.random.default_rng(1)
    shading = ndimage.zoom(1 + 0.04 * draw.standard_normal((4, 5, 4)), [40, 44.8, 40], order=3)
    noisy = image * shading + 0.01 * draw.standard_normal(SHAPE) * (image > 0)
    check(noisy.clip(0, 1), *volumes)


def test_256_levels_are_enough(ordinary):
    image = ordinary[0]
    fine, coarse = measure(image), measure((image * 255).round().astype(np.uint8) / np.float32(255))
    assert coarse.ventricular_volume == pytest.approx(fine.ventricular_volume, rel=0.005)
    assert coarse.brain_volume == pytest.approx(fine.brain_volume, rel=0.005)


def test_a_channel_axis_makes_no_difference(ordinary):
    image = ordinary[0]
    before = image.copy()
    assert measure(image[None]) == measure(image)
    assert np.array_equal(image, before), "measuring changed the image"


@pytest.mark.parametrize("shape", [(160, 224), (16, 24, 16), (2, 160, 224, 160), (224, 160, 160)])
def test_another_shape_is_refused_and_named(shape):
    with pytest.raises(ValueError, match=r"expected one volume of \(160, 224, 160\).*found") as no:
        measure(np.broadcast_to(np.float32(0), shape))
    assert str(shape) in str(no.value)


def test_a_head_without_ventricles_is_refused():
    with pytest.raises(ValueError, match="found no lateral ventricles"):
        measure(head([])[0])


def test_the_third_ventricle_alone_is_none():
    with pytest.raises(ValueError, match="found no lateral ventricles"):
        measure(head([(3, 20, 10)], aside=0)[0])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_empty_volume_is_refused():
    with pytest.raises(ValueError, match="found no lateral ventricles"):
        measure(np.zeros(SHAPE, np.float32))
