"""StreamSampler: a stream's order, split over ranks and exact to resume."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from synthbrain.errors import UsageError
from synthbrain.sampler import SynthBrainSampler
from synthbrain.stream.order import runs_of, stream_order

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from synthbrain.stream.dataset import SynthBrainStream


class StreamSampler(SynthBrainSampler):
    """Rows in the order of :func:`synthbrain.stream.stream_order`, fetched ahead in runs.

    Parameters
    ----------
    stream
        The stream to sample from, whose window this takes.
    options
        As of :class:`synthbrain.SynthBrainSampler`: ``shuffle``, ``rank``, ``world_size``,
        ``drop_last``; ``seed`` is the stream's by default, and ``ahead`` what its cache allows.

    Raises
    ------
    UsageError
        An argument makes no sense, or ranks would get no rows.

    Notes
    -----
    A state is that of :class:`synthbrain.SynthBrainSampler` and one number more, ``window``: the
    rows that are left are the same with any number of workers, ranks and machines, whatever the
    cache holds.
    """

    def __init__(self, stream: SynthBrainStream, **options: Any) -> None:
        self._stream = stream
        self._runs = runs_of(stream.manifest.positions)
        super().__init__(stream, **{"seed": stream.seed, "ahead": stream.ahead} | options)

    def _order(self) -> NDArray[np.int64]:
        return stream_order(self._runs, self._seed, self._epoch, self._stream.window)

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """Where in the order training is, as :meth:`SynthBrainSampler.state_dict`."""
        return {**super().state_dict(consumed), "window": self._stream.window}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, of a run with any number of ranks and workers.

        Raises
        ------
        UsageError
            A state of other rows or of another window, or one that :meth:`state_dict` never
            returned.
        """
        window = state.get("window")
        if window != self._stream.window:
            raise UsageError(
                f"this state is of an order with window={window}, and the stream's is "
                f"{self._stream.window}; open the stream with the window the state was saved with"
            )
        super().load_state_dict(state)
