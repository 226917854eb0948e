"""Comparing networks trained in several ways."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from generation.errors import EvaluationError
from generation.evaluate.comparison import METRICS, Arm, compare
from generation.evaluate.conditioning import roc_auc


def score_of(found, arm):
    return next(one for one in found.scores if (one.arm, one.metric) == (arm, "mae"))


class TestMetrics:
    @settings(max_examples=20)
    @given(seed=st.integers(0, 999))
    def test_weights_are_repetitions(self, seed):
        draw = np.random.default_rng(seed)
        truth, told = draw.standard_normal(15), draw.standard_normal(15)
        sexes = draw.permutation([0.0, 1.0] * 7 + [1.0])
        rows = np.concatenate([np.arange(15), draw.integers(0, 15, 10)])
        weights = np.bincount(rows, minlength=15)[None].astype(float)
        expected = {
            "mae": abs(told - truth)[rows].mean(),
            "r": stats.pearsonr(truth[rows], told[rows]).statistic,
        }
        for metric, value in expected.items():
            assert METRICS[metric](truth, told, weights)[0] == pytest.approx(value)
        area = roc_auc(sexes[rows], told[rows]).value
        assert METRICS["auc"](sexes, told, weights)[0] == pytest.approx(area)

    def test_degenerate_ones(self):
        truth, weights = np.array([0.0, 1, 1]), np.array([[1.0, 1, 1], [0, 2, 1]])
        assert np.isnan(METRICS["auc"](truth, truth, weights)[1])
        assert np.isnan(METRICS["r"](truth, truth, weights)[1])
        assert METRICS["r"](truth, np.ones(3), weights)[0] == 0


class TestIntervals:
    real, synthetic = Arm(1.0, False), Arm(0.0, True)

    def compared(self, seed, harm, level=0.9):
        """An arm whose errors are larger by ``harm``, of 3 seeds and 60 subjects."""
        draw = np.random.default_rng(seed)
        truth = draw.uniform(50, 80, 60)
        error = draw.standard_normal(60)[None] + 0.3 * draw.standard_normal((3, 60)) + 8
        found = {
            self.real: (truth + error)[..., None],
            self.synthetic: (truth + error + harm + 0.3 * draw.standard_normal((3, 60)))[..., None],
        }
        return compare(("age",), truth[:, None], found, level=level, resamples=400)

    def test_differences_cover_and_are_narrower_than_unpaired_ones(self):
        hits = 0
        for seed in range(100):
            found = self.compared(seed, 0.5)
            low, high = found.differences[0].estimate[1:]
            hits += low <= 0.5 <= high
        assert hits >= 84
        one, other = (score_of(found, arm) for arm in ("real-1", "synthetic"))
        unpaired = np.hypot(
            one.estimate.high - one.estimate.low, other.estimate.high - other.estimate.low
        )
        assert high - low < 0.5 * unpaired

    def test_no_difference_is_rarely_called_one(self):
        verdicts = [self.compared(seed, 0.0, 0.95).differences[0].verdict for seed in range(60)]
        assert verdicts.count("undecided") >= 52

    def test_test_volumes_that_do_not_differ_are_refused(self):
        same = np.full((5, 1), 60.0)
        found = dict.fromkeys((self.real, self.synthetic), np.zeros((3, 5, 1)))
        with pytest.raises(EvaluationError, match="all 5 test volumes have age 60 years"):
            compare(("age",), same, found, level=0.9, resamples=10)
