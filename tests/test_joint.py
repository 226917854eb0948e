"""The joint distribution of the covariates: marginals, conditionals, tails, fits, errors."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import log_ndtr, ndtr
from scipy.stats import ks_2samp, truncnorm

from generation.covariates import AGE, BRAIN_VOLUME, NAMES, VENTRICULAR_VOLUME, CovariateError
from synthbrain import density, joint
from synthbrain.joint import UK_BIOBANK, JointDistribution

COHORT = 31_740
VOLUMES = ("ventricular_volume", "brain_volume")


@pytest.fixture(scope="module")
def people() -> dict[str, np.ndarray]:
    """Enough unconditional draws that a narrow condition still leaves thousands."""
    return UK_BIOBANK.draw(100_000, seed=11)


def natural(drawn):
    return (
        AGE.denormalise(drawn["age"]),
        VENTRICULAR_VOLUME.denormalise(drawn["ventricular_volume"]),
        BRAIN_VOLUME.denormalise(drawn["brain_volume"]),
    )


def inside(drawn, **ranges):
    chosen = np.ones(len(drawn["age"]), dtype=bool)
    for name, (low, high) in ranges.items():
        chosen &= (drawn[name] >= low) & (drawn[name] <= high)
    return {name: values[chosen] for name, values in drawn.items()}


class TestPublishedCohort:
    def test_marginals(self, people):
        age, ventricles, brain = natural(people)
        assert people["sex"].mean() == pytest.approx(14_942 / COHORT, abs=0.004)
        assert age.mean() == pytest.approx(63.6, abs=0.06)
        assert age.std() == pytest.approx(7.5, abs=0.04)
        assert ventricles.mean() == pytest.approx(37_050, rel=0.005)
        assert brain.mean() == pytest.approx(1_492_871, rel=0.001)

    def test_columns(self, people):
        assert tuple(people) == NAMES
        for values in people.values():
            assert values.dtype == np.float64
            assert values.min() >= 0
            assert values.max() <= 1

    def test_truncated_age_has_the_published_moments(self):
        low, high = ((end - UK_BIOBANK.age_mean) / UK_BIOBANK.age_sd for end in (AGE.low, AGE.high))
        age = truncnorm(low, high, loc=UK_BIOBANK.age_mean, scale=UK_BIOBANK.age_sd)
        assert age.mean() == pytest.approx(63.6, abs=1e-4)
        assert age.std() == pytest.approx(7.5, abs=1e-4)

    @pytest.mark.parametrize("name", VOLUMES)
    def test_published_extremes_are_the_median_extremes_of_the_cohort(self, name):
        """Untruncated, half of all cohorts of 31,740 stay within each published end."""
        beyond = 1 - 0.5 ** (1 / COHORT)
        for past in ((-2.0, 0.0), (1.0, 3.0)):
            ranges = {"ventricular_volume": (-5.0, 5.0), "brain_volume": (-5.0, 5.0)}
            tail = math.exp(log_probability(ranges | {name: past}) - log_probability(ranges))
            assert tail == pytest.approx(beyond, rel=0.02)

    def test_extremes_of_one_cohort_come_close_to_the_published_ones(self):
        drawn = UK_BIOBANK.draw(COHORT, seed=1)
        for name in VOLUMES:
            assert drawn[name].min() < 0.08
            assert drawn[name].max() > 0.78

    def test_dependences(self, people):
        age, ventricles, brain = natural(people)
        male = people["sex"] == 1
        growth = np.polyfit(age, np.log(ventricles), 1)[0]
        assert growth == pytest.approx(0.025, abs=0.002)
        assert np.polyfit(age, brain, 1)[0] == pytest.approx(-6_700, abs=150)
        assert 1 - ventricles[~male].mean() / ventricles[male].mean() == pytest.approx(
            0.19, abs=0.01
        )
        assert brain[~male].mean() - brain[male].mean() == pytest.approx(10_000, abs=2_000)
        assert np.corrcoef(ventricles, brain)[0, 1] == pytest.approx(-0.50, abs=0.03)

    def test_ventricles_grow_faster_with_age(self, people):
        age, ventricles, _ = natural(people)
        mean = [ventricles[(age > a - 2) & (age < a + 2)].mean() for a in (50, 60, 70, 80)]
        steps = np.diff(mean)
        assert steps[0] > 0
        assert np.all(np.diff(steps) > 0)

    def test_volumes_oppose_each_other_at_a_given_sex_and_age(self):
        drawn = UK_BIOBANK.draw(20_000, seed=2, sex=1.0, age=(0.5, 0.5))
        assert np.corrcoef(drawn[VOLUMES[0]], drawn[VOLUMES[1]])[0, 1] == pytest.approx(
            -0.3, abs=0.04
        )


def log_probability(ranges) -> float:
    """Log probability of ranges of volumes, all ages and sexes, as the draws weigh it."""
    within = joint._Within(
        (AGE.low, AGE.high),
        joint._natural(VENTRICULAR_VOLUME, ranges["ventricular_volume"]),
        joint._natural(BRAIN_VOLUME, ranges["brain_volume"]),
    )
    share = UK_BIOBANK.male_proportion
    terms = [UK_BIOBANK._age_density(sex, within).log_mass[0] for sex in (0.0, 1.0)]
    return float(np.logaddexp(terms[0] + math.log(1 - share), terms[1] + math.log(share)))


CONDITIONS = [
    {"ventricular_volume": (0.5, 0.8)},
    {"brain_volume": (0.2, 0.35)},
    {"age": (0.2, 0.25), "brain_volume": (0.0, 0.6)},
    {"ventricular_volume": (0.1, 0.12), "brain_volume": (0.4, 0.45)},
    {"age": (0.7, 1.0), "ventricular_volume": (0.0, 0.15), "brain_volume": (0.5, 1.0)},
]


class TestConditional:
    @pytest.mark.parametrize("ranges", CONDITIONS, ids=str)
    def test_equals_rejection(self, people, ranges):
        accepted = inside(people, **ranges)
        drawn = UK_BIOBANK.draw(20_000, seed=5, **ranges)
        kept = len(accepted["age"])
        assert kept > 300
        assert drawn["sex"].mean() == pytest.approx(accepted["sex"].mean(), abs=4 / kept**0.5)
        for name in NAMES[1:]:
            assert ks_2samp(drawn[name], accepted[name]).pvalue > 1e-4, name

    @pytest.mark.parametrize("sex", [0.0, 1.0])
    def test_given_sex_equals_rejection(self, people, sex):
        accepted = inside(people, sex=(sex, sex), ventricular_volume=(0.4, 1.0))
        drawn = UK_BIOBANK.draw(20_000, seed=6, sex=sex, ventricular_volume=(0.4, 1.0))
        assert set(drawn["sex"]) == {sex}
        for name in NAMES[1:]:
            assert ks_2samp(drawn[name], accepted[name]).pvalue > 1e-4, name

    def test_large_ventricles_are_old_and_male(self, people):
        drawn = UK_BIOBANK.draw(2_000, ventricular_volume=(0.5, 0.8))
        assert drawn["age"].mean() > people["age"].mean() + 0.2
        assert drawn["sex"].mean() > 0.7

    @pytest.mark.parametrize("name", NAMES[1:])
    def test_a_fixed_value_is_the_limit_of_a_range(self, name):
        fixed = UK_BIOBANK.draw(8_000, seed=7, **{name: (0.6, 0.6)})
        narrow = UK_BIOBANK.draw(8_000, seed=8, **{name: (0.599, 0.601)})
        assert set(fixed[name]) == {0.6}
        assert fixed["sex"].mean() == pytest.approx(narrow["sex"].mean(), abs=0.035)
        for other in set(NAMES[1:]) - {name}:
            assert ks_2samp(fixed[other], narrow[other]).pvalue > 1e-4

    def test_everything_fixed(self):
        drawn = UK_BIOBANK.draw(
            3, sex=1, age=(0.1, 0.1), ventricular_volume=(0.9, 0.9), brain_volume=(1.2, 1.2)
        )
        rows = np.stack(list(drawn.values()), axis=1)
        assert rows.tolist() == [[1.0, 0.1, 0.9, 1.2]] * 3

    @pytest.mark.parametrize(("sex", "age"), [(0.0, 50.0), (1.0, 80.0)])
    def test_probability_of_both_ranges_against_quadrature(self, sex, age):
        within = joint._Within((44, 82), (60_000.0, 120_000.0), (1_200_000.0, 1_400_000.0))
        rows = np.array([sex]), np.array([age])
        d = UK_BIOBANK
        mean = d._ventricular_mean(*rows)[0]

        def integrand(z):
            volume = np.array([d.ventricular_scale * math.sinh(mean + d.ventricular_sd * z)])
            ends = [(end - d._brain_mean(*rows, volume)[0]) / d.brain_sd for end in within.brain]
            return math.exp(-z * z / 2) / math.sqrt(math.tau) * (ndtr(ends[1]) - ndtr(ends[0]))

        ends = [
            (math.asinh(end / d.ventricular_scale) - mean) / d.ventricular_sd
            for end in within.ventricles
        ]
        expected = quad(integrand, *ends, epsabs=0, epsrel=1e-10)[0]
        found = d._ventricular_density(*rows, within).log_mass[0]
        assert found == pytest.approx(math.log(expected), abs=1e-3)


class TestFarTails:
    @pytest.mark.parametrize(
        "ranges",
        [
            {"age": (1.1, 1.3)},
            {"age": (-0.6, -0.5)},
            {"ventricular_volume": (1.5, 1.9), "age": (0.0, 0.05)},
            {"ventricular_volume": (-0.5, -0.3)},
            {"brain_volume": (-0.5, -0.1)},
            {"brain_volume": (-3, -2), "ventricular_volume": (0.0, 0.01), "age": (0.0, 0.0)},
            {"age": (50, 60), "ventricular_volume": (99, 100), "brain_volume": (-80, -70)},
            {"age": (-900, 900), "ventricular_volume": (-900, 900), "brain_volume": (-900, 900)},
            {
                "ventricular_volume": (0.2, math.nextafter(0.2, 1)),
                "brain_volume": (0.5, 0.5 + 1e-8),
            },
        ],
        ids=str,
    )
    @pytest.mark.filterwarnings("error")
    def test_rows_lie_inside(self, ranges):
        drawn = UK_BIOBANK.draw(500, seed=3, **ranges)
        assert all(np.isfinite(values).all() for values in drawn.values())
        assert len(inside(drawn, **ranges)["age"]) == 500

    def test_tail_of_the_age_is_that_of_the_normal(self):
        years = AGE.denormalise(UK_BIOBANK.draw(20_000, seed=4, sex=0, age=(1.1, 1.3))["age"])
        low, high = (
            (AGE.denormalise(end) - UK_BIOBANK.age_mean) / UK_BIOBANK.age_sd for end in (1.1, 1.3)
        )
        expected = truncnorm(low, high, loc=UK_BIOBANK.age_mean, scale=UK_BIOBANK.age_sd)
        assert years.mean() == pytest.approx(expected.mean(), abs=0.1)
        assert years.std() == pytest.approx(expected.std(), rel=0.05)

    def test_log_interval(self):
        low = np.array([-40.0, 30.0, -1.0, -5.0, 2.0])
        high = np.array([-39.0, 31.0, 2.0, np.nextafter(-5.0, 0), 2.0 + 1e-6])
        expected = [
            log_ndtr(-39.0),
            log_ndtr(-30.0),
            math.log(ndtr(2.0) - ndtr(-1.0)),
            -12.5 - 0.9189385332 + math.log(math.ulp(5.0)),
            -2.0 - 0.9189385332 + math.log(1e-6),
        ]
        assert density.log_interval(low, high) == pytest.approx(expected, abs=1e-3)

    def test_truncated_normal_is_symmetric_and_inside(self):
        u = np.linspace(0.001, 0.999, 999)
        for low, high in [(-1.0, 2.0), (8.0, 9.0), (37.0, 60.0), (0.0, 1e-7)]:
            ends = np.full_like(u, low), np.full_like(u, high)
            right = density.truncated_normal(*ends, u)
            left = density.truncated_normal(-ends[1], -ends[0], 1 - u)
            assert right == pytest.approx(-left, abs=1e-9)
            assert np.all((right >= low) & (right <= high))
            assert np.all(np.diff(right) >= 0)

    @pytest.mark.parametrize("slope", [0.0, 1e-9, 2.0, -2.0, 900.0, -900.0])
    def test_exponential_quantile_inverts_the_cdf(self, slope):
        u = np.linspace(0.0, 0.999, 50)
        x = density._exponential_quantile(u, np.full_like(u, slope))
        cdf = x if abs(slope) < 1e-6 else exponential_cdf(x, slope)
        assert cdf == pytest.approx(u, abs=1e-7)


def exponential_cdf(x, slope):
    if slope > 0:
        return (np.exp(slope * (x - 1)) - math.exp(-slope)) / -math.expm1(-slope)
    return np.expm1(slope * x) / math.expm1(slope)


def bounds(low, high):
    end = st.floats(low, high, allow_nan=False)
    return (
        st.none() | end.map(lambda x: (x, x)) | st.tuples(end, end).map(lambda x: tuple(sorted(x)))
    )


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 20),
    seed=st.integers(0, 2**64 - 1),
    sex=st.sampled_from([None, 0.0, 1.0, "male", "female", "balanced"]),
    age=bounds(-1.0, 2.5),
    ventricular_volume=bounds(-1.0, 3.0),
    brain_volume=bounds(-2.0, 3.0),
)
def test_any_valid_ranges_give_finite_rows_inside(n, seed, sex, **ranges):
    drawn = UK_BIOBANK.draw(n, seed=seed, sex=sex, **ranges)
    assert tuple(drawn) == NAMES
    assert set(drawn["sex"]) <= {0.0, 1.0}
    for values in drawn.values():
        assert values.shape == (n,)
        assert np.isfinite(values).all()
    asked = {name: (0.0, 1.0) if pair is None else pair for name, pair in ranges.items()}
    assert len(inside(drawn, **asked)["age"]) == n


class TestDeterminism:
    def test_same_seed_same_rows(self):
        first, second = (UK_BIOBANK.draw(100, seed=42, age=(0.3, 0.9)) for _ in range(2))
        other = UK_BIOBANK.draw(100, seed=43, age=(0.3, 0.9))
        for name in NAMES:
            assert np.array_equal(first[name], second[name])
        assert not np.array_equal(first["age"], other["age"])

    def test_rows_are_pinned(self):
        """These change only with the distribution: a release note, and a new golden row."""
        drawn = UK_BIOBANK.draw(3, seed=2024)
        found = np.round(np.stack([drawn[name] for name in NAMES], axis=1), 6)
        assert found.tolist() == GOLDEN

    def test_generator(self):
        first, second = (UK_BIOBANK.draw(5, seed=np.random.default_rng(1)) for _ in range(2))
        assert np.array_equal(first["age"], second["age"])

    def test_chunks_leave_no_seam(self, monkeypatch):
        whole = UK_BIOBANK.draw(50, seed=1)
        monkeypatch.setattr(joint, "_CHUNK", 7)
        parts = UK_BIOBANK.draw(50, seed=1)
        assert parts["brain_volume"] == pytest.approx(whole["brain_volume"], abs=1e-12)


GOLDEN = [
    [1.0, 0.485992, 0.191066, 0.617263],
    [1.0, 0.905867, 0.343212, 0.454584],
    [0.0, 0.301189, 0.099959, 0.639405],
]


class TestBalanced:
    @pytest.mark.parametrize("n", [1, 2, 7, 1000])
    def test_exact(self, n):
        sex = UK_BIOBANK.draw(n, seed=n, sex="balanced", ventricular_volume=(0.6, 1.0))["sex"]
        assert sex.sum() == n // 2

    def test_shuffled(self):
        sex = UK_BIOBANK.draw(1000, sex="balanced")["sex"]
        assert 400 < np.abs(np.diff(sex)).sum() < 600
        assert 200 < sex[:500].sum() < 300


class TestFit:
    def test_recovers_the_parameters(self):
        rows = UK_BIOBANK.draw(50_000, seed=21)
        fitted = JointDistribution.fit(pd.DataFrame(rows))
        tolerances = {
            "male_proportion": 0.008, "age_mean": 0.15, "ventricular_level": 0.008,
            "ventricular_age": 0.0008, "ventricular_age2": 6e-5, "ventricular_male": 0.011,
            "ventricular_sd": 0.004, "brain_level": 1_500, "brain_age": 160, "brain_age2": 12,
            "brain_male": 2_200, "brain_ventricular": 0.1, "brain_sd": 750,
        }  # fmt: skip
        for name, tolerance in tolerances.items():
            assert getattr(fitted, name) == pytest.approx(getattr(UK_BIOBANK, name), abs=tolerance)

    def test_draws_like_the_rows(self, people):
        redrawn = JointDistribution.fit(people).draw(20_000, seed=1)
        for name in NAMES[1:]:
            assert ks_2samp(redrawn[name], people[name][:20_000]).statistic < 0.02, name

    def test_follows_an_age_histogram_with_two_humps(self):
        rng = np.random.default_rng(0)
        years = np.concatenate([rng.normal(50, 1.5, 3_000), rng.normal(75, 2, 1_000)]).round()
        rows = UK_BIOBANK.draw(4_000, seed=1) | {"age": AGE.normalise(years)}
        redrawn = AGE.denormalise(JointDistribution.fit(rows).draw(4_000, seed=2)["age"])
        assert (redrawn < 62).mean() == pytest.approx(0.75, abs=0.02)
        assert ((redrawn > 57) & (redrawn < 67)).mean() < 0.02
        assert redrawn[redrawn > 62].mean() == pytest.approx(75, abs=0.3)

    def test_stays_among_the_rows_unless_told(self):
        rows = UK_BIOBANK.draw(500, seed=3, age=(0.5, 0.8), ventricular_volume=(0.3, 0.6))
        fitted = JointDistribution.fit(rows)
        drawn = fitted.draw(2_000)
        for name in NAMES[1:]:
            assert drawn[name].min() >= rows[name].min()
            assert drawn[name].max() <= rows[name].max()
        assert fitted.draw(100, age=(0.0, 0.2))["age"].max() <= 0.2

    def test_constant_columns(self):
        rows = UK_BIOBANK.draw(
            60, sex=1, age=(0.5, 0.5), ventricular_volume=(0.2, 0.2), brain_volume=(0.4, 0.4)
        )
        fitted = JointDistribution.fit(rows)
        drawn = fitted.draw(10)
        assert [set(drawn[name]) for name in NAMES] == [{1.0}, {0.5}, {0.2}, {0.4}]
        elsewhere = fitted.draw(10, age=(0.9, 1.0), ventricular_volume=(0, 1), brain_volume=(0, 1))
        assert np.isfinite(elsewhere["brain_volume"]).all()

    def test_fewest_rows(self):
        drawn = JointDistribution.fit(UK_BIOBANK.draw(50, seed=5)).draw(100)
        assert all(np.isfinite(values).all() for values in drawn.values())


def rows_with(**changes):
    return UK_BIOBANK.draw(60, seed=1) | changes


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"n": 0}, "n must be at least 1, found 0"),
            ({"n": 2.5}, "n must be a whole number of rows, found 2.5"),
            ({"sex": "other"}, "\"balanced\", or None, found 'other'"),
            ({"sex": 0.5}, '(or 0 / 1), "balanced", or None, found 0.5'),
            ({"sex": math.nan}, "found nan"),
            ({"age": (0.8, 0.2)}, "age range is reversed: found (0.8, 0.2)"),
            ({"ventricular_volume": (math.nan, 1)}, "two finite numbers"),
            ({"brain_volume": (0.1,)}, "must be two numbers (low, high)"),
            ({"brain_volume": (1.2e6, 1.5e6)}, "did you mean natural units?"),
            ({"seed": -1}, "seed must be in [0, 2**64), found -1"),
            ({"seed": "one"}, "seed must be an integer or a Generator, found 'one'"),
        ],
    )
    def test_draw(self, arguments, message):
        with pytest.raises(CovariateError, match=re.escape(message)) as caught:
            UK_BIOBANK.draw(**({"n": 5} | arguments))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("sex", [1, "balanced"])
    def test_a_sex_the_rows_do_not_have(self, sex):
        women = JointDistribution.fit(UK_BIOBANK.draw(60, sex="female"))
        assert women.draw(20)["sex"].sum() == 0
        with pytest.raises(CovariateError, match="only sex 0"):
            women.draw(4, sex=sex)

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            (UK_BIOBANK.draw(49), "at least 50 rows, found 49"),
            ({"sex": [0], "age": [0]}, "lacks the covariate column(s) ventricular_volume, brain"),
            (rows_with(age=np.zeros(59)), "the columns must be of one length"),
            (rows_with(age=np.full(60, math.nan)), "row 0 has age = nan"),
            (rows_with(sex=np.full(60, 0.5)), "row 0 has sex = 0.5; expected 0 or 1"),
        ],
    )
    def test_fit(self, table, message):
        with pytest.raises(CovariateError, match=re.escape(message)):
            JointDistribution.fit(table)

    @pytest.mark.parametrize(
        "changes", [{"male_proportion": 1.1}, {"brain_sd": 0.0}, {"age_range": (1.0, 0.0)}]
    )
    def test_parameters(self, changes):
        with pytest.raises(CovariateError):
            replace(UK_BIOBANK, **changes)

    def test_frozen(self):
        with pytest.raises(FrozenInstanceError):
            UK_BIOBANK.age_sd = 1.0  # type: ignore[misc]


def test_import_leaves_scipy_alone():
    code = "import sys, synthbrain.joint; assert 'scipy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_documentation_runs(capsys):
    page = Path(__file__).parents[1] / "docs" / "covariates.md"
    if not page.exists():
        pytest.skip("installed without its documentation")
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, names)
    assert "ventricular volume, mean" in capsys.readouterr().out
