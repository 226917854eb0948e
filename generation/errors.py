"""Errors of the models that users meet."""

from __future__ import annotations


class WeightsError(ValueError):
    """Weights that are not there, cannot be fetched, or are not what they should be."""


class TrainingError(ValueError):
    """A training run that cannot start, go on, or be read."""


class EvaluationError(ValueError):
    """Volumes, tables or files that cannot be evaluated."""
