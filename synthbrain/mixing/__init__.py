"""Real and synthetic volumes in one training set."""

from synthbrain.mixing.dataset import Mixed, as_subject, mix
from synthbrain.mixing.landmarks import Landmarks

__all__ = ["Landmarks", "Mixed", "as_subject", "mix"]
