"""What it takes to have some volumes: a plan that looks and does not act."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from synthbrain.sizes import size_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Plan:
    """What it takes to have some rows. All index arrays count rows of the manifest.

    Parameters
    ----------
    stored
        Already on disk.
    fetch
        Rows to fetch, by source name.
    sample
        Rows the generator will make.
    unavailable
        Rows nothing here can give.
    bytes_to_store
        Disk the new volumes will take, estimated.
    bytes_to_fetch
        Bytes to transfer from sources.
    seconds
        Rough time for all of it.
    bytes_free
        Free disk where the store is.
    """

    stored: NDArray[np.int64]
    fetch: dict[str, NDArray[np.int64]]
    sample: NDArray[np.int64]
    unavailable: NDArray[np.int64]
    bytes_to_store: int
    bytes_to_fetch: int
    seconds: float
    bytes_free: int

    @property
    def missing(self) -> int:
        """Rows that are not stored and can be had."""
        return len(self.sample) + sum(map(len, self.fetch.values()))

    def __str__(self) -> str:
        lines = [f"{len(self.stored):,} stored"]
        lines += [f"{len(rows):,} to fetch from {name}" for name, rows in self.fetch.items()]
        if len(self.sample):
            lines.append(f"{len(self.sample):,} to sample")
        if len(self.unavailable):
            lines.append(f"{len(self.unavailable):,} not available")
        if self.missing:
            lines.append(f"about {_duration(self.seconds)}")
            lines.append(
                f"{size_text(self.bytes_to_store)} of {size_text(self.bytes_free)} free disk"
            )
        if self.bytes_to_fetch:
            lines.append(f"{size_text(self.bytes_to_fetch)} to transfer")
        return ", ".join(lines)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
