"""From what a manifest's header says of its sources to sources."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from synthbrain.errors import SourceError
from synthbrain.header import ArchiveSource, Licence, PacksSource, TorrentSource
from synthbrain.home import home
from synthbrain.manifest import Manifest
from synthbrain.participants import read_participants
from synthbrain.rows import PUBLISHED
from synthbrain.sources.archive import ArchiveVolumes
from synthbrain.sources.extents import Bytes, Extent
from synthbrain.sources.folder import FolderSource
from synthbrain.sources.packs import PackVolumes
from synthbrain.sources.tar import ArchiveIndex
from synthbrain.sources.url import FileBytes, open_bytes

if TYPE_CHECKING:
    from synthbrain.header import Header
    from synthbrain.sources.base import Source

log = logging.getLogger("synthbrain")

_SCRATCH_LIMIT = 20_000_000_000
_DESCRIPTION_LIMIT = 2**20


@dataclass(frozen=True)
class SourceOptions:
    """Where to fetch from, and how, beyond what a manifest's header says.

    Parameters
    ----------
    folders
        Folders of NIfTI files, copies of the archive, and folders that hold ``packs/``.
    urls
        Addresses of copies of the archive (``….tar``), or below which ``packs/`` lies.
    torrent
        A ``.torrent`` or magnet link of the torrent the header names.
    only
        Use none of the header's own sources.
    index
        An index of the archive.
    originals
        Folder to keep the archive's files in as well.
    any_affine
        Take voxels whatever affine their files state.
    scratch, scratch_limit
        Folder for the pieces of a torrent, and how many bytes of it to use.
    torrent_options
        Passed to :class:`synthbrain.torrent.client.TorrentBytes`: peers, limits on rate, privacy.
    """

    folders: Sequence[Path] = ()
    urls: Sequence[str] = ()
    torrent: str | None = None
    only: bool = False
    index: Path | None = None
    originals: Path | None = None
    any_affine: bool = False
    scratch: Path | None = None
    scratch_limit: int = _SCRATCH_LIMIT
    torrent_options: dict[str, Any] = field(default_factory=dict)


def open_sources(manifest: Manifest, options: SourceOptions = SourceOptions()) -> list[Source]:
    """The sources of a manifest: those given, then the others of its header, in its order.

    Raises
    ------
    SourceError
        A source given does not exist, or is none of this manifest's.
    """
    opened: list[Source] = [_given_folder(manifest, path, options) for path in options.folders]
    opened += [_given_url(manifest, url, options) for url in options.urls]
    torrents = [s for s in manifest.header.sources.values() if isinstance(s, TorrentSource)]
    if options.torrent is not None:
        torrent = torrents[0] if torrents else None
        opened.append(_archive(manifest, _torrent(torrent, options.torrent, options), options))
    if options.only:
        return opened
    given = {source.name for source in opened}
    for source in manifest.header.sources.values():
        if isinstance(source, TorrentSource):
            if options.torrent is None:
                opened.append(_archive(manifest, _torrent(source, None, options), options))
        elif (found := _quick(manifest, source, options)).name not in given:
            opened.append(found)
    return opened


def quick_sources(manifest: Manifest) -> list[Source]:
    """The header's sources that a dataset may ask while it trains: all but torrents.

    Of a copy of the archive only volumes its index knows are read.
    """
    sources = [
        _quick(manifest, source, SourceOptions())
        for source in manifest.header.sources.values()
        if not isinstance(source, TorrentSource)
    ]
    for source in sources:
        if isinstance(source, ArchiveVolumes):
            source.search = False
    return sources


def packed_by(manifest: Manifest) -> str | None:
    """What made the volumes of a manifest's recipes, where its header names packs of them."""
    packs = (s for s in manifest.header.sources.values() if isinstance(s, PacksSource))
    return next((source.made_by for source in packs if source.made_by != PUBLISHED), None)


def index_path(name: str) -> Path:
    """Where the index of a manifest's archive is kept."""
    return home() / "indexes" / f"{name}.parquet"


def learnt_path(name: str) -> Path:
    """Where a manifest is kept whose rows were read out of its archive."""
    return home() / "manifests" / name


def learn_rows(manifest: Manifest, source: ArchiveVolumes, table: bytes | None = None) -> Manifest:
    """Read the rows of a manifest that has none out of its archive, and keep them.

    Parameters
    ----------
    manifest
        Header only.
    source
        Its archive.
    table
        The table of covariates, if it was had otherwise.

    Returns
    -------
    Manifest
        Saved in the package's home, where :meth:`Manifest.open` finds it before the shipped one.

    Raises
    ------
    ManifestError, SourceError
        The table cannot be found, or is not what the header describes.
    """
    archive = source.archive
    data = source.table() if table is None else table
    rows = read_participants(data, archive.column_aliases, archive.participants)
    header = manifest.header.model_copy(update={"licence": _licence(manifest.header, source)})
    learnt = Manifest.create(header, rows)
    learnt.save(learnt_path(manifest.name), overwrite=True)
    return learnt


