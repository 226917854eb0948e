"""``synthbrain index`` and ``seed``: archives and torrents themselves."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from synthbrain.cli.console import examples, interrupted, say, show_json
from synthbrain.cli.options import Json
from synthbrain.cli.swarm import Peers, Private, UploadLimit, addresses, rate
from synthbrain.errors import SourceError, UsageError

if TYPE_CHECKING:
    from synthbrain.sources.extents import Bytes
    from synthbrain.sources.tar import ArchiveIndex

_SAVE_SECONDS = 5.0
_SHOW_SECONDS = 10.0

Check = Annotated[
    bool, typer.Option("--check", metavar=" ", help="Hash what is in the folder first.")
]


def index(
    archive: Annotated[
        str, typer.Argument(metavar="TAR", help="A tar, on disk or at an address.",
                            show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The index to write, a Parquet file.",
                     show_default="<tar>.index.parquet"),
    ] = None,
    manifest: Annotated[
        str | None,
        typer.Option(metavar="MANIFEST", show_default="the one whose archive has this name",
                     help="Also read this manifest's rows, and keep the index for `pull`."),
    ] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Find out where each member of a tar lies, without unpacking it.

    The index is small and may be shared: with it `pull --index` fetches exactly the volumes asked
    for. Safe to interrupt and to run again.
    """
    from synthbrain.sources.tar import ArchiveIndex
    from synthbrain.sources.url import open_bytes

    source = open_bytes(archive)
    path = urlsplit(archive).path if "://" in archive else archive
    name = path.rstrip("/").rpartition("/")[2]
    out = out or Path(f"{name}.index.parquet")
    found = ArchiveIndex.load(out) if out.exists() else ArchiveIndex(name)
    if found.size not in (None, source.size):
        raise SourceError(
            f"{out} is the index of an archive of {found.size:,} bytes, {archive} has "
            f"{source.size:,}; delete it, or write another with --out"
        )
    _walk(found, source, out)
    say(f"{len(found.members):,} files in {name}, {source.size / 1e9:,.2f} GB")
    learnt = _learn(found, source, manifest, name)
    if json:
        show_json({"index": str(out), "files": len(found.members), "manifest": learnt})
    else:
        print(out)


def seed(
    ctx: typer.Context,
    torrent: Annotated[
        str, typer.Argument(metavar="TORRENT", help="A .torrent or a magnet link.",
                            show_default=False)
    ],
    folder: Annotated[Path, typer.Option(metavar="DIR", help="Where its files are.")],
    ratio: Annotated[
        float | None, typer.Option(metavar="X", help="Stop after giving away X times its size.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(metavar="N", help="Stop after N minutes.")
    ] = None,
    port: Annotated[
        int, typer.Option(metavar="PORT", min=0, max=65535, help="Port to listen on; 0 for any.")
    ] = 0,
    peer: Peers = None,
    private: Private = False,
    upload_limit: UploadLimit = None,
    check: Check = False,
) -> None:  # fmt: skip
    """Give the files of a torrent on to others, until stopped."""
    from synthbrain.torrent.whole import seed as seeding

    statuses = seeding(
        torrent, folder, ratio=ratio, seconds=None if minutes is None else 60 * minutes,
        peers=addresses(peer), private=private, upload_limit=rate(upload_limit), port=port,
        check=check,
    )  # fmt: skip
    shown, status = 0.0, None
    try:
        for status in statuses:
            if time.monotonic() - shown >= _SHOW_SECONDS:
                shown = time.monotonic()
                say(f"{status.state}: {status.peers} peers, {_text(status.sent)} sent, "
                    f"{_text(status.upload_rate)}/s")  # fmt: skip
    except KeyboardInterrupt:
        sent = "nothing" if status is None else _text(status.sent)
        raise interrupted(ctx, f"{sent} given on") from None
    say(f"{_text(status.sent if status else 0)} given on")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(
        epilog=examples(
            "synthbrain index LDM_100k.tar",
            "synthbrain index https://host/LDM_100k.tar --manifest ldm-100k --out ldm.parquet",
        )
    )(index)
    app.command(
        epilog=examples(
            "synthbrain seed LDM_100k.torrent --folder /data --ratio 2",
            "synthbrain seed LDM_100k.torrent --folder /data --upload-limit 5MB --minutes 600",
        )
    )(seed)


def _walk(found: ArchiveIndex, source: Bytes, out: Path) -> None:
    """Walk the headers, saving the index now and then."""
    from synthbrain.progress import measured
    from synthbrain.sources.archive import direct
    from synthbrain.sources.tar import extend

    saved = time.monotonic()
    try:
        with measured("indexing", source.size) as show:
            for _ in extend(found, direct(source), source.size):
                if time.monotonic() - saved >= _SAVE_SECONDS:
                    found.save(out)
                    saved = time.monotonic()
                show(found.walked, f"{len(found.members):,} files")
    finally:
        found.save(out)


def _learn(found: ArchiveIndex, source: Bytes, name: str | None, archive: str) -> str | None:
    """Read the rows of the manifest whose archive this is, and keep its index."""
    from synthbrain.manifest import Manifest, shipped_manifests
    from synthbrain.sources.archive import ArchiveVolumes
    from synthbrain.sources.opening import index_path, learn_rows

    if name is None:
        headers = (Manifest.open(shipped).header for shipped in shipped_manifests())
        fitting = (h.name for h in headers if h.archive is not None and h.archive.name == archive)
        name = next(fitting, None)
    if name is None:
        return None
    manifest = Manifest.open(name)
    if manifest.header.archive is None:
        raise UsageError(f"{name} has no archive; its header describes none")
    volumes = ArchiveVolumes(
        manifest.header.archive, source, found, index_path=index_path(manifest.name)
    )
    volumes.save_index()
    if manifest.header.rows_digest is None:
        manifest = learn_rows(manifest, volumes)
        say(f"{manifest.name}: {len(manifest):,} rows read from {volumes.archive.participants}")
    return manifest.name


def _text(count: float) -> str:
    from synthbrain.sizes import size_text

    return size_text(count)
