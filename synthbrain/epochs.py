"""The epoch of a dataset, which its samplers and its running workers share."""

from __future__ import annotations

from typing import Any

import torch


class Epoch:
    """A number that reaches running workers, and whether somebody chose it since it was last asked.

    Whoever sets the epoch of a dataset means the order, too; whoever sets that of a sampler means
    the patches, too. The later word counts.
    """

    def __init__(self) -> None:
        # Shared memory: workers that are already running see what is written.
        self._state = torch.zeros(2, dtype=torch.int64).share_memory_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._state.share_memory_()  # a pickled copy has workers of its own

    def __int__(self) -> int:
        return int(self._state[0])

    def choose(self, epoch: int) -> None:
        """Set it for whoever draws next, too."""
        self._state[0], self._state[1] = epoch, 1

    def begin(self, epoch: int) -> None:
        """Set it to what a sampler draws."""
        self._state[0] = epoch

    def taken(self) -> int | None:
        """What was chosen and not asked for yet."""
        chosen = int(self) if self._state[1] else None
        self._state[1] = 0
        return chosen
