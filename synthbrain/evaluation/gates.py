"""Conditions on figures, for continuous integration: ``ventricles.r>=0.95``."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from synthbrain.errors import UsageError
from synthbrain.evaluation.metrics import part_of

_COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_FORM = re.compile(r"\s*([^<>=\s][^<>=]*?)\s*(>=|<=|>|<)\s*([-+.\deE]+)\s*")


@dataclass(frozen=True)
class Gate:
    """A condition on one figure.

    Parameters
    ----------
    metric, comparison, limit
        Such as ``"ventricles.r"``, ``">="`` and 0.95.
    """

    metric: str
    comparison: str
    limit: float

    @classmethod
    def read(cls, text: str) -> Gate:
        """A condition out of its text.

        Raises
        ------
        UsageError
            It is none, or of a figure that no evaluation has.

        Examples
        --------
        >>> Gate.read("age.mae <= 5")
        Gate(metric='age.mae', comparison='<=', limit=5.0)
        """
        found = _FORM.fullmatch(text)
        try:
            if found is None:
                raise ValueError
            gate = cls(found[1], found[2], float(found[3]))
        except ValueError:
            raise UsageError(
                f"{text!r} is no condition; write one such as ventricles.r>=0.95"
            ) from None
        part_of(gate.metric)
        return gate

    @property
    def part(self) -> str:
        """The part of an evaluation that tells the figure."""
        return part_of(self.metric)

    def __str__(self) -> str:
        return f"{self.metric} {self.comparison} {self.limit:g}"

    def failure(self, metrics: Mapping[str, float]) -> str | None:
        """Why the figures do not pass; None where they do.

        Parameters
        ----------
        metrics
            By name.

        Raises
        ------
        UsageError
            The figure was not measured.
        """
        value = metrics.get(self.metric)
        if value is None:
            raise UsageError(
                f"{self.metric!r} was not measured; there are "
                f"{', '.join(sorted(metrics)) or 'no figures'}"
            )
        if math.isfinite(value) and _COMPARE[self.comparison](value, self.limit):
            return None
        return f"{self.metric} is {value:.4g}, required {self.comparison} {self.limit:g}"
