"""How a stream has its volumes: from a cache that can be filled again, run by run ahead."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from synthbrain import claims
from synthbrain.cache import Again, Cache, CachedStore
from synthbrain.resolver import Resolver
from synthbrain.rows import PUBLISHED
from synthbrain.store import BLOCK, Store
from synthbrain.stream.order import RUN, runs_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from synthbrain.manifest import Manifest
    from synthbrain.quantise import Array
    from synthbrain.sources.base import Source

_POLL_SECONDS = 0.02


@dataclass(eq=False)
class Recoverable:
    """How volumes of a set could be had again, by what this process holds.

    Parameters
    ----------
    manifest
        All rows that are known of the set, not only those that are streamed.
    sources
        What is fetched from.
    generator
        Identity of the generator, if there is one.
    """

    manifest: Manifest
    sources: Sequence[Source]
    generator: str | None

    def __call__(self, maker: str, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The :class:`synthbrain.cache.Again` of a maker's volumes, ``(n,)``."""
        again = np.full(len(positions), Again.NEVER, dtype=np.int64)
        rows = self._rows.get_indexer(pd.Index(positions))
        known = np.flatnonzero(rows >= 0)
        known = known[self._is_published[rows[known]] == (maker == PUBLISHED)]
        if maker == self.generator:
            again[known] = Again.MADE
        ids = self.manifest.table.index[rows[known]].tolist()
        for source in self.sources:
            if source.made_by == maker:
                again[known[source.holds(ids)]] = Again.FETCHED
        return again

    @cached_property
    def _rows(self) -> pd.Index[Any]:
        return pd.Index(self.manifest.positions.astype(np.int64))

    @cached_property
    def _is_published(self) -> NDArray[np.bool_]:
        return (self.manifest.table["origin"] == PUBLISHED).to_numpy()


@dataclass(eq=False)
class StreamResolver(Resolver):
    """A resolver whose store is a cache, and that waits for what is on its way.

    Parameters
    ----------
    cache
        Whose limit its stores keep.
    """

    cache: Cache = field(kw_only=True)

    @property
    def capacity(self) -> int:
        """About how many volumes the cache holds."""
        return int(self.cache.limit / self._bytes_per_volume())

    def fetch(self, rows: NDArray[np.int64]) -> None:
        """Have the missing ones among some rows from sources, as far as those give them."""
        self._failures.clear()  # a source that failed a while ago may be asked again
        plan = self.plan(rows.tolist())
        for _ in self._fetch_all(plan):
            pass

    def touch(self, rows: NDArray[np.int64]) -> None:
        """Note that stored rows will be asked for soon."""
        for index in rows.tolist():
            store = self.store_of(index)
            assert isinstance(store, CachedStore)
            store.touch(self.manifest.positions[index])

    def run_path(self, index: int) -> Path:
        """What a process claims that fetches a row's run."""
        position = int(self.manifest.positions[index])
        folder = self.store_of(index).block_path(position // BLOCK)
        return folder / f"run-{position % BLOCK // RUN:03d}"

    def _store(self, maker: str) -> Store:
        plain = super()._store(maker)
        return CachedStore(plain.root, plain.geometry, plain.attributes, cache=self.cache)

    def _made(self, indices: Sequence[int], found: list[Array | None]) -> dict[int, Array]:
        absent = (i for i, volume in zip(indices, found, strict=True) if volume is None)
        waited = {i: self._awaited(i) for i in dict.fromkeys(absent)}
        arrived = {i: volume for i, volume in waited.items() if volume is not None}
        left = [arrived.get(i, v) if v is None else v for i, v in zip(indices, found, strict=True)]
        return arrived | super()._made(indices, left)

    def _awaited(self, index: int) -> Array | None:
        """A volume whose run another thread or process is fetching; None where nobody is."""
        run = self.run_path(index)
        while not claims.is_stale(run):
            if (volume := self._read(index)) is not None:
                return volume
            time.sleep(_POLL_SECONDS)
        return self._read(index)


class Runs:
    """Has whole runs before their first row is asked for: see :class:`synthbrain.ahead.Supply`.

    Parameters
    ----------
    resolver
        Fetches.
    whole
        Fetch the rest of a row's run with it, in one request. It must stay in the cache until it
        is asked for.
    """

    batch = 1
    """Rows that :meth:`prepare` is to begin with; their neighbours come along."""

    def __init__(self, resolver: StreamResolver, *, whole: bool) -> None:
        # A copy of its own: what fails early is no reason to give a source up.
        self._resolver, self._whole = replace(resolver), whole
        runs = runs_of(resolver.manifest.positions)
        self._order = np.argsort(runs, kind="stable")
        self._runs, self._sorted = runs, runs[self._order]

    def missing(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of some rows are not here, ``(n,)``; the others are kept a little longer."""
        here = self._resolver.stored(rows)
        self._resolver.touch(rows[here])
        return ~here

    def prepare(self, rows: NDArray[np.int64]) -> bool:
        """Fetch rows with their runs, unless somebody else is at it; False if there is no room."""
        for index in rows.tolist():
            run = self._resolver.run_path(index)
            if claims.claim(run):
                with claims.held([run]):
                    self._resolver.fetch(self._members(index))
        return not self._resolver.cache.is_full

    def _members(self, index: int) -> NDArray[np.int64]:
        if not self._whole:
            return np.array([index])
        first = np.searchsorted(self._sorted, self._runs[index], "left")
        end = np.searchsorted(self._sorted, self._runs[index], "right")
        return self._order[first:end]
