import numpy as np
import pytest
import torch
from scipy import ndimage

from generation.errors import EvaluationError
from generation.evaluate.planted import DOSES, Dose, Planted, altered

VOLUME = torch.rand(1, 20, 22, 18, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25


@pytest.mark.parametrize("dose", DOSES, ids=str)
def test_copies_keep_their_shape_and_range_and_differ(dose):
    before = VOLUME.clone()
    found = altered(VOLUME, dose)
    assert found.shape == VOLUME.shape
    assert found.dtype == torch.float32
    assert 0 <= found.min() <= found.max() <= 1
    assert not torch.equal(found, VOLUME)
    assert torch.equal(VOLUME, before)


def test_noise_is_as_strong_as_it_says_and_its_seed_decides():
    noise = altered(VOLUME, Dose("noise", 0.05), seed=3) - VOLUME
    assert noise.std().item() == pytest.approx(0.05, rel=0.05)
    assert torch.equal(altered(VOLUME, Dose("noise", 0.05), seed=3) - VOLUME, noise)
    assert not torch.equal(altered(VOLUME, Dose("noise", 0.05), seed=4) - VOLUME, noise)


def test_blur_is_that_of_scipy():
    found = altered(VOLUME, Dose("blur", 1))[0].numpy()
    expected = ndimage.gaussian_filter(VOLUME[0].numpy(), 1, radius=3, mode="constant")
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_shift_moves_whole_voxels():
    found = altered(VOLUME, Dose("shift", 2))
    assert torch.equal(found[:, 2:, 2:, 2:], VOLUME[:, :-2, :-2, :-2])
    assert not found[:, :2].any()


def test_a_copy_does_not_depend_on_the_others():
    volumes = torch.stack([VOLUME, VOLUME.flip(1)])
    both, one = Planted(volumes, [0, 1], DOSES[0]), Planted(volumes, [1], DOSES[0])
    assert (len(both), len(one)) == (2, 1)
    assert torch.equal(both[1], one[0])
    noise = np.corrcoef((both[0] - volumes[0]).flatten(), (both[1] - volumes[1]).flatten())[0, 1]
    assert abs(noise) < 0.1


def test_the_seed_of_copies_decides_about_their_noise():
    copies = [Planted([VOLUME], [0], Dose("noise", 0.05), seed=seed)[0] for seed in (0, 1, 1)]
    assert not torch.equal(copies[0], copies[1])
    assert torch.equal(copies[1], copies[2])


@pytest.mark.parametrize("dose", [Dose("noise", 0), Dose("shift", 0.5), Dose("blur", -1)], ids=str)
def test_doses_that_cannot_be_are_refused(dose):
    with pytest.raises(EvaluationError, match="cannot alter"):
        altered(VOLUME, dose)


def test_an_unknown_dose_is_refused():
    with pytest.raises(EvaluationError, match="expected noise, blur or shift"):
        altered(VOLUME, Dose("rotation", 1))
