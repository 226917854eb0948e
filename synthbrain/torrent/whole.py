"""Whole torrents: fetched into a folder, and given on from there."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from synthbrain.torrent.metainfo import Metainfo, is_magnet, magnet_hash, magnet_name
from synthbrain.torrent.process import Process, Status
from synthbrain.torrent.settings import Address


def fetch_whole(
    torrent: str | Path,
    folder: Path,
    *,
    progress: Callable[[Status], None] | None = None,
    info_hash: str | None = None,
    peers: Sequence[Address] = (),
    web_seeds: Sequence[str] = (),
    private: bool = False,
    download_limit: int = 0,
    upload_limit: int = 0,
    timeout: float = 600.0,
    check: bool = False,
) -> Status:
    """Fetch all files of a torrent, or go on with what an earlier call left undone.

    Parameters
    ----------
    torrent
        A ``.torrent``, or a magnet link.
    folder
        Where its files go.
    progress
        Is shown a :class:`~synthbrain.torrent.process.Status` about twice a second.
    info_hash, peers, web_seeds, private, download_limit, upload_limit, timeout
        As :class:`~synthbrain.torrent.client.TorrentBytes`.
    check
        Hash what is there, rather than believe what is remembered of it.

    Returns
    -------
    Status
        The last one.

    Raises
    ------
    SourceError
        The torrent is unreadable, nothing comes any more, or there is no room. What is here is
        kept.
    """
    options: dict[str, Any] = {
        "info_hash": info_hash, "peers": tuple(peers), "web_seeds": tuple(web_seeds),
        "private": private, "download_limit": download_limit, "upload_limit": upload_limit,
        "trust": not check,
    }  # fmt: skip
    with _opened(torrent, folder, timeout, options) as process:
        for status in _statuses(process):
            if progress is not None:
                progress(status)
            if status.finished:
                break
        return process.status


def seed(
    torrent: str | Path,
    folder: Path,
    *,
    ratio: float | None = None,
    seconds: float | None = None,
    info_hash: str | None = None,
    peers: Sequence[Address] = (),
    private: bool = False,
    upload_limit: int = 0,
    port: int = 0,
    check: bool = False,
) -> Iterator[Status]:
    """Give a torrent's files on, until stopped or a limit is reached.

    What is missing in the folder is fetched. Closing the iterator stops it.

    Parameters
    ----------
    torrent, folder, info_hash, peers, private, upload_limit, check
        As :func:`fetch_whole`.
    ratio
        Stop after uploading so many times the torrent's bytes.
    seconds
        Stop after so long.
    port
        To listen on; 0 for any.

    Yields
    ------
    Status
        About twice a second.

    Raises
    ------
    SourceError
        The torrent is unreadable, or its files are.
    """
    options: dict[str, Any] = {
        "info_hash": info_hash, "peers": tuple(peers), "private": private, "port": port,
        "upload_limit": upload_limit, "trust": not check,
    }  # fmt: skip
    until = time.monotonic() + (float("inf") if seconds is None else seconds)
    with _opened(torrent, folder, float("inf"), options) as process:
        for status in _statuses(process):
            yield status
            enough = ratio is not None and status.finished and status.sent >= ratio * status.wanted
            if enough or time.monotonic() >= until:
                return


def _opened(
    torrent: str | Path, folder: Path, timeout: float, options: dict[str, Any]
) -> contextlib.closing[Process]:
    """A worker on all of a torrent; what it remembers lies hidden beside the data."""
    if is_magnet(torrent):
        name, key = magnet_name(str(torrent)), magnet_hash(str(torrent))
    else:
        torrent = Path(torrent).expanduser().absolute()
        meta = Metainfo.open(torrent, options["info_hash"])
        name, key = meta.name, meta.key
    folder = Path(folder).expanduser().absolute()
    task = {
        "torrent": str(torrent), "save": str(folder), "state": str(folder / f".torrent-{key}"),
        "whole": True, **options,
    }  # fmt: skip
    return contextlib.closing(Process(task, name, timeout))


def _statuses(process: Process) -> Iterator[Status]:
    for event in process.events():
        if event["event"] == "status":
            yield process.status