def archive_of(sources: Sequence[Source]) -> ArchiveVolumes | None:
    """The first archive among some sources."""
    return next((source for source in sources if isinstance(source, ArchiveVolumes)), None)


def _quick(manifest: Manifest, source: Any, options: SourceOptions) -> Source:
    if isinstance(source, PacksSource):
        return PackVolumes(manifest, source.url, made_by=source.made_by)
    assert isinstance(source, ArchiveSource)
    return _archive(manifest, open_bytes(source.url), options)


def _given_folder(manifest: Manifest, path: Path, options: SourceOptions) -> Source:
    if path.is_file():
        return _archive(manifest, FileBytes(path), options)
    if (path / "packs").is_dir():
        return PackVolumes(manifest, str(path), made_by=packed_by(manifest))
    archive = manifest.header.archive
    if archive is not None and (path / archive.name).is_file():
        return _archive(manifest, FileBytes(path / archive.name), options)
    inside = "" if archive is None else archive.participants.rpartition("/")[0]
    return FolderSource(path / inside if inside and (path / inside).is_dir() else path)


def _given_url(manifest: Manifest, url: str, options: SourceOptions) -> Source:
    if urlsplit(url).path.endswith((".tar", ".zip")):  # a signed address goes on behind it
        return _archive(manifest, open_bytes(url), options)
    return PackVolumes(manifest, url, made_by=packed_by(manifest))


def _archive(manifest: Manifest, bytes: Bytes, options: SourceOptions) -> ArchiveVolumes:
    archive = manifest.header.archive
    if archive is None:
        raise SourceError(
            f"{bytes.name} cannot serve {manifest.name}, whose header describes no archive"
        )
    path = index_path(manifest.name)
    return ArchiveVolumes(
        archive,
        bytes,
        _index(archive.name, bytes, options.index, path),
        index_path=path,
        originals=options.originals,
        any_affine=options.any_affine,
    )


def _index(archive: str, bytes: Bytes, given: Path | None, kept: Path) -> ArchiveIndex:
    """The index given, else the one kept, unless it is of another copy: a tar may have grown."""
    if given is None and not kept.exists():
        return ArchiveIndex(archive)
    index = ArchiveIndex.load(given or kept)
    if not isinstance(bytes, FileBytes) or index.size in (None, bytes.size):
        return index  # what is not on disk is not asked for its size before it is needed
    other = f"is the index of an archive of {index.size:,} bytes, {bytes.name} has {bytes.size:,}"
    if given is not None:
        raise SourceError(f"{given} {other}; make one of it with `synthbrain index`")
    log.warning("%s %s; what it says is not used", kept, other)
    return ArchiveIndex(archive)


def _torrent(source: TorrentSource | None, torrent: str | None, options: SourceOptions) -> Bytes:
    from synthbrain.torrent.client import TorrentBytes

    swarm = dict(options.torrent_options)
    if source is not None:
        swarm |= {"info_hash": source.info_hash, "file": source.file}
        swarm["web_seeds"] = (*swarm.get("web_seeds", ()), *source.web_seeds)
        if torrent is None:
            trackers = "".join(f"&tr={tracker}" for tracker in source.trackers)
            torrent = f"magnet:?xt=urn:btih:{source.info_hash}{trackers}"
    return TorrentBytes(
        torrent=torrent or "",
        scratch=options.scratch or home() / "cache" / "torrents",
        budget=options.scratch_limit,
        **swarm,
    )


def _licence(header: Header, source: ArchiveVolumes) -> Licence:
    """What the archive itself says of its terms, where it says anything."""
    if header.licence.status == "stated":
        return header.licence
    folder = source.archive.participants.rpartition("/")[0]
    path = os.path.join(folder, "dataset_description.json")
    extent = source.index.members.get(path)
    if extent is None or not 0 < extent.size <= _DESCRIPTION_LIMIT:
        return header.licence
    try:
        ((_, data),) = source.bytes.read([Extent(*extent)])
        name = json.loads(data)["License"]
    except (ValueError, KeyError, TypeError):
        return header.licence
    if not isinstance(name, str) or not name.strip():
        return header.licence
    return Licence(status="stated", name=name.strip()[:200], note=f"as {path} says")
