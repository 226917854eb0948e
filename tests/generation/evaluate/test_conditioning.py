"""Asked against measured covariates."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from generation.covariates import BRAIN_VOLUME, VENTRICULAR_VOLUME
from generation.errors import EvaluationError
from generation.evaluate.conditioning import agreement, classification, roc_auc
from generation.volumetry import measure


def drawn(seed, n=80, slope=0.8, intercept=0.1, noise=0.1):
    draw = np.random.default_rng(seed)
    asked = draw.uniform(0, 1, n)
    return asked, intercept + slope * asked + noise * draw.standard_normal(n)


class TestAgreement:
    def test_parity_with_scipy(self):
        asked, measured = drawn(0)
        found = agreement(asked, measured, resamples=4000)
        line, r = stats.linregress(asked, measured), stats.pearsonr(asked, measured)
        fit = found.trained
        assert (found.n, found.n_failed, found.extrapolated, fit.note) == (80, 0, None, "")
        assert fit.slope.value == pytest.approx(line.slope)
        assert fit.intercept.value == pytest.approx(line.intercept)
        assert fit.r.value == pytest.approx(r.statistic)
        expected = r.confidence_interval(0.95)
        assert (fit.r.low, fit.r.high) == pytest.approx((expected.low, expected.high))
        bootstrap = stats.bootstrap(
            (asked, measured), lambda a, b: stats.linregress(a, b).slope, paired=True,
            vectorized=False, method="percentile", n_resamples=1500, rng=np.random.default_rng(1),
        ).confidence_interval  # fmt: skip
        assert (fit.slope.low, fit.slope.high) == pytest.approx(bootstrap, abs=0.01)

    def test_errors_and_their_deciles(self):
        asked = np.linspace(0, 1, 100)
        fit = agreement(asked, asked**2).trained
        assert fit.mean_error == pytest.approx(np.mean(asked**2 - asked))
        assert fit.mean_absolute_error == pytest.approx(-fit.mean_error)
        assert [bias.n for bias in fit.bias] == [10] * 10
        assert fit.bias[0].low == 0
        assert fit.bias[-1].high == 1
        for bias in fit.bias:
            here = (asked >= bias.low) & (asked <= bias.high)
            assert bias.mean_error == pytest.approx((asked**2 - asked)[here].mean())

    def test_extrapolation_is_told_apart(self):
        asked = np.concatenate([np.linspace(0, 1, 40), np.linspace(1.2, 2, 20), [-0.5, -0.2]])
        measured = np.where((asked < 0) | (asked > 1), 0.5 * asked + 0.5, asked)
        found = agreement(asked, measured)
        assert (found.trained.n, found.extrapolated.n) == (40, 22)
        assert found.trained.slope == pytest.approx((1, 1, 1))
        assert found.extrapolated.slope == pytest.approx((0.5, 0.5, 0.5))
        assert found.extrapolated.intercept.value == pytest.approx(0.5)

    def test_natural_units_with_their_own_range(self):
        asked, measured = drawn(1)
        asked[:5] += 1
        plain = agreement(asked, measured)
        natural = agreement(
            VENTRICULAR_VOLUME.denormalise(asked), VENTRICULAR_VOLUME.denormalise(measured),
            trained=(VENTRICULAR_VOLUME.low, VENTRICULAR_VOLUME.high),
        )  # fmt: skip
        assert natural.extrapolated.n == plain.extrapolated.n == 5
        assert natural.trained.slope == pytest.approx(plain.trained.slope)
        span = VENTRICULAR_VOLUME.high - VENTRICULAR_VOLUME.low
        assert natural.trained.mean_error == pytest.approx(plain.trained.mean_error * span)

    def test_failures_are_counted_and_left_out(self):
        asked, measured = drawn(2)
        broken = measured.copy()
        broken[[3, 7, 70]] = (np.nan, np.inf, -np.inf)
        found = agreement(asked, broken)
        kept = np.isfinite(broken)
        assert (found.n, found.n_failed, found.trained.n) == (80, 3, 77)
        assert found.trained == agreement(asked[kept], measured[kept]).trained

    def test_shuffled_measurements_do_not_correlate(self):
        for seed in range(5):
            asked, measured = drawn(seed, n=300)
            shuffled = np.random.default_rng(seed + 10).permutation(measured)
            fit = agreement(asked, shuffled, level=0.999).trained
            assert fit.r.low < 0 < fit.r.high
            assert fit.slope.low < 0 < fit.slope.high

    def test_intervals_cover_at_their_level(self):
        """A bivariate normal distribution with r = 0.8 and slope 0.8, 300 times 60 pairs."""
        hits = {"r": 0, "slope": 0, "intercept": 0}
        truth = {"r": 0.8, "slope": 0.8, "intercept": 0.0}
        for seed in range(300):
            draw = np.random.default_rng(seed)
            asked = draw.standard_normal(60)
            measured = 0.8 * asked + 0.6 * draw.standard_normal(60)
            fit = agreement(
                asked, measured, trained=(-9, 9), level=0.9, resamples=400, seed=seed
            ).trained
            for name, value in truth.items():
                estimate = getattr(fit, name)
                hits[name] += estimate.low <= value <= estimate.high
        assert all(0.84 <= count / 300 <= 0.95 for count in hits.values()), hits

    @settings(max_examples=30)
    @given(
        seed=st.integers(0, 99),
        scale=st.floats(1e-3, 1e6),
        shift=st.floats(-1e5, 1e5),
        stretch=st.floats(1e-3, 1e3),
    )
    def test_other_units_change_the_line_and_not_the_correlation(self, seed, scale, shift, stretch):
        asked, measured = drawn(seed, n=40)
        plain = agreement(asked, measured, resamples=50).trained
        other = agreement(
            asked * stretch, shift + scale * measured, trained=(-1, 1e9), resamples=50
        ).trained
        assert other.r == pytest.approx(plain.r, abs=1e-4)
        factor = scale / stretch
        tolerance = 1e-7 * (1 + abs(shift)) / stretch
        assert other.slope == pytest.approx([factor * v for v in plain.slope], abs=tolerance)
        at_zero = [shift + scale * value for value in plain.intercept]
        assert other.intercept == pytest.approx(at_zero, rel=1e-6, abs=1e-6 * (scale + abs(shift)))

    @pytest.mark.parametrize(
        ("asked", "measured", "absent", "note"),
        [
            ([0.1, 0.9], [0.2, 0.8], ("r", "slope", "intercept"), "2 pairs are too few"),
            ([0.5] * 5, [1, 2, 3, 4, 5], ("r", "slope", "intercept"), "all asked values are the"),
            ([0, 0.2, 1], [0.5] * 3, ("r",), "all measured values are the same"),
            ([0, 0.2, 1, 1], [0, np.nan, np.nan, 1], ("r", "slope"), "2 pairs are too few"),
        ],
    )
    def test_what_cannot_be_told_is_none_and_says_why(self, asked, measured, absent, note):
        fit = agreement(asked, measured).trained
        assert all(getattr(fit, name) is None for name in absent)
        assert note in fit.note
        assert np.isfinite(fit.mean_absolute_error)

    def test_a_perfect_line_has_no_width(self):
        fit = agreement([0, 0.25, 0.5, 1], [0, 0.25, 0.5, 1]).trained
        assert fit.r == pytest.approx((1, 1, 1))
        assert fit.slope == pytest.approx((1, 1, 1))
        assert agreement([0, 0.4, 1], [0.1, 0.3, 1]).trained.r[1:] == (-1, 1)

    def test_nothing_measured(self):
        found = agreement([0.1, 0.2], [np.nan, np.nan])
        assert (found.n_failed, found.trained, found.extrapolated) == (2, None, None)

    @pytest.mark.parametrize(
        ("asked", "measured", "says"),
        [
            ([0.1, 0.2], [0.1], r"found \(2,\) and \(1,\)"),
            ([], [], "two arrays of one length"),
            ([0.1, np.nan], [0.1, 0.2], "asked value 1 is nan"),
            ([[0.1]], [[0.1]], "two arrays"),
        ],
    )
    def test_what_is_no_pair_is_refused(self, asked, measured, says):
        with pytest.raises(EvaluationError, match=says):
            agreement(asked, measured)

    def test_the_same_seed_gives_the_same_intervals(self):
        asked, measured = drawn(3)
        assert agreement(asked, measured, seed=4) == agreement(asked, measured, seed=4)
        assert agreement(asked, measured, seed=4) != agreement(asked, measured, seed=5)


class TestClassification:
    def test_parity_with_mann_whitney_and_hand_counts(self):
        draw = np.random.default_rng(0)
        classes = draw.integers(0, 2, 90).astype(float)
        scores = np.round(classes * 0.6 + draw.uniform(0, 1, 90), 1)  # with ties
        ones, zeros = scores[classes == 1], scores[classes == 0]
        expected = stats.mannwhitneyu(ones, zeros).statistic / len(ones) / len(zeros)
        found = roc_auc(classes, scores)
        assert found.value == pytest.approx(expected)
        above = [(one > zeros).mean() + (one == zeros).mean() / 2 for one in ones]
        below = [(ones > zero).mean() + (ones == zero).mean() / 2 for zero in zeros]
        error = np.sqrt(np.var(above, ddof=1) / len(ones) + np.var(below, ddof=1) / len(zeros))
        assert found.high - found.value == pytest.approx(1.959964 * error, rel=1e-5)

    def test_accuracy_and_failures(self):
        found = classification([0, 0, 1, 1, 1], [0.1, 0.7, 0.9, 0.6, np.nan])
        assert (found.n, found.n_failed) == (5, 1)
        assert found.accuracy.value == 0.75
        expected = stats.binomtest(3, 4).proportion_ci(method="wilson")
        assert found.accuracy[1:] == pytest.approx((expected.low, expected.high))
        assert found.auc.value == 0.75

    def test_degenerate_classes(self):
        assert classification([1, 1], [0.2, 0.9]).auc is None
        assert roc_auc([0, 1], [0.2, 0.9]) == (1, 0, 1)
        with pytest.raises(EvaluationError, match=r"must be 0 or 1, found 0\.5"):
            classification([0, 0.5], [0, 1])
        with pytest.raises(EvaluationError, match="none of 2 scores is finite"):
            classification([0, 1], [np.nan, np.nan])

    @settings(max_examples=20)
    @given(seed=st.integers(0, 99))
    def test_a_rising_function_of_the_scores_changes_nothing(self, seed):
        draw = np.random.default_rng(seed)
        classes, scores = draw.permutation([0, 1] * 10), draw.standard_normal(20)
        found, turned = roc_auc(classes, scores), roc_auc(classes, -scores)
        assert roc_auc(classes, np.exp(scores)) == found
        assert turned.value == pytest.approx(1 - found.value)

    def test_the_interval_of_the_area_covers(self):
        truth, hits = stats.norm.cdf(1 / np.sqrt(2)), 0
        for seed in range(300):
            draw = np.random.default_rng(seed)
            classes = np.repeat((0, 1), 40)
            found = roc_auc(classes, draw.standard_normal(80) + classes, level=0.9)
            hits += found.low <= truth <= found.high
        assert 0.84 <= hits / 300 <= 0.95


def test_phantoms_are_what_they_were_asked_to_be(heads):
    for name in (VENTRICULAR_VOLUME, BRAIN_VOLUME):
        measured = name.normalise([getattr(one, name.name) for one in heads.measured])
        fit = agreement(heads.asked[name.name], measured).trained
        assert fit.slope.value == pytest.approx(1, abs=0.05)
        assert fit.r.value > 0.99


def phantoms(phantom, count, seed):
    """Asked and measured volumes, normalised, of phantoms with independent covariates."""
    draw = np.random.default_rng(seed)
    asked = pd.DataFrame(
        {"sex": draw.integers(0, 2, count).astype(float), "age": draw.uniform(0, 1, count),
         "ventricular_volume": draw.uniform(0, 1, count),
         "brain_volume": draw.uniform(0.1, 0.9, count), "seed": np.arange(count)},
        index=[f"p{number}" for number in range(count)],
    )  # fmt: skip
    found = [measure(phantom.sample(asked.iloc[[row]])[0].numpy()) for row in range(count)]
    return asked, pd.DataFrame({
        name.name: name.normalise([getattr(one, name.name) for one in found])
        for name in (VENTRICULAR_VOLUME, BRAIN_VOLUME)
    })  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hundred_phantoms(phantom):
    asked, measured = phantoms(phantom, 200, 1)
    for name in measured:
        fit = agreement(asked[name], measured[name]).trained
        assert fit.r.value >= 0.99
        assert fit.slope.value == pytest.approx(1, abs=0.02)
        shuffled = np.random.default_rng(2).permutation(measured[name])
        other = agreement(asked[name], shuffled, level=0.99).trained
        assert other.r.low < 0 < other.r.high
