"""Which pairs of volumes are compared, and in an order that reads each volume few times."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from generation.errors import EvaluationError

Pair = tuple[int, int]


class Step(NamedTuple):
    """Read a volume, compare pairs it completes, forget another volume (before it is read)."""

    read: int
    forget: int | None
    compare: list[Pair]


def pairs(n: int, count: int, seed: int = 0) -> list[Pair]:
    """Distinct unordered pairs of ``n`` things, drawn without repetition.

    Parameters
    ----------
    n
        How many things; at least 2.
    count
        How many pairs; all there are if it exceeds ``n (n - 1) / 2``.
    seed
        Of the draw.

    Returns
    -------
    list of pairs
        In ascending order, the lower index first.

    Raises
    ------
    EvaluationError
        Fewer than two things, or fewer than one pair.
    """
    if n < 2 or count < 1:
        raise EvaluationError(f"cannot draw {count} pairs of {n} volumes: need 1 pair of 2 or more")
    there = n * (n - 1) // 2
    draw = np.random.Generator(np.random.Philox(seed))
    chosen = range(there) if count >= there else draw.choice(there, count, replace=False)
    return sorted(_unranked(int(rank)) for rank in chosen)


def _unranked(rank: int) -> Pair:
    """The pair at a place of the list (0, 1), (0, 2), (1, 2), (0, 3) ..."""
    high = (1 + math.isqrt(1 + 8 * rank)) // 2
    return rank - high * (high - 1) // 2, high


def reading_order(wanted: Iterable[Pair], resident: int) -> Iterator[Step]:
    """An order of work that reads each volume few times.

    Always next is the volume that completes most pairs with those in memory; the one with fewest
    pairs left makes room, its partners last.

    Parameters
    ----------
    wanted
        Pairs of distinct indices, none twice.
    resident
        Most volumes in memory at a time; at least 2.

    Raises
    ------
    EvaluationError
        Fewer than two may be in memory.
    """
    if resident < 2:
        raise EvaluationError(f"cannot compare with {resident} volumes in memory: allow 2 or more")
    work = _Work(wanted)
    while work.near:
        yield work.step(resident)


class _Work:
    """Pairs that are left to compare, and volumes in memory.

    ``left`` has the partners each volume still misses, ``held`` the volumes in memory, and
    ``near`` the others that have pairs left, with how many of these are in memory.
    """

    def __init__(self, wanted: Iterable[Pair]) -> None:
        self.left: dict[int, set[int]] = {}
        for first, second in wanted:
            self.left.setdefault(first, set()).add(second)
            self.left.setdefault(second, set()).add(first)
        self.held: set[int] = set()
        self.near = dict.fromkeys(sorted(self.left), 0)

    def step(self, resident: int) -> Step:
        """Do the next step."""
        read = max(self.near, key=lambda index: (self.near[index], len(self.left[index])))
        forget = self._spare(read, resident)
        if forget is not None:
            self._forget(forget)
        del self.near[read]
        partners = self.left[read]
        done = sorted(partners & self.held)
        for other in done:
            self.left[other].remove(read)
        partners.difference_update(done)
        for other in partners:
            self.near[other] += 1
        self.held.add(read)
        return Step(read, forget, [(min(read, other), max(read, other)) for other in done])

    def _spare(self, read: int, resident: int) -> int | None:
        """The volume to forget: one with nothing left, or the best one where room is needed."""
        partners = self.left[read]
        spare = min(self.held, key=lambda i: (i in partners, len(self.left[i]), i), default=None)
        if spare is None or (len(self.held) < resident and self.left[spare]):
            return None
        return spare

    def _forget(self, index: int) -> None:
        """Take back what a volume counted for; it is read again if it has pairs left."""
        self.held.remove(index)
        for other in self.left[index] - self.held:
            self.near[other] -= 1
        if self.left[index]:
            self.near[index] = len(self.left[index] & self.held)
