import pytest
import torch

from generation.errors import EvaluationError
from generation.evaluate.near_duplicates import (
    altered_threshold,
    fresh_threshold,
    near_duplicates,
)


def points(count, seed):
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))


def test_planted_duplicates_are_found_and_named_once():
    samples = points(100, 0)
    samples[50:60] = samples[:10] + 0.1 * points(10, 1)
    share, worst = near_duplicates(samples, 0.9, worst=10)
    assert (share.count, share.of) == (20, 100)
    assert {(match.sample, match.match) for match in worst} == {(i, i + 50) for i in range(10)}


def test_fresh_samples_are_as_often_near_as_real_ones():
    found = near_duplicates(points(300, 0), fresh_threshold(points(300, 1)))[0]
    assert found.share == pytest.approx(0.05, abs=0.04)


def test_a_collapse_is_seen_whole():
    samples = points(1, 0) + 0.05 * points(50, 1)
    threshold = altered_threshold(samples, samples + 0.2 * points(50, 2))
    assert near_duplicates(samples, threshold)[0].share == 1
    fresh = points(50, 3)
    threshold = altered_threshold(fresh, fresh + 0.2 * points(50, 2))
    assert near_duplicates(fresh, threshold)[0].count == 0


def test_few_samples_have_few_pairs():
    assert len(near_duplicates(points(3, 0), 0.5, worst=9)[1]) == 3


def test_what_does_not_fit_is_refused():
    with pytest.raises(EvaluationError, match="n of 2 or more"):
        near_duplicates(points(1, 0), 0.5)
    with pytest.raises(EvaluationError, match="expected one of each"):
        altered_threshold(points(2, 0), points(3, 0))
