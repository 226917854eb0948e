"""Ranges as people type them: ``0.4:0.8``, ``59y:74y``, ``20mL:60mL``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from synthbrain.errors import UsageError

Range = tuple[float, float]

_END = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*([a-zµ]*[3³]?)\s*", re.IGNORECASE)
_YEARS = {"y": 1.0, "yr": 1.0, "years": 1.0}
_VOLUMES = {"ml": 1000.0, "mm3": 1.0, "mm³": 1.0}
_BEYOND = 5.0
"""No normalised covariate is so large: a unit was forgotten."""


@dataclass(frozen=True)
class Kind:
    """What one range option accepts, and which arguments of the library it becomes."""

    option: str
    normalised: str
    natural: str
    units: dict[str, float]
    example: str


KINDS = (
    Kind("--age", "age_range", "age_years", _YEARS, "59y:74y"),
    Kind("--ventricles", "ventricular_range", "ventricular_mm3", _VOLUMES, "20mL:60mL"),
    Kind("--brain", "brain_range", "brain_mm3", _VOLUMES, "1300mL:1500mL"),
)


def parse(kind: Kind, text: str) -> dict[str, Range]:
    """A range as the one keyword argument it stands for.

    Parameters
    ----------
    kind
        Which covariate's.
    text
        ``LO:HI``, or one value for both ends; each end normalised or with a unit.

    Raises
    ------
    UsageError
        Not a range, an unknown unit, two different units, or reversed.

    Examples
    --------
    >>> parse(KINDS[1], "20mL:60mL")
    {'ventricular_mm3': (20000.0, 60000.0)}
    """
    ends = [_end(kind, text, part) for part in text.split(":")]
    if len(ends) > 2:
        raise _refusal(kind, text, "has more than two ends")
    (low, unit), (high, other) = ends[0], ends[-1]
    if unit != other:
        raise _refusal(kind, text, f"mixes {unit or 'no unit'} and {other or 'no unit'}")
    if low > high:
        swapped = ":".join(reversed(text.split(":")))
        raise _refusal(kind, text, f"is reversed: write {swapped}", example=False)
    if unit:
        return {kind.natural: (low * kind.units[unit], high * kind.units[unit])}
    if max(abs(low), abs(high)) >= _BEYOND:
        raise _refusal(kind, text, "has no unit, and is no normalised range either")
    return {kind.normalised: (low, high)}


def _end(kind: Kind, text: str, part: str) -> tuple[float, str]:
    found = _END.fullmatch(part)
    if found is None or not math.isfinite(float(found[1])):
        raise _refusal(kind, text, "is not a range")
    unit = found[2].lower()
    if unit and unit not in kind.units:
        known = ", ".join("mL" if unit == "ml" else unit for unit in kind.units)
        raise _refusal(kind, text, f"has the unknown unit {found[2]!r} (known: {known})")
    return float(found[1]), unit


def _refusal(kind: Kind, text: str, why: str, *, example: bool = True) -> UsageError:
    hint = f"; write LO:HI, such as {kind.example} or 0.4:0.8" if example else ""
    return UsageError(f"{kind.option} {text!r} {why}{hint}")
