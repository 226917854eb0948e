"""From rows to volumes: store → sources by cost → generator, with write-through.

:meth:`Resolver.plan` only looks; :meth:`Resolver.execute` acts on what it saw. Latents take the
same path, into a store of their own; a volume whose latent is stored is decoded from there.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
import warnings
from collections import deque
from collections.abc import Generator as Steps
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from generation.generator import has_latents
from synthbrain import claims
from synthbrain.errors import (
    DamagedShardError,
    GeneratorError,
    MissingVolumeError,
    SourceError,
    StoreError,
    StoreFullError,
    UsageError,
)
from synthbrain.generators import identity
from synthbrain.header import Geometry, LatentGeometry
from synthbrain.making import NOUNS, Making, Representation, check_fit
from synthbrain.plan import Plan
from synthbrain.quantise import Array
from synthbrain.rows import PUBLISHED
from synthbrain.sizes import size_text
from synthbrain.store import Store, stored_shape

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from generation.generator import Generator
    from synthbrain.manifest import Manifest
    from synthbrain.sources.base import Payload, Source

log = logging.getLogger("synthbrain")

_BYTES_PER_VOXEL = 0.48
"""Measured on phantoms, uint8 and zstd -1; only for estimates."""

_POLL_SECONDS = 0.2
"""How long to wait at most before looking again for what another process is making."""

_PATIENCE = 3
"""A source that fails so often in a row is not asked again."""


class ReadOnlyStoreWarning(UserWarning):
    """Volumes were made but could not be kept."""


@dataclass(eq=False)
class Resolver:
    """Gets the volumes, or latents, of a manifest's rows from wherever they are cheapest to have.

    Parameters
    ----------
    manifest
        The rows.
    folder
        Folder of all stores; this manifest's lies below it.
    generator
        Makes missing recipes; None never samples.
    made_by
        Identity whose stored volumes recipes are read from; the generator's by default. Without
        a generator it is the only one in the store, and must be named if there are several.
    sources
        Tried before sampling, cheapest first.
    heal
        Make or fetch damaged volumes again; otherwise damage raises.
    representation
        ``"image"``, or ``"latent"`` for the arrays a
        :class:`generation.generator.LatentGenerator` decodes into volumes: what is said of volumes
        here then holds for latents, except that no source gives any.
    """

    manifest: Manifest
    folder: Path
    generator: Generator | None = None
    made_by: str | None = None
    sources: Sequence[Source] = ()
    heal: bool = True
    representation: Representation = "image"
    _unwritable: bool = field(init=False, default=False, repr=False)
    _is_published: NDArray[np.bool_] = field(init=False, repr=False)
    _failures: dict[str, int] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.manifest.require_rows()
        self._is_published = (self.manifest.table["origin"] == PUBLISHED).to_numpy()
        if self.representation not in NOUNS:
            expected = ", ".join(map(repr, NOUNS))
            raise UsageError(f"representation must be {expected}; found {self.representation!r}")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise UsageError(f"sources must have different names, found {', '.join(names)}")
        if self.generator is not None:
            if self.made_by not in (None, identity(self.generator)):
                raise GeneratorError(
                    f"made_by={self.made_by!r} asks for other volumes than the generator's "
                    f"{identity(self.generator)!r}; pass generator=None to only read them"
                )
            check_fit(self.generator, self.manifest, self.representation)
            self.made_by = identity(self.generator)
        elif self.made_by is None:
            self.made_by = self._only_maker()

    @cached_property
    def geometry(self) -> Geometry | LatentGeometry:
        """What is stored of a row: the manifest's volumes, or the latents of :attr:`made_by`."""
        if self.representation == "image":
            return self.manifest.header.geometry
        if has_latents(self.generator):
            return LatentGeometry(tuple(self.generator.latent_shape))
        shape = stored_shape(self._folder(self.made_by or "none"))
        return LatentGeometry() if shape is None else LatentGeometry(shape)

    @cached_property
    def recipes(self) -> Store:
        """Store of the volumes :attr:`made_by` made."""
        return self._store(self.made_by or "none")

    @cached_property
    def published(self) -> Store:
        """Store of the published volumes."""
        return self._store(PUBLISHED)

    @cached_property
    def _latents(self) -> Resolver | None:
        """Reads the latents that volumes can be decoded from."""
        if self.representation == "latent" or not has_latents(self.generator):
            return None
        return replace(self, sources=(), representation="latent")

    def store_of(self, index: int) -> Store:
        """The store that keeps a row's volume."""
        return self.published if self._is_published[index] else self.recipes

    def maker_of(self, index: int) -> str:
        """What made, or would make, a row's volume."""
        return PUBLISHED if self._is_published[index] else self.made_by or "none"

    def path(self, index: int) -> Path:
        """Shard file of a row's volume, present or not."""
        return self.store_of(index).path(self.manifest.positions[index])

    def stored(self, indices: NDArray[np.int64] | None = None) -> NDArray[np.bool_]:
        """Which rows have a sound footer on disk."""
        rows = np.arange(len(self.manifest)) if indices is None else indices
        found = np.zeros(len(rows), dtype=bool)
        for store, mask in (
            (self.published, self._is_published[rows]),
            (self.recipes, ~self._is_published[rows]),
        ):
            if mask.any():
                found[mask] = store.stored(self.manifest.positions[rows[mask]])
        return found

    def plan(self, indices: Sequence[int] | None = None, *, unreadable: bool = False) -> Plan:
        """What having some rows would take. Changes nothing.

        Parameters
        ----------
        indices
            Rows of the manifest; all by default.
        unreadable
            These rows are known to be unreadable, whatever their footers say.
        """
        rows = np.arange(len(self.manifest)) if indices is None else np.asarray(indices, np.int64)
        here = np.zeros(len(rows), dtype=bool) if unreadable else self.stored(rows)
        left, fetch, bytes_to_fetch, seconds = rows[~here], {}, 0, 0.0
        for source in self._by_cost(left):
            mine = left[self._can_give(source, left)]
            if len(mine):
                cost = source.cost(self._ids(mine))
                fetch[source.name] = mine
                bytes_to_fetch += cost.bytes
                seconds += cost.seconds
                left = np.setdiff1d(left, mine)
        recipe = ~self._is_published[left] & (self.generator is not None)
        sample, unavailable = left[recipe], left[~recipe]
        if self.generator is not None:
            seconds += len(sample) * self.generator.seconds_per_volume
        new = len(sample) + sum(map(len, fetch.values()))
        return Plan(
            stored=rows[here],
            fetch=fetch,
            sample=sample,
            unavailable=unavailable,
            bytes_to_store=round(new * self._bytes_per_volume()),
            bytes_to_fetch=bytes_to_fetch,
            seconds=seconds,
            bytes_free=_free(self.folder),
        )

    def execute(self, plan: Plan) -> Iterator[tuple[int, Array]]:
        """Fetch and sample what a plan says, storing every volume before it is yielded.

        Yields
        ------
        tuple
            The row's index and its stored values, in no particular order. Rows that another
            process turned out to be making are waited for and yielded too.

        Raises
        ------
        MissingVolumeError
            The plan holds rows nothing here can give.
        StoreFullError
            The disk is full.
        """
        self._refuse_unavailable(plan)
        unfetched = yield from self._fetch_all(plan)
        lost = [i for i in unfetched if self.generator is None or self._is_published[i]]
        yield from self._sample([*plan.sample.tolist(), *np.setdiff1d(unfetched, lost).tolist()])
        self._refuse_lost(lost)

    def execute_fetches(self, plan: Plan) -> Iterator[tuple[int, Array]]:
        """Like :meth:`execute`, but nothing is sampled, whatever sources fail to give.

        Raises
        ------
        MissingVolumeError
            They failed to give some rows.
        StoreFullError
            The disk is full.
        """
        self._refuse_lost((yield from self._fetch_all(plan)))

    def fill(self, plan: Plan) -> Iterator[int]:
        """Like :meth:`execute`, for its effect on the store: yields the row indices.

        Raises
        ------
        StoreFullError
            Before starting, when the disk lacks the room the plan needs.
        StoreError
            The store cannot be written to.
        """
        yield from self._filled(self.execute(plan), plan)

    @property
    def keeps(self) -> bool:
        """Whether what was made so far could be stored."""
        return not self._unwritable

    def take(self, source: Source, plan: Plan, rows: NDArray[np.int64]) -> Iterator[int]:
        """Like :meth:`fill`, with as many of some rows as a source gives."""
        yield from self._filled(self._fetch(source, rows), plan)

    def _filled(self, arriving: Iterator[tuple[int, Array]], plan: Plan) -> Iterator[int]:
        if plan.missing and plan.bytes_to_store > plan.bytes_free:
            raise StoreFullError(
                f"{plan.missing:,} {self._noun}s need about {size_text(plan.bytes_to_store)}, but "
                f"{self.folder} has {size_text(plan.bytes_free)} free; free some space, choose "
                "another folder with store= (--store, SYNTHBRAIN_HOME), or ask for fewer rows"
            )
        self._unwritable = False  # it may be writable by now
        self.sweep()
        for index, _ in arriving:
            if self._unwritable:
                raise StoreError(f"{self.folder} cannot be written to; choose another with store=")
            yield index

    def sweep(self) -> None:
        """Delete what killed processes left in the store."""
        for store in (self.recipes, self.published):
            store.sweep()
            claims.sweep(store.root)

    def volumes(self, indices: Sequence[int], *, threads: Executor | None = None) -> list[Array]:
        """The stored values of some rows, made or fetched first where missing.

        Raises
        ------
        MissingVolumeError
            A row is not stored and may not be made.
        DamagedShardError
            A shard is damaged and ``heal`` is off.
        """
        if len(indices) == 1:
            found = [self._read(indices[0], threads=threads)]
        else:
            found = list((threads.map if threads else map)(self._read, indices))
        made = self._made(indices, found)
        return [made[i].copy() if v is None else v for i, v in zip(indices, found, strict=True)]

    def patches(
        self,
        indices: Sequence[int],
        starts: Sequence[Sequence[int]],
        size: Sequence[int],
        *,
        threads: Executor | None = None,
    ) -> list[Array]:
        """A box of each row's volume, as :meth:`volumes`."""
        boxes = [tuple(slice(s, s + n) for s, n in zip(at, size, strict=True)) for at in starts]
        if len(indices) == 1:
            found = [self._read(indices[0], boxes[0], threads=threads)]
        else:
            found = list((threads.map if threads else map)(self._read, indices, boxes))
        made = self._made(indices, found)
        jobs = zip(indices, boxes, found, strict=True)
        return [made[i][box].copy() if patch is None else patch for i, box, patch in jobs]

    def _made(self, indices: Sequence[int], found: list[Array | None]) -> dict[int, Array]:
        """The volumes of the rows not found, fetched or sampled together."""
        absent = {i for i, array in zip(indices, found, strict=True) if array is None}
        if not absent:
            return {}
        return dict(self.execute(self.plan(sorted(absent), unreadable=True)))

    def _read(
        self,
        index: int,
        box: tuple[slice, ...] | None = None,
        *,
        threads: Executor | None = None,
    ) -> Array | None:
        """A stored volume or a box of it; None if missing, or damaged and now set aside."""
        store, position = self.store_of(index), self.manifest.positions[index]
        try:
            if box is None:
                return store.read(position, threads=threads)
            start, size = [b.start for b in box], [b.stop - b.start for b in box]
            return store.read_patch(position, start, size, threads=threads)
        except MissingVolumeError:
            return None
        except DamagedShardError as error:
            self._set_aside(index, error)
            return None

    def _set_aside(self, index: int, error: DamagedShardError) -> None:
        if not self.heal:
            raise error
        id = self.manifest.table.index[index]
        try:
            bad = self.store_of(index).quarantine(self.manifest.positions[index])
        except StoreError:
            log.warning("%s %s is damaged (%s) and cannot be set aside", self._noun, id, error)
        else:
            told = (self._noun, id, error, bad.name)
            log.warning("%s %s is damaged (%s); kept as %s, made again", *told)

    def _fetch_all(self, plan: Plan) -> Steps[tuple[int, Array], None, list[int]]:
        """Store and yield what sources give; what one fails to give the next is asked for.

        Returns
        -------
        list
            Rows none of them gave.
        """
        unfetched: list[int] = []
        planned = [source for name in plan.fetch for source in self.sources if source.name == name]
        for source in [*planned, *(s for s in self.sources if s not in planned)]:
            also = np.asarray(unfetched, dtype=np.int64)
            also = also[self._can_give(source, also)]
            rows = np.concatenate([plan.fetch.get(source.name, also[:0]), also])
            unfetched = [index for index in unfetched if index not in set(also.tolist())]
            if len(rows):
                unfetched += yield from self._fetch(source, rows)
        return unfetched

    def _fetch(
        self, source: Source, rows: NDArray[np.int64]
    ) -> Steps[tuple[int, Array], None, list[int]]:
        """Store and yield what a source gives; returns the rows it failed to give."""
        left = dict(zip(self._ids(rows), rows.tolist(), strict=True))
        try:
            for id, payload in source.fetch(list(left), self.manifest.header.geometry):
                index = left.get(id)
                if index is None:
                    self._keep_extra(id, payload, source)
                elif (volume := self._received(index, payload, source)) is not None:
                    del left[id]
                    yield index, volume
        except SourceError as error:
            self._failures[source.name] = self._failures.get(source.name, 0) + 1
            log.warning("%s failed (%s); %d rows left", source.name, error, len(left))
        else:
            self._failures.pop(source.name, None)
        return list(left.values())

    def _received(self, index: int, payload: Payload, source: Source) -> Array | None:
        """Store what a source gave for a row; its volume, or None where it is another."""
        if not isinstance(payload, bytes):
            self._keep(index, payload)
            return payload
        try:
            self._check_hash(index, payload)
            return self._keep_shard(index, payload)
        except (SourceError, DamagedShardError) as error:
            id = self.manifest.table.index[index]
            log.warning("%s gave a bad volume of %s (%s); left out", source.name, id, error)
            return None

    def _keep_extra(self, id: str, payload: Payload, source: Source) -> None:
        """Store a volume that came along, if it is one of the manifest's that is missing."""
        index = int(self.manifest.rows_of([id])[0])
        if index < 0 or self.maker_of(index) != source.made_by or self.stored(np.array([index]))[0]:
            return
        self._received(index, payload, source)

    def _check_hash(self, index: int, shard: bytes) -> None:
        expected = None if self.manifest.sha256 is None else self.manifest.sha256.iloc[index]
        if not isinstance(expected, str):
            return
        found = hashlib.sha256(shard).hexdigest()
        if found != expected:
            raise SourceError(f"sha256 {found[:12]}…, the manifest says {expected[:12]}…")

    def _keep_shard(self, index: int, shard: bytes) -> Array:
        store = self.store_of(index)
        try:
            return store.write_shard(self.manifest.positions[index], shard)
        except (StoreFullError, DamagedShardError):
            raise
        except StoreError as error:
            self._not_kept(error)
            return store.layout.decode(shard)

    def _sample(self, rows: list[int]) -> Iterator[tuple[int, Array]]:
        queue, waiting, since = deque(rows), list[int](), time.monotonic()
        while queue or waiting:
            batch = self._claim_some(queue, waiting)
            if batch:
                yield from self._make(batch)
                continue
            for index in list(waiting):
                volume = self._read(index)
                if volume is not None:
                    waiting.remove(index)
                    yield index, volume
                elif claims.is_stale(self.path(index)):
                    waiting.remove(index)
                    queue.append(index)
            if waiting and not queue:
                # A tenth of what has been waited already: little is lost on quick generators.
                waited = time.monotonic() - since
                time.sleep(min(max(waited / 10, 0.005), _POLL_SECONDS))

    def _claim_some(self, queue: deque[int], waiting: list[int]) -> list[int]:
        """Take up to a batch of rows nobody else is making off the queue."""
        batch: list[int] = []
        while queue and self.generator is not None and len(batch) < self.generator.batch_size:
            index = queue.popleft()
            (batch if claims.claim(self.path(index)) else waiting).append(index)
        return batch

    def _make(self, batch: list[int]) -> Iterator[tuple[int, Array]]:
        """Sample, store and yield rows this process has claimed."""
        with claims.held([self.path(index) for index in batch]):
            done = {index: self._read(index) for index in batch}
            left = [index for index, volume in done.items() if volume is None]
            if left:
                assert self.generator is not None
                making = Making(self.manifest, self.generator, self.geometry, self.representation)
                for index, values in making.of(left, self._stored_latents(left)):
                    done[index] = values
                    self._keep(index, values)
        yield from ((index, volume) for index, volume in done.items() if volume is not None)

    def _stored_latents(self, indices: list[int]) -> dict[int, Array]:
        if self._latents is None:
            return {}
        found = ((index, self._latents._read(index)) for index in indices)
        return {index: latent for index, latent in found if latent is not None}

    def _keep(self, index: int, volume: Any) -> None:
        if self._unwritable:
            return
        try:
            self.store_of(index).write(self.manifest.positions[index], volume)
        except StoreFullError:
            raise
        except StoreError as error:
            self._not_kept(error)

    def _not_kept(self, error: StoreError) -> None:
        self._unwritable = True
        warnings.warn(
            f"{self._noun}s are served but not kept: {error}", ReadOnlyStoreWarning, stacklevel=3
        )

    def _can_give(self, source: Source, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        given_up = self._failures.get(source.name, 0) >= _PATIENCE
        if not len(rows) or self.representation == "latent" or given_up:
            return np.zeros(len(rows), dtype=bool)
        published = source.made_by == PUBLISHED
        same_maker = self._is_published[rows] == published
        if not published and source.made_by != self.made_by:
            same_maker[:] = False
        return same_maker & source.holds(self._ids(rows))

    def _by_cost(self, rows: NDArray[np.int64]) -> list[Source]:
        """Sources by seconds per volume over what each could give of some rows."""

        def price(source: Source) -> float:
            mine = rows[self._can_give(source, rows)]
            return source.cost(self._ids(mine)).seconds / max(len(mine), 1)

        return sorted(self.sources, key=price) if len(self.sources) > 1 else list(self.sources)

    def _refuse_unavailable(self, plan: Plan) -> None:
        if not len(plan.unavailable):
            return
        first = int(plan.unavailable[0])
        id = self.manifest.table.index[first]
        if self._is_published[first] and self.representation == "latent":
            why = "published rows have volumes but no latents; ask for representation='image'"
        elif self._is_published[first]:
            name = (self.manifest.header.parent or self.manifest.header).name
            why = (
                "they were published, and no source given has them; fetch them with "
                f"`synthbrain pull {name}`, or pass sources=[...]"
            )
        else:
            why = "generator=None never samples; run `synthbrain fill`, or pass a generator"
        raise MissingVolumeError(
            f"{len(plan.unavailable):,} of the {self._noun}s asked for are not in {self.folder}, "
            f"{id!r} first: {why} (plan: {plan})"
        )

    def _refuse_lost(self, rows: list[int]) -> None:
        if rows:
            raise MissingVolumeError(
                f"{len(rows)} rows, {self.manifest.table.index[rows[0]]!r} first, could not be "
                "fetched; the log says why"
            )

    def _only_maker(self) -> str | None:
        folder = self.folder / self.manifest.store_key
        makers = sorted(p.parent.name for p in folder.glob(f"*/{self._noun}s") if p.is_dir())
        makers = [maker for maker in makers if maker != PUBLISHED]
        if len(makers) > 1:
            raise GeneratorError(
                f"{folder} holds {self._noun}s of {len(makers)} generators ({', '.join(makers)}); "
                "say which to read with made_by="
            )
        return makers[0] if makers else None

    @property
    def _noun(self) -> str:
        return NOUNS[self.representation]

    def _folder(self, maker: str) -> Path:
        return self.folder / self.manifest.store_key / maker / f"{self._noun}s"

    def _store(self, maker: str) -> Store:
        root = self.manifest.header.parent or self.manifest.header
        about: dict[str, Any] = {
            "manifest": root.name,
            "rows_digest": root.rows_digest,
            "made_by": maker,
        }
        if maker != PUBLISHED:
            about["provenance"] = dict(getattr(self.generator, "provenance", {}))
        return Store(self._folder(maker), self.geometry, about)

    def _ids(self, rows: NDArray[np.int64]) -> list[str]:
        return self.manifest.table.index[rows].tolist()

    def _bytes_per_volume(self) -> float:
        values = float(np.prod(self.geometry.shape))
        return values * (_BYTES_PER_VOXEL if self.representation == "image" else 2)


def _free(folder: Path) -> int:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free
