from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from synthbrain import as_float
from synthbrain.header import Geometry
from synthbrain.quantise import TOLERANCE, intensities, quantise

BYTES = Geometry()
HALVES = Geometry(dtype="float16")
UNIT = st.floats(0, 1, width=32)


@given(hnp.arrays(np.uint8, hnp.array_shapes(max_dims=3)))
def test_stored_bytes_survive_a_round_trip(stored):
    assert np.array_equal(quantise(intensities(stored, BYTES), BYTES), stored)


@given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=3), elements=UNIT))
def test_quantising_moves_no_value_by_more_than_half_a_step(values):
    error = np.abs(intensities(quantise(values, BYTES), BYTES).astype(float) - values)
    assert error.max() <= 1 / 510 + 1e-7


@given(hnp.arrays(np.float16, hnp.array_shapes(max_dims=3), elements=st.floats(0, 1, width=16)))
def test_halves_survive_a_round_trip(values):
    assert np.array_equal(quantise(intensities(values, HALVES), HALVES), values)


def test_every_byte_has_its_own_intensity():
    every = np.arange(256, dtype=np.uint8)
    levels = intensities(every, BYTES)
    assert levels.dtype == np.float32
    assert levels[0] == 0
    assert levels[255] == 1
    assert (np.diff(levels) > 0).all()
    assert np.array_equal(quantise(levels, BYTES), every)


@pytest.mark.parametrize("geometry", [BYTES, HALVES], ids=["uint8", "float16"])
def test_rounding_beyond_the_unit_interval_is_clamped(geometry):
    stored = quantise(np.array([-TOLERANCE / 2, 0.5, 1 + TOLERANCE / 2], np.float32), geometry)
    values = intensities(stored, geometry)
    assert values.min() == 0
    assert values.max() == 1


@pytest.mark.parametrize("geometry", [BYTES, HALVES], ids=["uint8", "float16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(geometry, bad):
    with pytest.raises(ValueError, match="must be finite"):
        quantise(np.array([0.5, bad], np.float32), geometry)


@pytest.mark.parametrize("geometry", [BYTES, HALVES], ids=["uint8", "float16"])
@pytest.mark.parametrize(("bad", "says"), [(-0.01, "-0.01 to 0.5"), (255.0, "0.5 to 255")])
def test_values_outside_the_unit_interval_are_refused(geometry, bad, says):
    with pytest.raises(ValueError, match=says):
        quantise(np.array([0.5, bad], np.float32), geometry)


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16])
def test_any_float_type_is_quantised(kind):
    assert quantise(np.array([0, 0.5, 1], kind), BYTES).tolist() == [0, 128, 255]


def test_the_callers_values_are_left_alone():
    values = np.linspace(0, 1, 10, dtype=np.float32)
    before = values.copy()
    quantise(values, BYTES)
    assert np.array_equal(values, before)


def test_another_scale():
    geometry = Geometry(scale=0.01)
    assert quantise(np.array([0.25, 1.0]), geometry).tolist() == [25, 100]
    assert np.allclose(intensities(np.array([25, 100], np.uint8), geometry), [0.25, 1.0])


def test_as_float_equals_intensities():
    stored = np.arange(256, dtype=np.uint8)
    image = torch.from_numpy(stored)
    assert np.array_equal(as_float(image).numpy(), intensities(stored, BYTES))
    assert np.allclose(as_float(image, scale=0.01).numpy(), stored / 100)
    assert image.dtype == torch.uint8
    assert as_float(image, "meta").device.type == "meta"


def test_as_float_leaves_floats_alone():
    image = torch.rand(3)
    assert as_float(image) is image
    assert as_float(image, torch.device("meta")).device.type == "meta"


def test_intensities_are_the_same_on_a_pool():
    geometry = Geometry()
    stored = np.random.default_rng(0).integers(0, 256, geometry.shape).astype(np.uint8)
    alone = intensities(stored, geometry)
    with ThreadPoolExecutor(2) as threads:
        shared = intensities(stored, geometry, threads=threads)
    assert np.array_equal(alone, shared)
    assert np.array_equal(alone, stored * np.float32(geometry.scale))
