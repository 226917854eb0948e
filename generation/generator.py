"""What every generator is: a name, an identity, and rows in, volumes out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import pandas as pd
    import torch


@runtime_checkable
class Generator(Protocol):
    """Makes volumes from rows.

    The contract (checked by ``synthbrain.testing.check_generator``):

    - the volume of a row depends on that row alone, not on the batch it came in;
    - the same row gives the same volume up to rounding (1e-4) on any device;
    - values are finite, float32, in [0, 1]; no output is rescaled by its own minimum or maximum.
    """

    name: str
    """Short name users type, e.g. ``"phantom"``."""

    @property
    def digest(self) -> str:
        """At least 8 hex digits that change whenever the same row would give other voxels."""
        ...

    honours: frozenset[str]
    """Names of the covariates the volumes follow."""

    shape: tuple[int, int, int]
    """Voxels of one volume, ``(x, y, z)``."""

    batch_size: int
    """How many rows it likes to be given at once."""

    seconds_per_volume: float
    """Rough cost on this machine, for plans and progress bars."""

    def sample(self, rows: pd.DataFrame) -> torch.Tensor:
        """Make one volume per row.

        Parameters
        ----------
        rows
            Indexed by id, with the normalised covariate columns and an integer ``seed``.

        Returns
        -------
        torch.Tensor
            ``(n, 1, x, y, z)`` float32 in [0, 1], on the generator's device.
        """
        ...
