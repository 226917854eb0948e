import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from generation.evaluate.pairing import pairs, reading_order


@given(n=st.integers(2, 60), count=st.integers(1, 2000), seed=st.integers(0, 9))
def test_pairs_are_distinct_and_as_many_as_asked(n, count, seed):
    found = pairs(n, count, seed)
    assert len(found) == len(set(found)) == min(count, n * (n - 1) // 2)
    assert all(0 <= first < second < n for first, second in found)
    assert found == pairs(n, count, seed)


def test_pairs_are_drawn_evenly_from_the_many():
    found = np.array(pairs(100_000, 20_000, 1))
    assert found[:, 0].mean() == pytest.approx(100_000 / 3, rel=0.02)
    assert found[:, 1].mean() == pytest.approx(200_000 / 3, rel=0.02)
    assert pairs(100_000, 50, 1) != pairs(100_000, 50, 2)
    assert pairs(5, 100) == sorted(itertools.combinations(range(5), 2))


@given(
    wanted=st.sets(st.tuples(st.integers(0, 12), st.integers(13, 30)), max_size=60),
    resident=st.integers(2, 9),
)
def test_every_pair_is_compared_once_within_memory(wanted, resident):
    held, done = set(), []
    for step in reading_order(wanted, resident):
        held -= {step.forget}
        assert step.read not in held
        held.add(step.read)
        assert len(held) <= resident
        assert all({*pair} <= held for pair in step.compare)
        done += step.compare
    assert sorted(done) == sorted(wanted)


@pytest.mark.parametrize(("n", "count", "resident", "most"), [
    (45, 990, 45, 45), (45, 990, 16, 100), (1000, 1000, 16, 1250), (100, 1000, 16, 350),
])  # fmt: skip
def test_volumes_are_read_few_times(n, count, resident, most):
    assert len(list(reading_order(pairs(n, count), resident))) <= most
