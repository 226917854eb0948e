import pytest

from synthbrain.cli.ranges import KINDS, parse
from synthbrain.errors import UsageError

AGE, VENTRICLES, BRAIN = KINDS


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (AGE, "0.4:0.8", {"age_range": (0.4, 0.8)}),
        (AGE, "59y:74y", {"age_years": (59.0, 74.0)}),
        (AGE, " 59 y : 74 Years ".replace("Years", "y"), {"age_years": (59.0, 74.0)}),
        (AGE, "70y", {"age_years": (70.0, 70.0)}),
        (AGE, ".5", {"age_range": (0.5, 0.5)}),
        (VENTRICLES, "20mL:60mL", {"ventricular_mm3": (20_000.0, 60_000.0)}),
        (VENTRICLES, "20000mm3:60000mm3", {"ventricular_mm3": (20_000.0, 60_000.0)}),
        (VENTRICLES, "20000mm³:6e4mm³", {"ventricular_mm3": (20_000.0, 60_000.0)}),
        (VENTRICLES, "-0.5:1.9", {"ventricular_range": (-0.5, 1.9)}),
        (BRAIN, "1300ml:1500ML", {"brain_mm3": (1_300_000.0, 1_500_000.0)}),
    ],
)
def test_a_range_becomes_one_argument_of_the_library(kind, text, expected):
    assert parse(kind, text) == expected


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        (AGE, "74y:59y", "is reversed: write 59y:74y"),
        (AGE, "59y:74", "mixes y and no unit"),
        (AGE, "59:74", "has no unit"),
        (AGE, "20mL:60mL", "unknown unit 'mL' (known: y, yr, years)"),
        (AGE, "", "is not a range"),
        (AGE, "young", "is not a range"),
        (AGE, "nan:1", "is not a range"),
        (AGE, "0.1:1e999", "is not a range"),
        (AGE, "0.1:", "is not a range"),
        (AGE, "0.1:0.2:0.3", "more than two ends"),
        (VENTRICLES, "20mL:60000mm3", "mixes ml and mm3"),
        (VENTRICLES, "59y:74y", "unknown unit 'y' (known: mL, mm3, mm³)"),
        (BRAIN, "1300:1500", "has no unit"),
    ],
)
def test_what_is_no_range_is_refused_with_the_option_and_an_example(kind, text, says):
    with pytest.raises(UsageError) as refused:
        parse(kind, text)
    assert says in str(refused.value)
    assert str(refused.value).startswith(f"{kind.option} {text!r}")
