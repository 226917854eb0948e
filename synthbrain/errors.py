"""The errors of the package: each is also the builtin error a caller would expect."""

from __future__ import annotations

from generation.covariates import CovariateError
from generation.errors import EvaluationError, TrainingError, WeightsError

__all__ = [
    "CovariateError",
    "DamagedShardError",
    "EvaluationError",
    "GeneratorError",
    "GeometryError",
    "ManifestError",
    "MissingVolumeError",
    "SourceError",
    "StoreError",
    "StoreFullError",
    "SynthBrainError",
    "TrainingError",
    "UsageError",
    "WeightsError",
]


class SynthBrainError(Exception):
    """Base of everything the package raises on purpose."""


class UsageError(SynthBrainError, ValueError):
    """An argument that makes no sense: unknown split, empty selection, n = 0."""


class ManifestError(SynthBrainError, ValueError):
    """A manifest that is unknown, damaged, from the future, or not usable yet."""


class GeometryError(SynthBrainError, ValueError):
    """Volumes of another shape, type or affine than the manifest says."""


class StoreError(SynthBrainError, OSError):
    """The store cannot do what was asked."""


class StoreFullError(StoreError):
    """No room left for another volume. Nothing half-written is left behind."""


class DamagedShardError(StoreError):
    """A shard whose bytes do not match their checksums."""


class MissingVolumeError(SynthBrainError, LookupError):
    """A row whose volume is not stored and may not be made."""


class GeneratorError(SynthBrainError, ValueError):
    """An unknown generator, or one that cannot make these rows."""


class SourceError(SynthBrainError, OSError):
    """A source that cannot be opened or gave something other than the volume asked for."""
