"""Options about torrents that commands share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from synthbrain.errors import UsageError
from synthbrain.sizes import byte_count

SWARM = "Torrents"

Peers = Annotated[
    list[str] | None,
    typer.Option("--peer", metavar="HOST:PORT", help="A peer to connect to; may be repeated.",
                 rich_help_panel=SWARM),
]  # fmt: skip
Private = Annotated[
    bool,
    typer.Option("--private", metavar=" ", rich_help_panel=SWARM,
                 help="No trackers and no discovery: talk to --peer and web seeds alone."),
]  # fmt: skip
UploadLimit = Annotated[
    str | None,
    typer.Option(metavar="RATE", help="Upload at most so fast: 500kB, 2MB (a second).",
                 rich_help_panel=SWARM),
]  # fmt: skip
DownloadLimit = Annotated[
    str | None,
    typer.Option(metavar="RATE", help="Download at most so fast.", rich_help_panel=SWARM),
]  # fmt: skip


def addresses(peers: list[str] | None) -> tuple[tuple[str, int], ...]:
    """Peers as (host, port).

    Raises
    ------
    UsageError
        One is not ``HOST:PORT``.
    """

    def parsed() -> Iterator[tuple[str, int]]:
        for text in peers or ():
            host, _, port = text.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
                raise UsageError(f"--peer must be HOST:PORT, found {text!r}")
            yield host.strip("[]"), int(port)

    return tuple(parsed())


def rate(text: str | None) -> int:
    """Bytes a second of a rate such as 2MB or 500kB/s; 0 where there is none.

    Raises
    ------
    UsageError
        It is no rate, or 0, which libtorrent would take for no limit.
    """
    return 0 if text is None else byte_count(text.removesuffix("/s"), "a rate", least=1)
