"""A generator of fixed cost that leaves the CPU free, as one on a GPU does: it sleeps."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from synthbrain.testing import TinyGenerator

if TYPE_CHECKING:
    import pandas as pd
    import torch

BATCH = 4
"""Rows it likes at once."""


class TimedGenerator(TinyGenerator):
    """Takes a fixed time for each volume; a process makes one batch after the other.

    Parameters
    ----------
    seconds
        What a volume costs.
    edge
        Voxels along each axis.
    """

    name = "timed"

    def __init__(self, seconds: float, edge: int) -> None:
        super().__init__((edge, edge, edge), batch_size=BATCH)
        self.seconds_per_volume = seconds

    def sample(self, rows: pd.DataFrame) -> torch.Tensor:
        """Volumes of noise, ``(n, 1, x, y, z)``, no sooner than they are due."""
        due = time.monotonic() + self.seconds_per_volume * len(rows)
        volumes = super().sample(rows)
        time.sleep(max(0.0, due - time.monotonic()))
        return volumes


def make() -> TimedGenerator:
    """One whose volumes are small enough not to matter beside what they cost."""
    return TimedGenerator(0.1, 48)


def quick() -> TimedGenerator:
    """The same for a short look."""
    return TimedGenerator(0.01, 16)
