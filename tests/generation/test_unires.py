"""Against a package that speaks as UniRes does; UniRes itself is not on PyPI."""

import fake_unires
import numpy as np
import pytest

from generation import unires
from generation.unires import ReconstructionError, reconstruct

THICK = np.array(((0, 0, 3.0, -5), (2.0, 0, 0, 7), (0, 1.5, 0, 1), (0, 0, 0, 1)))


@pytest.fixture
def installed(tmp_path):
    with fake_unires.installed(tmp_path):
        yield


def test_where_it_is_not_there_is_no_version():
    assert unires.version() is None


@pytest.mark.usefixtures("installed")
def test_a_scan_is_reconstructed_in_its_own_world():
    scan = np.random.default_rng(0).random((4, 6, 5), dtype=np.float32)
    made, affine = reconstruct(scan, THICK)
    assert unires.version() == "0.3"
    assert made.shape == (8, 9, 15)
    assert np.linalg.norm(affine[:3, :3], axis=0) == pytest.approx(np.ones(3))
    corners = (affine @ (-0.5, -0.5, -0.5, 1), THICK @ (-0.5, -0.5, -0.5, 1))
    assert corners[0] == pytest.approx(corners[1], abs=1e-5)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("value", "words"), [(1000, "cannot estimate hyper-parameters"), (np.nan, "finite")]
)
def test_what_goes_wrong_is_told_in_one_line(value, words):
    with pytest.raises(ReconstructionError, match=words) as caught:
        reconstruct(np.full((3, 3, 3), value, np.float32), THICK)
    assert "\n" not in str(caught.value)
