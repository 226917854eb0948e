"""What every source is: ids in, volumes out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from synthbrain.header import Geometry


Payload = Any
"""A volume: an array of stored values (``geometry.dtype``), or the bytes of its shard."""


@dataclass(frozen=True)
class Cost:
    """What fetching some volumes would take."""

    bytes: int
    seconds: float


@runtime_checkable
class Source(Protocol):
    """Somewhere published volumes, or volumes a generator made, can be had.

    The contract (checked by ``synthbrain.testing.check_source``):

    - :meth:`holds` and :meth:`cost` change nothing and are quick;
    - :meth:`fetch` yields every volume that was asked for once, leaves out those it cannot give,
      and may add others of the same set that came along with them;
    - arrays are checked against ``geometry`` before they are yielded; shards are checked by
      whoever receives them;
    - what may pass is retried; :class:`synthbrain.SourceError` means that asking again is no use;
    - closing the iterator stops the work.
    """

    name: str
    """Short name for messages and progress."""

    made_by: str
    """``"published"``, or the identity of the generator whose volumes these are."""

    def holds(self, ids: Sequence[str]) -> NDArray[np.bool_]:
        """Which of the ids it can give, ``(n,)``."""
        ...

    def cost(self, ids: Sequence[str]) -> Cost:
        """What fetching them would take."""
        ...

    def fetch(self, ids: Sequence[str], geometry: Geometry) -> Iterator[tuple[str, Payload]]:
        """Yield ``(id, volume)`` as they arrive.

        Raises
        ------
        SourceError
            It cannot go on.
        """
        ...
