"""Limits of what is measured of prepared scans."""

import pytest

from generation.quality import Measures


def sound(**changed):
    values = {
        "similarity": 1.2, "correlation": 0.7, "contrast": 2.0, "coverage": 1.0, "cut": 0.3,
        "low": 0.0, "high": 1.0, "rotation": 1.0, "shift": 1.0,
    }  # fmt: skip
    return Measures(**values | changed)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"similarity": 1.0}, "similarity"),
        ({"correlation": float("nan")}, "correlation"),
        ({"contrast": -2.0}, "contrast"),
        ({"coverage": 0.5}, "coverage"),
        ({"cut": 0.9}, "outside the grid"),
    ],
)
def test_each_measure_has_its_limit(changed, words):
    assert sound().problem() is None
    assert words in sound(**changed).problem()
