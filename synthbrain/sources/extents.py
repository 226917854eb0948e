"""Byte ranges of large files, wherever the file lies.

A volume inside an archive or a pack is an extent of it. Whatever can hand out extents (a file on
disk, a web server, a torrent) is a :class:`Bytes`, and the same index serves all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from synthbrain.sources.base import Cost


class Extent(NamedTuple):
    """``size`` bytes from ``offset`` on."""

    offset: int
    size: int

    @property
    def end(self) -> int:
        """Offset of the first byte behind it."""
        return self.offset + self.size

    def within(self, other: Extent) -> bool:
        """Whether ``other`` covers it."""
        return other.offset <= self.offset and self.end <= other.end


@runtime_checkable
class Bytes(Protocol):
    """One large file that gives out extents of itself.

    The contract:

    - :meth:`cost` and :meth:`waves` change nothing and transfer nothing;
    - :meth:`read` yields every extent asked for exactly once, complete, in any order, and retries
      what may pass by itself; closing the iterator stops the work;
    - extents that lie in the file are assumed: whoever makes them checks them.
    """

    @property
    def name(self) -> str:
        """Short name for messages and progress."""
        ...

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        ...

    @property
    def unit(self) -> int:
        """Fewest bytes worth asking for: a piece, or what a request is worth."""
        ...

    def cost(self, extents: Sequence[Extent]) -> Cost:
        """What reading them would transfer and take."""
        ...

    def waves(self, extents: Sequence[Extent]) -> Iterable[Sequence[Extent]]:
        """The extents in groups to be read one after the other, each within what disk allows."""
        ...

    def read(self, extents: Sequence[Extent]) -> Iterator[tuple[Extent, bytes]]:
        """Yield each extent with its bytes as they arrive.

        Raises
        ------
        SourceError
            They cannot be had, or are not what the file's own checksums say.
        """
        ...

    def spare(self) -> list[Extent]:
        """Longest runs of bytes that are here already, read for other extents of this wave."""
        ...

    def close(self) -> None:
        """Stop whatever works in the background."""
        ...


def coalesce(
    extents: Iterable[Extent], *, gap: int, limit: int
) -> list[tuple[Extent, list[Extent]]]:
    """Group extents that lie close together into requests.

    Parameters
    ----------
    extents
        In any order; may touch or overlap.
    gap
        Unwanted bytes to read rather than start another request.
    limit
        Largest request; a single larger extent is a request of its own.

    Returns
    -------
    list
        ``(request, extents)`` by offset, every extent within its request.

    Examples
    --------
    >>> [request for request, _ in coalesce([Extent(0, 10), Extent(12, 8)], gap=4, limit=100)]
    [Extent(offset=0, size=20)]
    """
    groups: list[tuple[Extent, list[Extent]]] = []
    for extent in sorted(extents):
        if groups:
            request, members = groups[-1]
            size = max(request.end, extent.end) - request.offset
            if extent.offset - request.end <= gap and size <= limit:
                groups[-1] = (Extent(request.offset, size), [*members, extent])
                continue
        groups.append((extent, [extent]))
    return groups
