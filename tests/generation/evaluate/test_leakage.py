"""What moves when a covariate is moved."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from generation.covariates import NAMES, CovariateError
from generation.errors import EvaluationError
from generation.evaluate.leakage import leakage, sweep_report, sweep_rows

BASE = {"sex": 1.0, "age": 0.5, "ventricular_volume": 0.3, "brain_volume": 0.6}


def cohort(seed, n=400, noise=0.1):
    """Age and ventricles that go together, and measurements with a known leak."""
    draw = np.random.default_rng(seed)
    age = draw.standard_normal(n)
    asked = {"age": age, "ventricular_volume": 0.6 * age + 0.8 * draw.standard_normal(n)}
    measured = {
        "age": 2 * age + 0.5 * asked["ventricular_volume"] + noise * draw.standard_normal(n),
        "ventricular_volume": asked["ventricular_volume"] + noise * draw.standard_normal(n),
    }
    return asked, measured


class TestLeakage:
    def test_known_slopes_though_covariates_go_together(self):
        asked, measured = cohort(0)
        found = leakage(asked, measured)
        spread = {name: np.std(values) for name, values in (asked | {}).items()}
        leak = 0.5 * spread["ventricular_volume"] / np.std(measured["age"])
        assert found.slopes[0, 1] == pytest.approx(leak, abs=4 * found.errors[0, 1])
        assert found.slopes[1, 0] == pytest.approx(0, abs=4 * found.errors[1, 0])
        assert found.slopes[1, 1] == pytest.approx(1, abs=0.03)
        assert (found.measured, found.asked) == (tuple(measured), tuple(asked))

    def test_parity_with_the_normal_equations(self):
        asked, measured = cohort(1, n=50, noise=1.0)
        found = leakage(asked, measured)
        design = np.stack([np.ones(50), *asked.values()], axis=1)
        for row, values in enumerate(measured.values()):
            inverse = np.linalg.inv(design.T @ design)
            slopes = inverse @ design.T @ values
            variance = ((values - design @ slopes) ** 2).sum() / (50 - 3)
            errors = np.sqrt(variance * np.diag(inverse))
            scale = np.array([np.std(x) for x in asked.values()]) / np.std(values)
            assert found.slopes[row] == pytest.approx(slopes[1:] * scale)
            assert found.errors[row] == pytest.approx(errors[1:] * scale)

    @settings(max_examples=20)
    @given(seed=st.integers(0, 99), scale=st.floats(1e-3, 1e6), shift=st.floats(-1e3, 1e3))
    def test_units_do_not_matter(self, seed, scale, shift):
        asked, measured = cohort(seed, n=40)
        other = {name: shift * scale + scale * values for name, values in measured.items()}
        found, again = leakage(asked, measured), leakage(asked, other)
        assert again.slopes == pytest.approx(found.slopes, abs=1e-6)

    def test_failures_are_left_out_of_their_own_regression(self):
        asked, measured = cohort(2)
        measured["age"][:7] = np.nan
        assert leakage(asked, measured).n == (393, 400)

    def test_what_cannot_be_told_is_refused(self):
        asked, measured = cohort(3, n=20)
        for given_, taken, says in (
            (asked | {"sex": np.ones(20)}, measured, "asked sex is 1 in all rows"),
            (asked | {"copy": 3 * asked["age"]}, measured, "follow from one another"),
            (asked, {"age": np.zeros(20)}, "measured age is 0 in all rows"),
            (asked, {"age": np.full(20, np.nan)}, "0 measurements of age are too few"),
            (asked, {"age": np.zeros(19)}, r"found \(20,\) and \(19,\)"),
            ({}, measured, "nothing to compare"),
        ):
            with pytest.raises(EvaluationError, match=says):
                leakage(given_, taken)


class TestSweeps:
    def test_rows_move_one_covariate_at_fixed_seeds(self):
        rows = sweep_rows("age", (0, 0.5, 1.2), base=BASE, seeds=(7, 8))
        assert list(rows.columns) == [*NAMES, "seed"]
        assert rows.index.is_unique
        assert rows["age"].tolist() == [0, 0.5, 1.2] * 2
        assert rows["seed"].tolist() == [7] * 3 + [8] * 3
        for name in set(NAMES) - {"age"}:
            assert set(rows[name]) == {BASE[name]}

    def test_report_finds_slope_leak_and_steps(self):
        rows = sweep_rows("age", np.linspace(0, 1, 5), base=BASE, seeds=range(20))
        draw = np.random.default_rng(0)
        of_seed = draw.standard_normal(20)[rows["seed"]]  # differs by seed, not along a sweep
        age = rows["age"].to_numpy()
        measured = {"age": 0.9 * age + of_seed, "ventricular_volume": 0.25 * age - of_seed,
                    "brain_volume": of_seed + 0.01 * draw.standard_normal(100)}  # fmt: skip
        found = sweep_report(rows, measured, covariate="age")
        assert (found.n, found.n_failed, found.monotone) == (100, 0, 1)
        assert found.slopes["age"].value == pytest.approx(0.9)
        assert found.slopes["ventricular_volume"].value == pytest.approx(0.25)
        assert found.slopes["brain_volume"].low < 0 < found.slopes["brain_volume"].high
        assert found.slopes["brain_volume"].value == pytest.approx(0, abs=0.02)

    def test_steps_back_and_failures(self):
        rows = sweep_rows("age", (0, 0.5, 1), base=BASE, seeds=(1, 2))
        values = [0, 1, 2, 5, 4, np.nan]
        found = sweep_report(rows, {"age": values}, covariate="age")
        assert found.n_failed == 1
        assert found.monotone == pytest.approx(2 / 3)

    def test_order_of_rows_does_not_matter(self):
        rows = sweep_rows("age", (0, 0.5, 1), base=BASE, seeds=(1, 2))
        values = pd.Series([0, 1, 2.5, 3, 5, 4.0], index=rows.index)
        mixed = rows.sample(frac=1, random_state=0)
        found = sweep_report(rows, {"age": values}, covariate="age")
        again = sweep_report(mixed, {"age": values[mixed.index]}, covariate="age")
        assert again.monotone == found.monotone
        assert again.slopes["age"].value == pytest.approx(found.slopes["age"].value)

    def test_nothing_measured_twice(self):
        rows = sweep_rows("age", (0, 1), base=BASE, seeds=(1,))
        found = sweep_report(rows, {"age": [0.2, np.nan]}, covariate="age")
        assert found.monotone is None
        assert found.slopes["age"] is None

    def test_sweeps_that_make_no_sense_are_refused(self):
        with pytest.raises(EvaluationError, match="found 1 values and 1 seeds"):
            sweep_rows("age", (0.5, 0.5), base=BASE, seeds=(1,))
        with pytest.raises(EvaluationError, match="base lacks sex, ventricular_volume"):
            sweep_rows("age", (0, 1), base={"brain_volume": 0}, seeds=(1,))
        with pytest.raises(CovariateError, match="unknown covariate 'hair'"):
            sweep_rows("hair", (0, 1), base=BASE, seeds=(1,))
        rows = sweep_rows("age", (0, 1), base=BASE, seeds=(1,))
        with pytest.raises(EvaluationError, match="moved age, found measurements of brain_volume"):
            sweep_report(rows, {"brain_volume": [0, 1]}, covariate="age")
