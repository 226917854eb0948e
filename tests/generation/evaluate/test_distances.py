import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg

from generation.errors import EvaluationError
from generation.evaluate.distances import (
    frechet_distance,
    frechet_infinity,
    frechet_of_gaussians,
    kernel_distance,
)
from generation.evaluate.estimates import PointEstimate, jackknife

SEEDS = st.integers(0, 2**32 - 1)


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def spd(seed, size):
    root = draw(seed, size, size + 2)
    return root @ root.T


def by_square_root(a, b):
    """The textbook formula, from covariances and SciPy's matrix root."""
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.real(linalg.sqrtm(s @ t))
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * root)


class TestGaussians:
    def test_one_dimension_is_the_textbook_value(self):
        found = frechet_of_gaussians([1.0], [[4.0]], [3.5], [[9.0]])
        assert found == pytest.approx(2.5**2 + (2 - 3) ** 2)

    def test_covariances_that_commute_differ_by_their_deviations(self):
        axes = linalg.qr(draw(0, 6, 6))[0]
        one, other = np.array([1.0, 2, 3, 4, 5, 6]), np.array([6.0, 1, 4, 0, 2, 9])
        found = frechet_of_gaussians(
            np.zeros(6), axes * one**2 @ axes.T, np.ones(6), axes * other**2 @ axes.T
        )
        assert found == pytest.approx(6 + ((one - other) ** 2).sum())

    @given(SEEDS)
    def test_any_covariances_agree_with_the_matrix_root(self, seed):
        s, t = spd(seed, 5), spd(seed + 1, 5)
        root = np.real(linalg.sqrtm(s @ t))
        found = frechet_of_gaussians(np.zeros(5), s, np.zeros(5), t)
        assert found == pytest.approx(np.trace(s + t - 2 * root), rel=1e-6, abs=1e-6)

    def test_singular_covariances_are_no_trouble(self):
        s = np.diag([1.0, 0, 0])
        t = np.diag([0, 4.0, 0])
        assert frechet_of_gaussians(np.zeros(3), s, np.zeros(3), t) == pytest.approx(5)

    def test_shapes_that_do_not_fit_are_named(self):
        with pytest.raises(EvaluationError, match=r"\(2,\), \(3,\), \(2, 2\), \(3, 3\)"):
            frechet_of_gaussians(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))


class TestFrechet:
    @pytest.mark.parametrize(("n", "m", "size"), [(40, 60, 7), (6, 9, 30), (6, 90, 30), (8, 8, 8)])
    def test_few_and_many_rows_agree_with_the_covariances(self, n, m, size):
        a, b = draw(1, n, size), 1.5 * draw(2, m, size) + 0.3
        gaussians = frechet_of_gaussians(
            a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False)
        )
        assert frechet_distance(a, b) == pytest.approx(gaussians, rel=1e-6)

    def test_agrees_with_the_textbook_formula(self):
        a, b = draw(3, 200, 12) @ spd(4, 12), draw(5, 150, 12) @ spd(6, 12) + 1
        assert frechet_distance(a, b) == pytest.approx(by_square_root(a, b), rel=1e-8)

    @given(SEEDS, st.integers(2, 12), st.integers(2, 12), st.integers(1, 12))
    def test_is_a_distance_that_no_rigid_motion_changes(self, seed, n, m, size):
        a, b = draw(seed, n, size), 2 * draw(seed + 1, m, size) - 0.5
        turn, shift = linalg.qr(draw(seed + 2, size, size))[0], draw(seed + 3, size)
        found = frechet_distance(a, b)
        assert found >= 0
        assert frechet_distance(b, a) == pytest.approx(found, rel=1e-9, abs=1e-9)
        assert frechet_distance(a @ turn + shift, b @ turn + shift) == pytest.approx(
            found, rel=1e-7, abs=1e-7
        )
        assert frechet_distance(a, a[::-1]) == pytest.approx(0, abs=1e-9)
        assert frechet_distance(a, a + shift) == pytest.approx(shift @ shift, rel=1e-7, abs=1e-9)

    def test_float32_features_are_computed_in_float64(self):
        a = (draw(0, 30, 5) + 1000).astype(np.float32)
        assert frechet_distance(a, a + np.float32(0.5)) == pytest.approx(1.25, rel=1e-9)


