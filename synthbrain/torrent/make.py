"""Making a torrent of a file or a folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import libtorrent as lt

from synthbrain.errors import SourceError
from synthbrain.torrent.metainfo import Metainfo

log = logging.getLogger("synthbrain")

Version = Literal["hybrid", "v1", "v2"]

_SMALLEST = 64 << 10
_LARGEST = 16 << 20
_PIECES = 1000
"""Small torrents have about so many pieces: fewer make partial fetches dear."""

_TORRENT_BYTES = 20_000_000
_HASH_BYTES = {"hybrid": 52, "v1": 20, "v2": 32}
_FLAGS = {"hybrid": 0, "v1": lt.create_torrent.v1_only, "v2": lt.create_torrent.v2_only}


def choose_piece_size(size: int, version: Version = "hybrid") -> int:
    """Bytes of a piece for so many bytes of data: small ones, as long as the torrent file stays so.

    Fetching a member of an archive transfers about one piece more than the member. Archives of
    1 GB and more get at least 1 MiB, and more only where the torrent file would pass 20 MB.

    Examples
    --------
    >>> choose_piece_size(600_000_000_000) >> 20
    2
    """
    piece = _SMALLEST
    while piece < 1 << 20 and size / piece > _PIECES:
        piece *= 2
    while piece < _LARGEST and size / piece * _HASH_BYTES[version] > _TORRENT_BYTES:
        piece *= 2
    return piece


def make_torrent(
    path: Path,
    out: Path,
    *,
    trackers: Sequence[str] = (),
    web_seeds: Sequence[str] = (),
    piece_size: int | None = None,
    version: Version = "hybrid",
    comment: str = "",
    private: bool = False,
    created: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Metainfo:
    """Make a torrent: of the same files and options always the same bytes.

    Parameters
    ----------
    path
        A file or a folder. Only its last part gets into the torrent.
    out
        The ``.torrent`` to write, in one step.
    trackers, web_seeds
        Their addresses; a web seed's ends in the file's name, or in ``/`` before the folder's.
    piece_size
        Bytes, a power of two from 16 KiB on; by default :func:`choose_piece_size`.
    version
        ``"hybrid"`` serves clients of both protocols.
    comment, private
        As shown by clients; whether peers may be had from the trackers only.
    created
        Unix time; left out by default.
    progress
        Called with pieces hashed and pieces in all.

    Returns
    -------
    Metainfo
        What was written.

    Raises
    ------
    SourceError
        Nothing to hash, a file that cannot be read, a symbolic link, or an odd piece size.
    """
    path = Path(os.path.abspath(Path(path).expanduser()))
    files = _files(path)
    size = piece_size
    if size is None:
        size = choose_piece_size(sum(file.size for file in files), version)
    if size < 16 << 10 or size & (size - 1):
        raise SourceError(f"piece size {size}: expected a power of two, 16384 or more")
    torrent = lt.create_torrent(files, size, _FLAGS[version] | lt.create_torrent.no_attributes)
    _describe(torrent, trackers, web_seeds, comment, private)
    _hash(torrent, path, progress)
    made = torrent.generate()
    made.pop(b"creation date", None)
    if created is not None:
        made[b"creation date"] = created
    data = lt.bencode(made)
    if str(path.parent).encode() in data and path.parent != path.parent.parent:
        log.warning(
            "%s mentions the folder %s of this machine; check its comment", out, path.parent
        )
    return _write(data, Path(out).expanduser())


def _files(path: Path) -> list[lt.create_file_entry]:
    found = [path, *(path.rglob("*") if path.is_dir() and not path.is_symlink() else ())]
    links = [item for item in found if item.is_symlink()]
    if links:
        raise SourceError(f"{links[0]} is a symbolic link; put the file itself there")
    try:
        files = lt.list_files(str(path)) if path.exists() else []
    except RuntimeError as error:
        raise SourceError(f"cannot list {path}: {error}") from error
    if not any(file.size for file in files):
        raise SourceError(f"nothing to make a torrent of in {path}; check the path")
    return sorted(files, key=lambda file: str(file.filename))


def _describe(
    torrent: lt.create_torrent,
    trackers: Sequence[str],
    web_seeds: Sequence[str],
    comment: str,
    private: bool,
) -> None:
    for tier, tracker in enumerate(trackers):
        torrent.add_tracker(tracker, tier)
    for url in web_seeds:
        torrent.add_url_seed(url)
    if comment:
        torrent.set_comment(comment)
    torrent.set_priv(private)


def _hash(
    torrent: lt.create_torrent, path: Path, progress: Callable[[int, int], None] | None
) -> None:
    total = torrent.num_pieces()
    try:
        lt.set_piece_hashes(
            torrent, str(path.parent), lambda piece: progress and progress(piece + 1, total)
        )
    except RuntimeError as error:
        raise SourceError(f"cannot hash {path}: {error}; check that it can be read") from error


def _write(data: bytes, out: Path) -> Metainfo:
    made = Metainfo.parse(data, str(out))
    aside = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        aside.write_bytes(data)
        os.replace(aside, out)
    except OSError as error:
        raise SourceError(f"cannot write {out}: {error.strerror}; choose another") from error
    finally:
        aside.unlink(missing_ok=True)
    return made
