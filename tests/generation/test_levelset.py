import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from generation.levelset import in_voxels, ramp, shift_to_volume


def ball(size=40, radius=12.0):
    """Distance to a sphere, positive inside, ``(1, size, size, size)``."""
    axis = torch.arange(size) - (size - 1) / 2
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    return radius - grid.square().sum(0).sqrt()[None]


def test_partial_volumes_add_up_to_the_ball():
    assert float(ramp(ball()).sum()) == pytest.approx(4 / 3 * torch.pi * 12**3, rel=5e-3)


@given(radius=st.floats(8, 16))
def test_a_shift_makes_the_volume_exact(radius):
    wanted = torch.tensor([4 / 3 * torch.pi * radius**3])
    distance = ball()
    shift = shift_to_volume(distance, torch.ones_like(distance), wanted)
    assert float(shift) == pytest.approx(12 - radius, abs=0.05)
    assert float(ramp(distance - shift).sum()) == pytest.approx(float(wanted), rel=1e-3)


def test_only_weighted_voxels_count():
    distance = ball()
    half = torch.ones_like(distance)
    half[:, :20] = 0
    shift = shift_to_volume(distance, half, ramp(distance).sum()[None] / 2)
    assert float(shift) == pytest.approx(0, abs=0.01)


def test_rows_are_solved_apart():
    pair = torch.cat([ball(), ball(radius=9)])
    shifts = shift_to_volume(pair, torch.ones_like(pair), ramp(ball()).sum().expand(2))
    assert shifts.flatten().tolist() == pytest.approx([0, -3], abs=0.03)


@pytest.mark.parametrize(("volume", "end"), [(0.0, 5.49), (1e9, -5.5)])
def test_what_cannot_be_had_gives_the_end_of_the_range(volume, end):
    distance = ball()
    shift = shift_to_volume(distance, torch.ones_like(distance), torch.tensor([volume]))
    assert float(shift) == pytest.approx(end, abs=0.02)


@given(stretch=st.floats(0.3, 4))
def test_distances_are_measured_in_voxels(stretch):
    near = (ball().abs() < 3) & (ball().abs() > 0.1)
    found = in_voxels(ball() * stretch)
    assert torch.allclose(found[near], ball()[near], rtol=0.15)