TRUTH = 6 * (0.2**2 + 0.2**2)


@pytest.fixture(scope="module")
def samples():
    """Many samples of two Gaussians that are TRUTH apart."""
    return [(draw(2 * s, 150, 6), 1.2 * draw(2 * s + 1, 150, 6) + 0.2) for s in range(25)]


@pytest.fixture(scope="module")
def found(samples):
    return [frechet_infinity(a, b, seed=s) for s, (a, b) in enumerate(samples)]


class TestInfinity:
    def test_is_unbiased_where_the_plain_distance_is_not(self, samples, found):
        values = np.array([estimate.value for estimate in found])
        plain = np.array([frechet_distance(a, b) for a, b in samples])
        noise = values.std(ddof=1) / np.sqrt(len(found))
        assert values.mean() == pytest.approx(TRUTH, abs=4 * noise)
        assert plain.mean() > TRUTH + 4 * plain.std(ddof=1) / np.sqrt(len(found))

    def test_the_standard_error_is_what_the_values_scatter_by(self, found):
        scatter = np.std([estimate.value for estimate in found], ddof=1)
        assert 0.7 * scatter < np.mean([estimate.error for estimate in found]) < 2 * scatter

    def test_as_the_authors_do_the_bias_of_the_real_side_stays(self):
        few, many = 40, 2000
        values = {"both": [], "generated": []}
        for s in range(25):
            real, generated = draw(2 * s, few, 4), draw(2 * s + 1, many, 4)
            for vary, kept in values.items():
                kept.append(
                    frechet_infinity(real, generated, vary=vary, parts=3, groups=2, seed=s).value
                )
        both, generated = np.mean(values["both"]), np.mean(values["generated"])
        assert abs(both) < 0.5 * generated

    def test_too_few_volumes_for_the_features_show_in_the_bend(self, found):
        bent = frechet_infinity(draw(0, 60, 200), draw(1, 60, 200))
        assert abs(bent.bend) > 5 * bent.error
        assert np.mean([abs(e.bend) < 3 * e.error for e in found]) > 0.9

    def test_depends_on_nothing_but_its_arguments(self):
        a, b = draw(0, 60, 3), draw(1, 50, 3)
        assert frechet_infinity(a, b, seed=3) == frechet_infinity(a, b, seed=3)
        assert frechet_infinity(a, b, seed=3) != frechet_infinity(a, b, seed=4)
        assert frechet_infinity(a, b).shares == (1, 1 / 2, 1 / 3, 1 / 4, 1 / 5)
        assert frechet_infinity(a, b).distances[0] == pytest.approx(frechet_distance(a, b))

    @pytest.mark.parametrize(
        ("n", "options", "what"),
        [
            (10, {}, "too few for 5 parts"),
            (60, {"parts": 2}, "3 sizes"),
            (60, {"groups": 1}, "gro"),
        ],
    )
    def test_what_cannot_be_extrapolated_is_refused(self, n, options, what):
        with pytest.raises(EvaluationError, match=what):
            frechet_infinity(draw(0, n, 3), draw(1, 60, 3), **options)


