"""Scans with a known place: the template, moved, thickened, turned over and rescaled."""

import nibabel
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from generation.atlas import template_images
from generation.preprocess import ScanError, check, prepare
from generation.template import own_affine

SHAPE = (80, 112, 80)
GRID = np.array([[-2.0, 0, 0, 80], [0, 2, 0, -125], [0, 0, 2, -60], [0, 0, 0, 1]])
MIDDLE = np.array((0.0, -15.0, 15.0))
CORNERS = [(x, y, z, 1.0) for x in (-70, 70) for y in (-105, 70) for z in (-45, 80)]


@pytest.fixture(scope="module")
def template():
    """The template's T1 at 1 mm, as a function of the affine wanted, at rest or moved."""
    t1, own = template_images()[0], own_affine()

    def seen(turn=(0, 0, 0), shift=(0, 0, 0), voxel=(2.0, 2.0, 2.0), codes="RAS"):
        moved = np.eye(4)
        moved[:3, :3] = Rotation.from_rotvec(np.radians(turn)).as_matrix()
        moved[:3, 3] = MIDDLE - moved[:3, :3] @ MIDDLE + shift
        shape = [int(260 / size) for size in voxel]
        affine = np.diag((*voxel, 1.0))
        affine[:3, 3] = MIDDLE - np.multiply(voxel, shape) / 2
        chain = np.linalg.inv(own) @ np.linalg.inv(moved) @ affine
        image = ndimage.affine_transform(t1, chain, output_shape=shape, order=1)
        to = nibabel.orientations.axcodes2ornt(codes)
        new = nibabel.orientations.ornt_transform(nibabel.io_orientation(affine), to)
        turned = nibabel.orientations.apply_orientation(image, new)
        return turned, affine @ nibabel.orientations.inv_ornt_aff(new, image.shape), moved

    return seen


def error(found, expected):
    """Largest distance at the corners of the brain, mm."""
    return np.linalg.norm(((found - expected) @ np.transpose(CORNERS))[:3], axis=0).max()


@pytest.mark.parametrize(
    "moved",
    [
        {"turn": (20, 0, 0), "shift": (0, 25, 0)},
        {"turn": (0, -14, 14), "shift": (10, 0, -20), "codes": "PIR"},
        {"turn": (8, 8, 8), "shift": (-25, 0, 0), "voxel": (1, 1, 3), "codes": "LAS"},
    ],
    ids=["nod", "PIR", "thick"],
)
def test_a_moved_head_comes_back_to_within_a_millimetre(template, moved):
    voxels, affine, expected = template(**moved)
    done = prepare(voxels.astype(np.int16)[..., None], affine, SHAPE, GRID)
    assert error(done.transform, expected) < 1.0
    assert done.measures.correlation > 0.98
    assert done.measures.problem() is None
    turn = done.transform[:3, :3]
    assert np.allclose(turn @ turn.T, np.eye(3), atol=1e-6)
    assert done.measures.rotation == pytest.approx(np.linalg.norm(moved["turn"]), abs=0.5)
    assert (done.volume.shape, done.volume.dtype) == (SHAPE, np.float32)
    assert (done.volume.min(), done.volume.max()) == (0, 1)


def test_what_is_no_brain_is_told(template):
    ball = np.linalg.norm(np.indices((90, 90, 90)) - 45, axis=0) < 35
    noise = np.random.default_rng(0).normal(0, 0.1, ball.shape)
    done = prepare(ball + noise, np.diag((2, 2, 2, 1)), SHAPE, GRID)
    assert done.measures.problem() is not None


def test_a_spot_in_the_dark_is_told_and_not_fatal():
    voxels = np.zeros((64, 64, 64))
    voxels[29:35, 29:35, 29:35] = 1
    with pytest.raises(ScanError, match=r"^cannot be registered: .*spacing") as told:
        prepare(voxels, np.diag((2, 2, 2, 1)), SHAPE, GRID)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("voxels", "affine", "words"),
    [
        (np.ones((20, 20, 20)), np.eye(4), "every voxel is 1"),
        (np.full((20, 20, 20), np.nan), np.eye(4), "8,000 voxels are NaN"),
        (np.ones((20, 20, 20, 2)), np.eye(4), "expected one volume"),
        (np.ones((20, 20)), np.eye(4), "expected one volume"),
        (np.ones((20, 20, 2)), np.eye(4), "16 voxels"),
        (np.ones((20, 20, 20)), np.diag((9, 9, 9, 1)), "voxels measure 9 x 9 x 9 mm"),
        (np.ones((20, 20, 20)), np.zeros((4, 4)), "voxels measure 0"),
        (np.ones((20, 20, 20)), np.full((4, 4), np.nan), "finite numbers"),
        (np.ones((20, 20, 20)), np.eye(4) + np.diag([0.5] * 3, 1), "sheared"),
    ],
)
def test_what_is_no_scan_is_refused(voxels, affine, words):
    with pytest.raises(ScanError, match=words):
        check(voxels, affine)
