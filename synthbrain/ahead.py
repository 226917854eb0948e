"""Having rows fetched and made before they are asked for."""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from synthbrain.errors import SynthBrainError
from synthbrain.sampling.client import SharedGenerator
from synthbrain.sampling.routing import RoutedGenerator

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from synthbrain.resolver import Resolver

log = logging.getLogger("synthbrain")

_THREADS = 2
"""One waits for the generator while the other stores what it made."""

_STRIDE = 64
"""Rows looked up at once."""

_FETCHED = 16
"""Rows fetched at once: neighbours come in one request."""

_EXIT_SECONDS = 10.0


class Supply(Protocol):
    """What a :class:`LookAhead` needs to know of a dataset."""

    @property
    def batch(self) -> int:
        """How many missing rows to have at once."""
        ...

    def missing(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of some rows it is worth to have early, ``(n,)``."""
        ...

    def prepare(self, rows: NDArray[np.int64]) -> bool:
        """Have rows; whether it is worth going on."""
        ...


@runtime_checkable
class HasSupply(Protocol):
    """A dataset whose rows can be had before they are asked for."""

    def supply(self) -> Supply | None:
        """How; None where nothing can be."""
        ...


class Missing:
    """The missing rows of a resolver: those that it fetches, or has a sampling service make.

    Parameters
    ----------
    resolver
        What makes its volumes must be in a process of its own: one within this process would
        compute when a row is asked for and beside that, which no generator promises to stand.
    """

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver
        self._made = threading.Event()
        weakref.finalize(self, _sweep, resolver, self._made)
        self._is_here = np.zeros(len(resolver.manifest), dtype=bool)

    @property
    def can_sample(self) -> bool:
        """Whether a service makes what is missing."""
        return isinstance(self._resolver.generator, (RoutedGenerator, SharedGenerator))

    @property
    def batch(self) -> int:
        """As many rows as the generator likes, or as are worth a request."""
        generator = self._resolver.generator
        return _FETCHED if generator is None or not self.can_sample else generator.batch_size

    def missing(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of some rows are not stored; those that once were are not looked for again."""
        new = rows[~self._is_here[rows]]
        self._is_here[new] = self._resolver.stored(new)
        return ~self._is_here[rows]

    def prepare(self, rows: NDArray[np.int64]) -> bool:
        """Fetch and make rows; False if they cannot be kept."""
        resolver, generator = self._resolver, self._resolver.generator
        plan = resolver.plan(rows.tolist())
        plan = replace(plan, unavailable=plan.unavailable[:0])
        execute = resolver.execute
        if isinstance(generator, RoutedGenerator) and len(plan.sample):
            generator.share()
        elif not isinstance(generator, SharedGenerator):
            execute = resolver.execute_fetches  # also where a source fails, nothing computes here
        self._made.set()
        for _ in execute(plan):
            pass
        return resolver.keeps


class LookAhead:
    """Threads that go through the rows of an epoch a little ahead of those who ask for them.

    Parameters
    ----------
    supply
        What is missing, and how to have it.
    rows
        In the order they will be asked for, ``(n,)``.
    ahead
        How many rows beyond the last one asked for may be had early.

    Notes
    -----
    Nothing depends on these threads but time: a row they did not get to is had when it is asked
    for, and what goes wrong here goes wrong again there, where somebody listens.
    """

    def __init__(self, supply: Supply, rows: NDArray[np.int64], ahead: int) -> None:
        self._supply, self._rows, self._ahead = supply, rows, ahead
        self._asked, self._seen, self._most = 0, 0, 1
        self._stopped = False
        self._changed = threading.Condition()
        self._taking = threading.Lock()
        self._threads: list[threading.Thread] = []
        _running.add(self)

    def asked(self, count: int) -> None:
        """Note that the first ``count`` rows are asked for; the first time starts the threads."""
        with self._changed:
            self._asked = count
            self._changed.notify_all()
        if not self._threads:
            self._threads = [
                threading.Thread(target=self._run, name="synthbrain-ahead", daemon=True)
                for _ in range(_THREADS)
            ]
            for thread in self._threads:
                thread.start()

    def stop(self) -> None:
        """Begin nothing more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def join(self, seconds: float | None = None) -> None:
        """Wait for what was begun."""
        for thread in self._threads:
            thread.join(seconds)

    def _run(self) -> None:
        try:
            while len(rows := self._take()):
                if not self._supply.prepare(rows):
                    self.stop()
        except SynthBrainError as error:
            log.warning("volumes are no longer made ahead in this epoch: %s", error)
            self.stop()

    def _take(self) -> NDArray[np.int64]:
        """The next rows to have; none where the epoch ends."""
        taken: list[int] = []
        with self._taking:
            # Few at first: somebody waits for these.
            most, self._most = min(self._most, self._supply.batch), 2 * self._most
            while (room := most - len(taken)) > 0 and self._may_look(taken):
                here = self._rows[self._seen : min(self._seen + _STRIDE, self._limit())]
                wanted = np.flatnonzero(self._supply.missing(here))[:room]
                taken += here[wanted].tolist()
                self._seen += len(here) if len(wanted) < room else int(wanted[-1]) + 1
        return np.array(taken, dtype=np.int64)

    def _may_look(self, taken: list[int]) -> bool:
        """Whether there are rows to look at; waits for them with empty hands only."""
        with self._changed:
            if not taken:
                self._changed.wait_for(
                    lambda: self._stopped or self._seen < self._limit() or self._is_over()
                )
            return not self._stopped and self._seen < self._limit()

    def _limit(self) -> int:
        return min(self._asked + self._ahead, len(self._rows))

    def _is_over(self) -> bool:
        return self._seen >= len(self._rows)


_running: weakref.WeakSet[LookAhead] = weakref.WeakSet()


def _sweep(resolver: Resolver, made: threading.Event) -> None:
    """Take away what killed workers and ranks left, where there was something to make."""
    if made.is_set():
        with contextlib.suppress(OSError):
            resolver.sweep()


@atexit.register
def _stop_all() -> None:
    """Threads inside a library must not outlive the interpreter."""
    for one in list(_running):
        one.stop()
    for one in list(_running):
        one.join(_EXIT_SECONDS)