def kernel_by_loops(a, b):
    def k(x, y):
        return (x @ y / len(x) + 1) ** 3

    n, m = len(a), len(b)
    same = sum(k(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    same += sum(k(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return same - 2 * sum(k(x, y) for x in a for y in b) / (n * m)


class TestKernel:
    @given(SEEDS, st.integers(3, 7), st.integers(3, 7), st.integers(1, 5))
    def test_is_the_sum_over_pairs_and_its_jackknife(self, seed, n, m, size):
        a, b = draw(seed, n, size), draw(seed + 1, m, size) + 0.5
        found = kernel_distance(a, b)
        assert found.value == pytest.approx(kernel_by_loops(a, b), rel=1e-8, abs=1e-8)
        left_a = [kernel_by_loops(np.delete(a, i, 0), b) for i in range(n)]
        left_b = [kernel_by_loops(a, np.delete(b, j, 0)) for j in range(m)]
        variance = (n - 1) * np.var(left_a) + (m - 1) * np.var(left_b)
        assert found.error == pytest.approx(np.sqrt(variance), rel=1e-6, abs=1e-8)

    def test_blocks_make_no_difference(self, monkeypatch):
        a, b = draw(0, 50, 4), draw(1, 33, 4)
        whole = kernel_distance(a, b)
        monkeypatch.setattr("generation.evaluate.distances._BLOCK", 7)
        parts = kernel_distance(a, b)
        assert (parts.value, parts.error) == pytest.approx((whole.value, whole.error), rel=1e-10)

    def test_is_zero_on_average_between_equal_distributions_at_any_size(self):
        for n in (8, 32, 128):
            values = [
                kernel_distance(draw(2 * s, n, 8), draw(2 * s + 1, n, 8)).value for s in range(150)
            ]
            assert np.mean(values) == pytest.approx(0, abs=4 * np.std(values) / np.sqrt(150))

    def test_its_intervals_hold_the_truth(self):
        """The truth is closed-form: cubes of sums of products of independent normals."""
        shift, size = 0.5, 4

        def expected(mean_dot, within):
            # E(1 + t/d)³ for t = x·y, x, y independent N(u, I), N(v, I).
            second = size + within + mean_dot**2
            third = mean_dot**3 + 3 * mean_dot * (size + within) + 6 * mean_dot
            return 1 + 3 * mean_dot / size + 3 * second / size**2 + third / size**3

        norm = size * shift**2
        truth = expected(0, 0) + expected(norm, 2 * norm) - 2 * expected(0, norm)
        held = []
        for s in range(200):
            found = kernel_distance(draw(2 * s, 80, size), draw(2 * s + 1, 80, size) + shift)
            low, high = found.interval()
            held.append(low < truth < high)
        assert np.mean(held) > 0.88


class TestEstimates:
    def test_the_interval_of_a_normal_estimate(self):
        assert PointEstimate(1.0, 0.5).interval() == pytest.approx((0.02, 1.98), abs=1e-3)
        assert PointEstimate(1.0, 0.5).interval(0.6827) == pytest.approx((0.5, 1.5), abs=1e-4)

    def test_the_error_of_a_mean_is_its_standard_error(self):
        a, b = draw(0, 4000, 1), 2 * draw(1, 1000, 1)
        found = jackknife(lambda x, y: y.mean() - x.mean(), a, b, groups=200)
        assert found.value == pytest.approx(b.mean() - a.mean())
        assert found.error == pytest.approx(np.sqrt(1 / 4000 + 4 / 1000), rel=0.2)

    def test_more_groups_than_volumes_are_refused(self):
        with pytest.raises(EvaluationError, match="as many as volumes"):
            jackknife(frechet_distance, draw(0, 5, 2), draw(1, 50, 2), groups=6)


@pytest.mark.parametrize("distance", [frechet_distance, frechet_infinity, kernel_distance])
class TestFeaturesThatAreNone:
    def test_of_two_networks(self, distance):
        with pytest.raises(EvaluationError, match="4 and 5 entries"):
            distance(draw(0, 60, 4), draw(1, 60, 5))

    def test_of_one_volume(self, distance):
        with pytest.raises(EvaluationError, match="found 1"):
            distance(draw(0, 60, 4), draw(1, 1, 4))

    def test_not_finite(self, distance):
        spoilt = draw(1, 60, 4)
        spoilt[7, 2] = np.nan
        with pytest.raises(EvaluationError, match="1 volumes are not finite, the first in row 7"):
            distance(draw(0, 60, 4), spoilt)

    def test_of_another_shape(self, distance):
        with pytest.raises(EvaluationError, match=r"found shape \(60, 4, 1\)"):
            distance(draw(0, 60, 4), draw(1, 60, 4, 1))
