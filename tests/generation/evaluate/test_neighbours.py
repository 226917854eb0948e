import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import betabinom

from generation.errors import EvaluationError
from generation.evaluate.neighbours import (
    clipped_density_coverage,
    density_coverage,
    expected_clipped_coverage,
    precision_recall,
)

ALL = [precision_recall, density_coverage, clipped_density_coverage]
SEEDS = st.integers(0, 2**32 - 1)


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def both(scores):
    return scores.fidelity, scores.diversity


def radius(points, i, k):
    """Distance from one point to the k-th nearest other."""
    return sorted(np.linalg.norm(p - points[i]) for j, p in enumerate(points) if j != i)[k - 1]


def by_loops(real, generated, k):
    """All six figures, straight from their definitions."""
    n, m = len(real), len(generated)
    r = [radius(real, i, k) for i in range(n)]
    q = [radius(generated, j, k) for j in range(m)]
    d = [[np.linalg.norm(x - y) for y in generated] for x in real]
    small = [min(x, np.median(r)) for x in r]
    own = [
        min(sum(np.linalg.norm(real[i] - real[j]) <= small[i] for i in range(n) if i != j) / k, 1)
        for j in range(n)
    ]
    share = [min(sum(d[i][j] <= small[i] for i in range(n)) / k, 1) for j in range(m)]
    held = np.mean([min(sum(d[i][j] < r[i] for j in range(m)), k) / k for i in range(n)])
    curve = [0.0] * k + [
        np.minimum(range(good + 1), k) @ betabinom.pmf(range(good + 1), good, k, n - k) / k
        for good in range(k, m + 1)
    ]
    return {
        precision_recall: (
            np.mean([any(d[i][j] <= r[i] for i in range(n)) for j in range(m)]),
            np.mean([any(d[i][j] <= q[j] for j in range(m)) for i in range(n)]),
        ),
        density_coverage: (
            sum(d[i][j] < r[i] for i in range(n) for j in range(m)) / (k * m),
            np.mean([any(d[i][j] < r[i] for j in range(m)) for i in range(n)]),
        ),
        clipped_density_coverage: (
            min(np.mean(share) / np.mean(own), 1),
            sum(value < held - 1e-9 for value in curve) / (m + 1),
        ),
    }


@given(SEEDS, st.integers(6, 14), st.integers(6, 14), st.integers(1, 4), st.integers(1, 5))
def test_all_figures_are_what_their_definitions_say(seed, n, m, size, k):
    real, generated = draw(seed, n, size), 1.3 * draw(seed + 1, m, size) + 0.2
    for score, expected in by_loops(real, generated, k).items():
        assert both(score(real, generated, k=k)) == pytest.approx(expected), score.__name__


@given(SEEDS, st.integers(6, 20), st.integers(6, 20))
def test_shares_are_shares(seed, n, m):
    real, generated = draw(seed, n, 3), draw(seed + 1, m, 3)
    for score in ALL:
        fidelity, diversity = both(score(real, generated))
        assert 0 <= diversity <= 1
        assert 0 <= fidelity <= (np.inf if score is density_coverage else 1)


@pytest.mark.parametrize("score", ALL)
class TestScores:
    def test_real_volumes_score_one(self, score):
        fidelity, diversity = both(score(draw(0, 1000, 16), draw(1, 1000, 16)))
        assert fidelity > (0.5 if score is precision_recall else 0.93)
        assert diversity > (0.5 if score is precision_recall else 0.93)

    def test_far_away_volumes_score_zero(self, score):
        assert both(score(draw(0, 100, 4), draw(1, 100, 4) + 100)) == pytest.approx((0, 0))

    def test_copies_of_one_volume_are_faithful_and_not_diverse(self, score):
        real = draw(0, 400, 2)
        middle = real[[np.abs(real).sum(axis=1).argmin()]]
        fidelity, diversity = both(score(real, np.repeat(middle, 400, axis=0)))
        assert fidelity > 0.5
        assert diversity < 0.1

    def test_no_shift_and_no_scale_matters(self, score):
        real, generated = draw(0, 60, 3), 1.2 * draw(1, 50, 3)
        moved = score(3 * real + 7, 3 * generated + 7)
        assert both(moved) == pytest.approx(both(score(real, generated)))

    def test_too_few_real_volumes_are_refused(self, score):
        with pytest.raises(EvaluationError, match=r"at least 6 volumes, found 5"):
            score(draw(0, 5, 3), draw(1, 50, 3), k=5)

    def test_no_neighbours_are_refused(self, score):
        with pytest.raises(EvaluationError, match="k must be at least 1, found 0"):
            score(draw(0, 50, 3), draw(1, 50, 3), k=0)

    def test_features_of_two_networks_are_refused(self, score):
        with pytest.raises(EvaluationError, match="3 and 4 entries"):
            score(draw(0, 50, 3), draw(1, 50, 4))


def test_identical_sets_have_density_and_precision_exactly_one():
    real = draw(0, 80, 512)
    assert density_coverage(real, real).fidelity == 1
    assert both(precision_recall(real, real)) == (1, 1)


@pytest.mark.parametrize("good", [0.25, 0.5, 0.75])
def test_clipped_scores_read_as_shares_of_good_volumes(good):
    real, generated = draw(0, 1500, 8), draw(1, 1500, 8)
    generated[int(good * len(generated)) :] += 1000
    assert both(clipped_density_coverage(real, generated)) == pytest.approx((good,) * 2, abs=0.05)


def test_outliers_sway_clipped_density_less():
    """A few far real volumes have large balls, in which bad volumes hide."""
    real = np.concatenate((draw(0, 300, 8), 40 * draw(1, 30, 8)))
    bad = 15 * draw(2, 300, 8)
    assert density_coverage(real, bad).fidelity > 0.5
    assert clipped_density_coverage(real, bad).fidelity < 0.05


def test_the_calibration_curve_is_what_drawing_gives():
    n, m, k = 30, 25, 3
    curve = expected_clipped_coverage(n, m, k)
    assert len(curve) == m + 1
    assert (np.diff(curve) >= 0).all()
    for good in (5, 25):
        found = []
        for seed in range(300):
            real, generated = draw(2 * seed, n, 2), draw(2 * seed + 1, good, 2)
            apart = np.linalg.norm(real[:, None] - real, axis=2)
            reach = np.sort(apart, axis=1)[:, k : k + 1]
            held = (np.linalg.norm(real[:, None] - generated, axis=2) < reach).sum(axis=1)
            found.append(np.minimum(held, k).mean() / k)
        noise = np.std(found) / np.sqrt(len(found))
        assert curve[good] == pytest.approx(np.mean(found), abs=4 * noise)
