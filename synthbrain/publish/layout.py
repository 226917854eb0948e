"""The publishable folder of a set of volumes.

::

    README.md  croissant.json  CITATION.cff     cards
    manifest.json  rows.parquet                 the rows, with the sha256 of every volume's shard
    packs/block-0042.zarr.zip                   the volumes (synthbrain.publish.pack)
    data/train-00000-of-00020.parquet           pictures, covariates, where each volume lies
    latents/block-0042.zarr.zip  latents/rows.parquet   optional
    volumes/train-00000-of-00500.parquet        optional: voxels, for readers without synthbrain

The same volumes give the same folder. A build that was killed goes on where it stopped, and
``manifest.json`` is written last: a folder without one is not finished. A selection is published as
one: its manifest names its parent, and its volumes keep their positions and blocks there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

import synthbrain
from synthbrain.errors import MissingVolumeError, UsageError
from synthbrain.files import aside, sha256_of, write
from synthbrain.header import PacksSource
from synthbrain.progress import track
from synthbrain.publish import tables
from synthbrain.publish.cards import Card, citations, readme, require_rights
from synthbrain.publish.croissant import croissant
from synthbrain.publish.folder import (
    CARD,
    CITATION,
    DESCRIPTION,
    LATENTS,
    MANIFEST,
    PACKS,
    ROWS,
    refuse_other_set,
    remove_stale,
)
from synthbrain.publish.pack import Member, pack_name, write_pack
from synthbrain.rows import PUBLISHED, digest_contents, write_rows
from synthbrain.store import BLOCK, Store

if TYPE_CHECKING:
    from synthbrain.dataset import SynthBrainDataset
    from synthbrain.manifest import Manifest
    from synthbrain.publish.tables import Row, Table
    from synthbrain.resolver import Resolver


@dataclass(frozen=True)
class Built:
    """A finished folder.

    Parameters
    ----------
    folder
        Where.
    manifest
        As published.
    files
        ``(bytes, sha256)`` of its data files by path.
    written
        How many packs and tables this build wrote; the others were there.
    """

    folder: Path
    manifest: Manifest
    files: Mapping[str, tuple[int, str]]
    written: int

    @property
    def size(self) -> int:
        """Bytes of the data files."""
        return sum(size for size, _ in self.files.values())


def build(
    dataset: SynthBrainDataset,
    folder: str | os.PathLike[str],
    *,
    latents: bool = False,
    voxels: bool = False,
    stored_only: bool = False,
    rights: str = "",
    authors: Sequence[str] = (),
    repo_id: str | None = None,
    progress: bool = True,
) -> Built:
    """Make the publishable folder of a dataset, or complete it.

    Parameters
    ----------
    dataset
        Whose rows to publish; nothing is made or fetched: its volumes must be stored.
    folder
        Folder to write.
    latents
        Publish the stored latents too.
    voxels
        Add Parquet files of voxels, as many bytes again as the packs.
    stored_only
        Publish the rows that are stored, as a selection, where some are not.
    rights
        A declaration such as ``"I hold the rights: ..."``; needed where the manifest's licence is
        unknown, and published with the volumes.
    authors
        Names for the citations.
    repo_id
        ``ORG/NAME`` on the Hub, for the addresses in the cards and the manifest.
    progress
        Show progress bars on standard error.

    Returns
    -------
    Built
        The published manifest, and what the folder holds.

    Raises
    ------
    UsageError
        The licence is unknown and no rights are declared, the dataset is not one of volumes of
        one origin, or the folder holds another set.
    MissingVolumeError
        Rows are not stored.
    DamagedShardError
        A stored volume is damaged; the message names its file.
    StoreError
        The folder cannot be written.
    """
    require_rights(dataset.manifest, rights)
    resolver = _published_part(dataset, stored_only=stored_only)
    build = _Build(resolver, Path(folder), rights, tuple(authors), repo_id, progress)
    return build.run(latents=latents, voxels=voxels)


def _published_part(dataset: SynthBrainDataset, *, stored_only: bool) -> Resolver:
    """Reads the rows that will be published, all of them stored."""
    if dataset.representation != "image":
        raise UsageError(
            f"sets of volumes are published, not of {dataset.representation}s; open the dataset "
            "with representation='image' and pass latents=True"
        )
    origins = sorted(dataset.manifest.table["origin"].unique())
    if len(origins) > 1:
        raise UsageError(
            f"{dataset.manifest.name} holds rows of origin {' and '.join(origins)}, whose volumes "
            "have different makers; publish them apart: select(where=\"origin == 'recipe'\")"
        )
    resolver = replace(dataset.resolver, generator=None, sources=())
    stored = resolver.stored()
    if stored.all():
        return resolver
    ids = dataset.manifest.table.index
    if not stored_only or not stored.any():
        raise MissingVolumeError(
            f"{(~stored).sum():,} of {len(ids):,} volumes are not stored, {ids[~stored][0]!r} "
            "first; run `synthbrain fill`, or publish only what is stored with stored_only=True "
            "(--stored-only)"
        )
    return replace(resolver, manifest=dataset.manifest.select(ids=ids[stored]))


@dataclass(eq=False)
class _Build:
    """A build: its parts, in the order they are made."""

    resolver: Resolver
    folder: Path
    rights: str
    authors: tuple[str, ...]
    repo_id: str | None
    progress: bool
    _files: list[str] = field(init=False, default_factory=list)
    _written: int = field(init=False, default=0)
    _hashes: pd.Series[str] = field(init=False)
    """sha256 of each row's shard, known once the packs are."""

    def run(self, *, latents: bool, voxels: bool) -> Built:
        stored_latents = self._stored_latents() if latents else None
        refuse_other_set(self.folder, self._store)
        (self.folder / MANIFEST).unlink(missing_ok=True)
        members = self._packs(self._store, PACKS)
        self._hashes = pd.Series(
            [members[int(p)].sha256 for p in self._rows.positions],
            index=self._rows.table.index,
            dtype="str",
        )
        if stored_latents is not None:
            self._latent_rows(self._packs(stored_latents, LATENTS))
        geometry, conditional = self._rows.header.geometry, self._rows.header.conditional
        configs = {"default": self._table(tables.previews(conditional), members)}
        if voxels:
            configs["volumes"] = self._table(tables.voxels(geometry, conditional), members)
        return self._finish(configs)

    @property
    def _rows(self) -> Manifest:
        return self.resolver.manifest

    @cached_property
    def _store(self) -> Store:
        return self.resolver.store_of(0)

    @property
    def _made_by(self) -> str:
        return self.resolver.maker_of(0)

    @cached_property
    def _manifest(self) -> Manifest:
        """As published: with what is known now."""
        header = self._rows.header
        provenance = {
            **header.provenance,
            "made_by": self._made_by,
            "published_with": f"synthbrain {synthbrain.__version__}",
            **({"rights": self.rights} if self.rights else {}),
        }
        update: dict[str, Any] = {
            "content_digest": digest_contents(self._hashes),
            "provenance": provenance,
        }
        if self.repo_id:
            url = f"hf://datasets/{self.repo_id}"
            packs = PacksSource(kind="packs", url=url, made_by=self._made_by)
            update["sources"] = {"packs": packs, **header.sources}
        return replace(self._rows, header=header.model_copy(update=update), sha256=self._hashes)

    def _packs(self, store: Store, folder: str) -> dict[int, Member]:
        """Write a store's packs; returns the members by position."""
        positions = self._rows.positions
        blocks = np.unique(positions // BLOCK).tolist()
        members: dict[int, Member] = {}
        for block in self._track(blocks, f"packing {folder}"):
            path = f"{folder}/{pack_name(block)}"
            chosen = positions[positions // BLOCK == block].tolist()
            pack = write_pack(store, block, self.folder / path, positions=chosen)
            members |= {member.position: member for member in pack.members}
            self._note(path, pack.written)
        return members

    def _stored_latents(self) -> Store:
        if self._made_by == PUBLISHED:
            raise UsageError("published rows have volumes but no latents; leave latents=True out")
        reader = replace(self.resolver, made_by=self._made_by, representation="latent")
        stored = reader.stored()
        if not stored.all():
            raise MissingVolumeError(
                f"{(~stored).sum():,} of {len(stored):,} latents are not stored; leave out "
                "latents=True (--latents), or fill them first with representation='latent'"
            )
        return reader.store_of(0)

    def _latent_rows(self, members: Mapping[int, Member]) -> None:
        """Where each latent lies: ``latents/rows.parquet``."""
        path = f"{LATENTS}/{ROWS}"
        rows = [
            {"id": id, **_pointer(LATENTS, members[int(position)])}
            for id, position in zip(self._rows.table.index, self._rows.positions, strict=True)
        ]
        with aside(self.folder / path) as scratch:
            pd.DataFrame(rows).to_parquet(scratch, compression="zstd", index=False)
        self._note(path, written=True)

    def _table(self, table: Table, members: Mapping[int, Member]) -> dict[str, str]:
        """Write the files of a table; returns their pattern by split."""
        files = tables.split_files(self._rows, table)
        for path in self._track(list(files), f"writing {table.folder}"):
            pointers = [
                {
                    **tables.describe(self._rows, index, self._made_by),
                    **_pointer(PACKS, members[int(self._rows.positions[index])]),
                }
                for index in files[path]
            ]
            rows = self._table_rows(table, pointers)
            self._note(path, tables.write_parquet(self.folder / path, table, pointers, rows))
        splits = {Path(path).name.split("-")[0] for path in files}
        return {split: f"{table.folder}/{split}-*.parquet" for split in sorted(splits, key=_order)}

    def _table_rows(self, table: Table, pointers: Sequence[Row]) -> Iterator[Row]:
        geometry = self._rows.header.geometry
        for pointer in pointers:
            volume = self._store.read(pointer["position"])
            if tables.VOLUME in table.features:
                yield pointer | tables.voxel_row(volume, geometry)
            else:
                image = {"bytes": tables.picture(volume, geometry), "path": None}
                yield pointer | {"image": image}

    def _finish(self, configs: Mapping[str, Mapping[str, str]]) -> Built:
        """Rows, cards and, when all else is there, the header."""
        manifest = self._manifest
        positions = manifest.positions if manifest.header.parent else None
        with aside(self.folder / ROWS) as scratch:
            write_rows(scratch, manifest.table, positions, manifest.sha256)
        header = manifest.header.text().encode()
        remove_stale(self.folder, self._files)
        files = {path: self._described(path) for path in (*self._files, ROWS)}
        about = self._store.about(int(manifest.positions[0]))
        card = Card(
            manifest=manifest, made_by=self._made_by, provenance=about.get("provenance") or {},
            configs=configs, files=files, rights=self.rights, authors=self.authors,
            repo_id=self.repo_id,
        )  # fmt: skip
        write(self.folder / CARD, readme(card))
        write(self.folder / DESCRIPTION, croissant(card))
        write(self.folder / CITATION, citations(manifest, "cff", authors=self.authors).encode())
        write(self.folder / MANIFEST, header)
        return Built(self.folder, manifest, files, self._written)

    def _described(self, path: str) -> tuple[int, str]:
        return (self.folder / path).stat().st_size, sha256_of(self.folder / path)

    def _note(self, path: str, written: bool) -> None:
        self._files.append(path)
        self._written += written

    def _track(self, steps: Sequence[Any], what: str) -> Iterator[Any]:
        return track(steps, total=len(steps), what=what, show=self.progress)


def _pointer(folder: str, member: Member) -> Row:
    name = f"{folder}/{pack_name(member.position // BLOCK)}"
    offset, size = member.extent
    return dict(zip(tables.POINTER, (name, offset, size, member.sha256), strict=True))


def _order(split: str) -> tuple[bool, bool, str]:
    """Train, validation, test and others: the first is the one that pages show."""
    return split != "train", split != "validation", split
