"""Fetching published volumes into the store: just the rows asked for, from wherever they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from synthbrain.errors import ManifestError, SourceError
from synthbrain.home import home
from synthbrain.manifest import Manifest
from synthbrain.participants import read_participants
from synthbrain.resolver import Resolver
from synthbrain.rows import digest_rows
from synthbrain.sources.archive import ArchiveVolumes
from synthbrain.sources.opening import (
    SourceOptions,
    archive_of,
    learn_rows,
    learnt_path,
    open_sources,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from synthbrain.plan import Plan
    from synthbrain.sources.base import Source


@dataclass(eq=False)
class Pull:
    """What is to be fetched, and from where; nothing is transferred before :meth:`run`.

    Parameters
    ----------
    manifest
        All rows of the set, so that whatever else comes along finds its place.
    chosen
        The rows asked for.
    sources
        Where from.
    folder
        Folder of all stores.
    count
        Fetch so many of the rows asked for, whichever come first; None for all of them.

    Examples
    --------
    >>> from synthbrain.testing import tiny_manifest
    >>> pull = Pull.of(tiny_manifest(5), limit=2)
    >>> len(pull.chosen), pull.resolver.sources
    (2, [])
    """

    manifest: Manifest
    chosen: Manifest
    sources: list[Source]
    folder: Path
    count: int | None = None

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        options: SourceOptions = SourceOptions(),  # noqa: B008
        *,
        store: Path | None = None,
        table: Path | None = None,
        **selection: Any,
    ) -> Pull:
        """A pull of some rows of a manifest.

        Parameters
        ----------
        manifest
            One whose rows are still in its archive has them read first.
        options
            Where to fetch from, beyond what its header says.
        store
            Folder of stored volumes; ``store/`` in the package's home by default.
        table
            The table of covariates, if the archive's is not to be used.
        selection
            As :meth:`synthbrain.Manifest.select`. Where the place of a row in its archive is not
            known, ``limit`` rows are whichever come first there.

        Raises
        ------
        ManifestError, SourceError, UsageError
            The rows cannot be had or are not those of ``table``, a source cannot be opened, or
            nothing is selected.
        """
        sources = open_sources(manifest, options)
        if manifest.header.rows_digest is None:
            manifest = _with_rows(manifest, sources, table)
        elif table is not None:
            _check_table(manifest, table)
        limit = selection.pop("limit", None)
        candidates = manifest.select(**selection)
        blind = limit is not None and cls._blind(sources, candidates.select(limit=limit))
        chosen = candidates if blind else candidates.select(limit=limit)
        folder = Path(store).expanduser() if store is not None else home() / "store"
        return cls(manifest, chosen, sources, folder, limit if blind else None)

    @staticmethod
    def _blind(sources: list[Source], wanted: Manifest) -> bool:
        """Whether only an archive has the rows, and it is not known where in it."""
        archive = archive_of(sources[:1])
        ids = wanted.table.index.tolist()
        return archive is not None and any(
            archive.path(id) not in archive.index.members for id in ids
        )

    @cached_property
    def resolver(self) -> Resolver:
        """Reads and fills the store; never samples."""
        makers = {source.made_by for source in self.sources} - {"published"}
        resolver = Resolver(
            self.manifest,
            self.folder,
            made_by=min(makers) if makers else None,
            sources=self.sources,
        )
        for source in self.sources:
            if isinstance(source, ArchiveVolumes):
                source.unwanted = self._is_stored
        return resolver

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """Numbers of the chosen rows in the manifest."""
        return self.manifest.table.index.get_indexer(self.chosen.table.index).astype(np.int64)

    def plan(self) -> Plan:
        """What it would take; nothing is changed or transferred."""
        rows = self.rows
        if self.count is not None:
            stored = self.resolver.stored(rows)
            missing = rows[~stored][: max(0, self.count - int(stored.sum()))]
            rows = np.concatenate([rows[stored][: self.count], missing])
        return self.resolver.plan(rows.tolist())

    def run(self, plan: Plan | None = None) -> Iterator[int]:
        """Fetch what is missing; yields the number of each row of the manifest once it is stored.

        Safe to interrupt and to run again: what is stored is kept.

        Raises
        ------
        MissingVolumeError
            No source gave some row.
        StoreFullError
            There is not enough room.
        """
        plan = plan or self.plan()
        if self.count is None:
            yield from self.resolver.fill(plan)
        else:
            yield from self._run_blind(plan)

    def close(self) -> None:
        """Stop what works in the background."""
        for source in self.sources:
            if isinstance(source, ArchiveVolumes):
                source.bytes.close()

    def _run_blind(self, plan: Plan) -> Iterator[int]:
        source = archive_of(self.sources)
        assert source is not None
        if not plan.missing:
            return
        missing = self.rows[~self.resolver.stored(self.rows)]
        given = 0
        for index in self.resolver.take(_Some(source, plan.missing), plan, missing):
            given += 1
            yield index
        if given < plan.missing:
            raise SourceError(
                f"{source.name} gave {given:,} of {plan.missing:,} volumes; the log says why"
            )

    def _is_stored(self, id: str) -> bool:
        index = self.manifest.rows_of([id])
        return bool(index[0] < 0 or self.resolver.stored(index.astype(np.int64))[0])


class _Some:
    """An archive that gives so many of the volumes asked for, whichever come first."""

    def __init__(self, source: ArchiveVolumes, count: int) -> None:
        self._source, self._count = source, count
        self.name, self.made_by = source.name, source.made_by
        self.holds, self.cost = source.holds, source.cost

    def fetch(self, ids: Any, geometry: Any) -> Iterator[tuple[str, Any]]:
        return self._source.some(ids, self._count, geometry)


def _with_rows(manifest: Manifest, sources: list[Source], table: Path | None) -> Manifest:
    archive = archive_of(sources)
    if archive is None:
        raise ManifestError(
            f"the rows of {manifest.name} lie in its archive, and no source given has that; pass "
            "--torrent, --url or --from with the archive"
        )
    return learn_rows(manifest, archive, None if table is None else _read(table))


def _check_table(manifest: Manifest, table: Path) -> None:
    """Refuse a table that is not the one the rows came from: it would change nothing."""
    archive = manifest.header.archive
    aliases = {} if archive is None else archive.column_aliases
    if digest_rows(read_participants(_read(table), aliases, str(table))) != (
        manifest.header.rows_digest
    ):
        raise ManifestError(
            f"the rows of {manifest.name} are known, and {table} holds others; leave it out, or "
            f"delete {learnt_path(manifest.name)} if that is where they were read before"
        )


def _read(table: Path) -> bytes:
    try:
        return table.read_bytes()
    except OSError as error:
        raise SourceError(f"cannot read {table}: {error.strerror}") from None
