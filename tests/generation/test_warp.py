import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import interpolate, ndimage

from generation.warp import Grid, exponential, look_up, positions, spread

CPU = torch.device("cpu")
BOX = Grid((-20.0, 30.0, 5.0), (2.0, -2.0, 2.0))
SHAPE = (20, 22, 24)

FEWER = settings(max_examples=40)
"""For flows, of which each takes 10 to 30 ms."""

seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(*[st.integers(2, 7)] * 3)
steps = st.sampled_from([-3.0, -1.0, 0.5, 1.0, 2.0])
grids = st.builds(
    Grid, st.tuples(*[st.floats(-100, 100, width=32)] * 3), st.tuples(steps, steps, steps)
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Fields this small are looked up fastest by one thread, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def noise(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def velocity(seed, size=4.0):
    """A smooth field over BOX in mm per unit of time, at rest at its border."""
    at = [torch.linspace(0, torch.pi, n).sin() for n in SHAPE]
    rest = torch.einsum("i,j,k->ijk", *at)
    return size * rest * spread(noise((1, 3, 6, 6, 6), seed), SHAPE)[0]


def moved(displacement):
    return positions(BOX, SHAPE, CPU) + displacement


def test_positions_follow_a_signed_spacing():
    at = positions(Grid((80.5, -10.0, 0.0), (-1.0, 2.0, 0.5)), (3, 4, 5), CPU)
    assert at.shape == (1, 3, 3, 4, 5)
    assert at.dtype == torch.float32
    assert at[0, :, 0, 0, 0].tolist() == [80.5, -10, 0]
    assert at[0, :, 2, 3, 4].tolist() == [78.5, -4, 2]


@given(grids, shapes, seeds)
def test_looking_up_agrees_with_scipy_inside_and_beyond_the_border(grid, shape, seed):
    field = noise((2, *shape), seed)
    draw = np.random.default_rng(seed)
    indices = draw.uniform(-1.5, np.array(shape) + 0.5, size=(3, 40, 3))
    points = torch.tensor(indices * grid.step + grid.origin, dtype=torch.float32)
    found = look_up(field, grid, points.permute(0, 2, 1).reshape(3, 3, 40, 1, 1))
    assert found.shape == (3, 2, 40, 1, 1)
    for row, channel in itertools.product(range(3), range(2)):
        expected = ndimage.map_coordinates(
            field[channel].numpy(), indices[row].T, order=1, mode="nearest"
        )
        assert found[row, channel].flatten().numpy() == pytest.approx(expected, abs=2e-3)


@given(grids, shapes, seeds)
def test_at_its_nodes_a_field_is_itself(grid, shape, seed):
    field = noise((2, *shape), seed)
    found = look_up(field, grid, positions(grid, shape, CPU))
    assert torch.allclose(found[0], field, atol=2e-3)


def test_every_row_may_have_a_field_of_its_own():
    fields = noise((2, 1, 4, 5, 6), 0)
    grid = Grid((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    points = 0.5 + positions(grid, (3, 4, 5), CPU).expand(2, -1, -1, -1, -1)
    both = look_up(fields, grid, points)
    for number in range(2):
        assert torch.equal(both[number], look_up(fields[number], grid, points[:1])[0])


@FEWER
@given(st.tuples(*[st.floats(-5, 5)] * 3), st.floats(-2, 2))
def test_a_constant_velocity_moves_everything_alike(speed, time):
    field = torch.tensor(speed).view(3, 1, 1, 1).expand(3, *SHAPE)
    flow = exponential(field, BOX, torch.tensor([time]))
    expected = torch.tensor(speed) * time
    assert torch.allclose(flow, expected.view(1, 3, 1, 1, 1).expand_as(flow), atol=1e-4)


@FEWER
@given(seeds)
def test_no_time_moves_nothing(seed):
    assert not exponential(velocity(seed), BOX, torch.zeros(2)).any()


@FEWER
@given(seeds, st.floats(0.1, 1.5))
def test_flowing_back_undoes_flowing(seed, time):
    there, back = exponential(velocity(seed), BOX, torch.tensor([time, -time]))[:, None]
    left = there + look_up(back[0], BOX, moved(there))
    assert left.abs().max() < 0.4


@FEWER
@given(seeds, st.floats(-1, 1), st.floats(-1, 1))
def test_flowing_twice_is_flowing_for_the_sum_of_the_times(seed, one, other):
    field = velocity(seed)
    first, second, both = exponential(field, BOX, torch.tensor([one, other, one + other]))
    twice = first + look_up(second, BOX, moved(first[None]))[0]
    assert (twice - both).abs().max() < 0.25


def test_times_of_a_batch_do_not_meet():
    field, times = velocity(1), torch.tensor([-1.0, 0.5, 1.5])
    together = exponential(field, BOX, times)
    for number in range(3):
        assert torch.equal(together[number], exponential(field, BOX, times[number : number + 1])[0])


@FEWER
@given(seeds, st.floats(-1.5, 1.5))
def test_a_smooth_flow_does_not_fold(seed, time):
    at = moved(exponential(velocity(seed), BOX, torch.tensor([time])))[0].double()
    step = torch.tensor(BOX.step, dtype=torch.float64)
    slopes = torch.stack([torch.stack(torch.gradient(c, dim=(0, 1, 2))) for c in at])
    jacobians = slopes.permute(2, 3, 4, 0, 1) / step
    assert torch.linalg.det(jacobians).min() > 0


@given(st.floats(-3, 3, width=32), st.tuples(*[st.integers(4, 9)] * 3), shapes)
def test_spreading_reproduces_constants(value, knots, shape):
    assert torch.allclose(
        spread(torch.full((2, 1, *knots), value), shape), torch.tensor(value), atol=1e-5
    )


def test_spread_noise_has_the_stated_deviation():
    field = spread(noise((200, 1, 8, 9, 10), 1), (20, 22, 24))
    assert field.shape == (200, 1, 20, 22, 24)
    assert float(field.std()) == pytest.approx(0.35, abs=0.03)
    assert float(field.mean()) == pytest.approx(0, abs=0.01)


@given(st.integers(4, 9), st.integers(2, 30), seeds)
def test_spreading_is_what_scipy_calls_a_cubic_b_spline(knots, count, seed):
    values = noise((knots,), seed)
    spline = interpolate.BSpline(np.arange(-3.0, knots + 1), values.double().numpy(), 3)
    along = values[:, None, None].expand(-1, 4, 4)[None, None]
    found = spread(along, (count, 1, 1)).flatten().numpy()
    assert found == pytest.approx(spline(np.linspace(0, knots - 3, count)), abs=1e-5)
