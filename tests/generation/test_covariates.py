import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from generation.covariates import (
    AGE,
    BRAIN_VOLUME,
    COVARIATES,
    NAMES,
    VENTRICULAR_VOLUME,
    CovariateError,
    by_name,
    check_range,
    conditioning,
    parse_sex,
)

covariates = st.sampled_from(COVARIATES)


def rows(**changes):
    columns = {name: [0.25, 0.5] for name in NAMES} | changes
    return pd.DataFrame(columns, index=["a", "b"])


def test_the_order_is_that_of_the_published_model():
    assert NAMES == ("sex", "age", "ventricular_volume", "brain_volume")


def test_ranges_are_the_published_ones():
    assert AGE.normalise([44, 82]).tolist() == [0, 1]
    assert VENTRICULAR_VOLUME.denormalise([0, 1]).tolist() == pytest.approx([6995.68, 171375])
    assert BRAIN_VOLUME.denormalise([0, 1]).tolist() == [1144240, 1793910]


@given(covariates, st.floats(-5, 5))
def test_normalising_undoes_denormalising(covariate, value):
    assert float(covariate.normalise(covariate.denormalise(value))) == pytest.approx(
        value, abs=1e-9
    )


def test_conditioning_vectors_are_in_order_whatever_the_columns_are():
    table = rows(sex=[0, 1], age=[0.1, 0.2])
    vectors = conditioning(table[list(reversed(table.columns))].assign(extra="x"))
    assert vectors.dtype == np.float32
    assert vectors.tolist() == np.float32([[0, 0.1, 0.25, 0.25], [1, 0.2, 0.5, 0.5]]).tolist()


def test_a_missing_column_is_named():
    with pytest.raises(CovariateError, match=r"column\(s\) age, brain_volume; found"):
        conditioning(rows().drop(columns=["age", "brain_volume"]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_a_value_that_is_not_finite_is_named_with_its_row(bad):
    with pytest.raises(CovariateError, match="row 'b' has age"):
        conditioning(rows(age=[0.5, bad]))


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_range_in_order_is_returned_as_it_is(one, other):
    low, high = sorted((one, other))
    assert check_range("age", (low, high)) == (low, high)


@given(covariates, st.floats(-3, 3), st.floats(-3, 3))
def test_a_natural_range_is_returned_normalised(covariate, one, other):
    low, high = sorted((one, other))
    natural = tuple(covariate.denormalise((low, high)).tolist())
    found = check_range(covariate.name, natural, extrapolate=True, natural=True)
    assert found == pytest.approx((low, high), abs=1e-9)


@pytest.mark.parametrize("bounds", [[0, 1], np.array([0, 1]), ("0", "1"), (False, True)])
def test_any_pair_of_numbers_is_a_range(bounds):
    assert check_range("age", bounds) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("bounds", "options", "says"),
    [
        (0.5, {}, "must be two numbers (low, high), found 0.5"),
        ((1,), {}, "must be two numbers"),
        ((0, 1, 2), {}, "must be two numbers"),
        (("a", "b"), {}, "must be two numbers"),
        ((None, 1), {}, "must be two numbers"),
        ((math.nan, 1), {}, "two finite numbers, found (nan, 1.0)"),
        ((0, math.inf), {"extrapolate": True}, "two finite numbers"),
        ((0.8, 0.2), {}, "reversed: found (0.8, 0.2), expected low <= high; write (0.2, 0.8)"),
        ((75, 70), {"natural": True}, "reversed: found (75, 70)"),
        ((0.5, 1.2), {}, "(0.5, 1.2) leaves the trained range [0, 1] (44 to 82 years)"),
        ((70, 90), {"natural": True}, "(70, 90) leaves the trained range [0, 1] (44 to 82 years)"),
        ((-0.1, 0.5), {}, "or pass extrapolate=True (--extrapolate) to go beyond"),
    ],
)
def test_what_is_no_range_is_refused_in_the_users_own_numbers(bounds, options, says):
    with pytest.raises(CovariateError) as refused:
        check_range("age", bounds, argument="--age", **options)
    assert str(refused.value).startswith("--age")
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_large_numbers_are_shown_whole():
    with pytest.raises(CovariateError, match=r"\(1000000, 1500000\) leaves .* \(1,144,240 to 1,79"):
        check_range("brain_volume", (1_000_000, 1_500_000), natural=True)


def test_extrapolating_is_allowed_when_asked_for():
    assert check_range("age", (-1, 2), extrapolate=True) == (-1.0, 2.0)


@pytest.mark.parametrize(
    ("sex", "value"),
    [
        ("female", 0),
        ("male", 1),
        ("F", 0),
        ("m", 1),
        ("Male", 1),
        (0, 0),
        (1.0, 1),
        (np.int64(1), 1),
    ],
)
def test_sexes_have_names_initials_and_numbers(sex, value):
    assert parse_sex(sex) == value
    assert type(parse_sex(sex)) is float


@pytest.mark.parametrize("sex", ["unknown", "", "balanced", 2, 0.5, math.nan, None])
def test_any_other_sex_is_refused(sex):
    with pytest.raises(CovariateError, match=r'sex must be "female" or "male" \(or 0 / 1\), found'):
        parse_sex(sex)


def test_covariates_are_found_by_name():
    assert by_name("age") is AGE
    with pytest.raises(CovariateError, match="unknown covariate 'weight'; expected one of sex"):
        by_name("weight")
