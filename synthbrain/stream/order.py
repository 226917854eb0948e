"""The order of a stream: runs of neighbours shuffled, then rows mixed within a window.

Neighbours in a pack cost one request, so a stream wants them together; training wants rows of all
packs in every batch. Both are had by shuffling *runs*, up to :data:`RUN` neighbours, over the whole
set, and then moving each row onwards by a random part of a *window* that many runs share.

The order is a pure function of one integer, ``seed + 2**64 * epoch``, the key of Philox, and of
where the rows lie. Nothing in it depends on workers, ranks, the cache or what has arrived.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from synthbrain.store import BLOCK

if TYPE_CHECKING:
    from numpy.typing import NDArray

RUN = 10
"""Neighbours fetched together: 20 to 30 MB, one request. No run crosses from pack to pack."""

WINDOW = 1024
"""Rows mixed with one another: see ``benchmarks/shuffle.md``."""

assert BLOCK % RUN == 0

_STREAM = int.from_bytes(b"stream", "big")
"""High word of Philox's counter: keys are shared with other draws of a seed, numbers are not."""


def runs_of(positions: NDArray[np.integer], run: int = RUN) -> NDArray[np.int64]:
    """The run each volume belongs to, by its position in the packs: ``(n,)``."""
    return np.asarray(positions, dtype=np.int64) // run


def stream_order(
    runs: NDArray[np.int64], seed: int, epoch: int, window: int = WINDOW
) -> NDArray[np.int64]:
    """The rows of an epoch in the order all ranks together go through them.

    Parameters
    ----------
    runs
        ``(n,)`` the run of each row.
    seed, epoch
        In [0, 2**64).
    window
        Over how many rows those of a run are spread, at least 1.

    Returns
    -------
    ndarray
        ``(n,)``, a permutation of ``range(n)``: 25 ms for 100,000 rows.

    Examples
    --------
    >>> stream_order(np.array([0, 0, 0, 1, 1, 1]), seed=0, epoch=0, window=1).tolist()
    [2, 1, 0, 4, 5, 3]
    """
    _, members, sizes = np.unique(runs, return_inverse=True, return_counts=True)
    draw = np.random.Philox(
        key=np.array([seed, epoch], np.uint64), counter=np.array([0, 0, 0, _STREAM], np.uint64)
    )
    shuffled = np.argsort(draw.random_raw(len(sizes)), kind="stable")
    starts = np.empty(len(sizes), np.int64)
    starts[shuffled] = np.cumsum(sizes[shuffled]) - sizes[shuffled]
    parts = (draw.random_raw(len(members)) >> np.uint64(11)) * 2.0**-53  # in [0, 1)
    return np.argsort(starts[members] + parts * window, kind="stable")
