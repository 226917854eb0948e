"""``synthbrain pull``, ``index`` and ``seed``: published volumes, and giving them on."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from synthbrain.cli.console import examples, hint, interrupted, say, show_json
from synthbrain.cli.options import DryRun, Json, Overwrite, Selection, StoreFolder, selecting
from synthbrain.errors import SourceError, UsageError

if TYPE_CHECKING:
    from synthbrain.archive import ArchiveIndex
    from synthbrain.plan import Plan
    from synthbrain.pull import Pull
    from synthbrain.sources.extents import Bytes
    from synthbrain.sources.opening import SourceOptions

_FROM, _SWARM = "SourceOptions from", "Torrents"
_SAVE_SECONDS = 5.0
_SHOW_SECONDS = 10.0

Peers = Annotated[
    list[str] | None,
    typer.Option("--peer", metavar="HOST:PORT", help="A peer to connect to; may be repeated.",
                 rich_help_panel=_SWARM),
]  # fmt: skip
Private = Annotated[
    bool,
    typer.Option("--private", metavar=" ", rich_help_panel=_SWARM,
                 help="No trackers and no discovery: talk to --peer and web seeds alone."),
]  # fmt: skip
UploadLimit = Annotated[
    str | None,
    typer.Option(metavar="RATE", help="Upload at most so fast: 500kB, 2MB (a second).",
                 rich_help_panel=_SWARM),
]  # fmt: skip
DownloadLimit = Annotated[
    str | None,
    typer.Option(metavar="RATE", help="Download at most so fast.", rich_help_panel=_SWARM),
]  # fmt: skip
Check = Annotated[
    bool, typer.Option("--check", metavar=" ", help="Hash what is in the folder first.")
]


@selecting
def pull(
    ctx: typer.Context,
    manifest: Annotated[
        str,
        typer.Argument(metavar="MANIFEST", show_default=False,
                       help="Name, folder or address (hf://datasets/ORG/NAME) of a manifest, or a "
                       ".torrent to fetch whole."),
    ],
    selection: Selection,
    from_: Annotated[
        list[Path] | None,
        typer.Option("--from", metavar="PATH", rich_help_panel=_FROM,
                     help="The archive, a folder of NIfTI files or one with packs/, on disk; may "
                     "be repeated."),
    ] = None,
    url: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", rich_help_panel=_FROM,
                     help="A copy of the archive (….tar), or a folder with packs/, at an address: "
                     "https, s3, gs, hf, file."),
    ] = None,
    torrent: Annotated[
        str | None,
        typer.Option(metavar="FILE|MAGNET", rich_help_panel=_FROM,
                     help="The .torrent of the manifest's torrent: much faster to start from than "
                     "the magnet link in its header."),
    ] = None,
    only: Annotated[
        bool,
        typer.Option("--only", metavar=" ", rich_help_panel=_FROM,
                     help="Use nothing but the above."),
    ] = False,
    index: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=_FROM,
                     help="An index of the archive, from `synthbrain index`."),
    ] = None,
    participants: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=_FROM,
                     help="The table of covariates, where the archive's is not at either end."),
    ] = None,
    originals: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the archive's own files here as well.")
    ] = None,
    any_affine: Annotated[
        bool,
        typer.Option("--any-affine", metavar=" ",
                     help="Take voxels whatever affine their files state."),
    ] = False,
    save: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Save the rows pulled as a cohort of this name."),
    ] = None,
    to: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the files of a .torrent.")
    ] = None,
    store: StoreFolder = None,
    peer: Peers = None,
    private: Private = False,
    download_limit: DownloadLimit = None,
    upload_limit: UploadLimit = None,
    scratch: Annotated[
        Path | None,
        typer.Option(metavar="DIR", rich_help_panel=_SWARM, help="Folder for pieces of a torrent.",
                     show_default="cache/ in the package's home"),
    ] = None,
    scratch_limit: Annotated[
        str, typer.Option(metavar="SIZE", rich_help_panel=_SWARM, help="Disk for pieces.")
    ] = "20GB",
    timeout: Annotated[
        float,
        typer.Option(metavar="SECONDS", rich_help_panel=_SWARM,
                     help="Give a torrent up after so long without any progress."),
    ] = 120.0,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Fetch published volumes into the store: the rows asked for, checked, and no more.

    Safe to interrupt and to run again: what is stored is kept. Where nothing says where in an
    archive a volume lies, --limit takes whichever come first.
    """
    from synthbrain.manifest import Manifest
    from synthbrain.sources.opening import SourceOptions

    swarm: dict[str, Any] = {
        "peers": _addresses(peer), "private": private,
        "download_limit": _rate(download_limit), "upload_limit": _rate(upload_limit),
        "timeout": timeout,
    }  # fmt: skip
    if manifest.endswith(".torrent"):
        _pull_whole(ctx, manifest, to, swarm, dry_run=dry_run)
        return
    if to is not None:
        raise UsageError("--to is for the files of a .torrent; --store says where volumes go")
    given = SourceOptions(
        folders=from_ or (), urls=url or (), torrent=torrent, only=only, index=index,
        originals=originals, any_affine=any_affine, scratch=scratch,
        scratch_limit=_size("--scratch-limit", scratch_limit), torrent_options=swarm,
    )  # fmt: skip
    _pull_rows(ctx, Manifest.open(manifest), given, selection, store, participants,
               save=save, dry_run=dry_run, overwrite=overwrite)  # fmt: skip


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
    from synthbrain.archive import ArchiveIndex
    from synthbrain.sources.url import open_bytes

    source = open_bytes(archive)
    name = archive.rstrip("/").rpartition("/")[2]
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
    folder: Annotated[Path, typer.Option(metavar="DIR", help="SourceOptions its files are.")],
    ratio: Annotated[
        float | None, typer.Option(metavar="X", help="Stop after giving away X times its size.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(metavar="N", help="Stop after N minutes.")
    ] = None,
    port: Annotated[int, typer.Option(metavar="PORT", help="Port to listen on; 0 for any.")] = 0,
    peer: Peers = None,
    private: Private = False,
    upload_limit: UploadLimit = None,
    check: Check = False,
) -> None:  # fmt: skip
    """Give the files of a torrent on to others, until stopped."""
    from synthbrain.torrent.whole import seed as seeding

    statuses = seeding(
        torrent, folder, ratio=ratio, seconds=None if minutes is None else 60 * minutes,
        peers=_addresses(peer), private=private, upload_limit=_rate(upload_limit), port=port,
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
            "synthbrain pull ldm-100k --torrent LDM_100k.torrent --limit 1000 --dry-run",
            "synthbrain pull ldm-100k --age 60y:70y --limit 500 --index LDM_100k.index.parquet",
            "synthbrain pull ldm-100k --from /data/LDM_100k.tar --sex female",
            "synthbrain pull hf://datasets/ORG/NAME --split train",
            "synthbrain pull LDM_100k.torrent --to /data",
        )
    )(pull)
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


def _pull_rows(
    ctx: typer.Context,
    manifest: Any,
    options: SourceOptions,
    selection: Selection,
    store: Path | None,
    participants: Path | None,
    *,
    save: str | None,
    dry_run: bool,
    overwrite: bool,
) -> None:
    from synthbrain.pull import Pull

    job = Pull.of(manifest, options, store=store, table=participants, **selection.keywords())
    try:
        plan = job.plan()
        _announce(job, plan)
        if not dry_run:
            _run(ctx, job, plan)
            _kept(job, manifest.name, save, overwrite=overwrite)
    finally:
        job.close()


def _announce(job: Pull, plan: Plan) -> None:
    licence = job.manifest.header.licence
    terms = licence.name or f"unknown, {licence.note}"
    say(f"{job.manifest.name}: licence {terms}")
    if job.count is not None:
        say("note: nothing says where in the archive volumes lie; those that come first are taken")
    say(f"{job.manifest.name}: {plan}")


def _run(ctx: typer.Context, job: Pull, plan: Plan) -> None:
    from synthbrain.progress import track

    try:
        new = sum(1 for _ in track(job.run(plan), total=plan.missing, what="pulling"))
    except KeyboardInterrupt:
        stored = int(job.resolver.stored(job.rows).sum())
        raise interrupted(ctx, f"{stored:,} volumes are kept in {job.folder}") from None
    say(f"{new:,} new volumes in {job.folder / job.manifest.store_key}")


def _kept(job: Pull, name: str, save: str | None, *, overwrite: bool) -> None:
    """Say, or save, what can be loaded now."""
    stored = job.resolver.stored(job.rows)
    if save is not None:
        ids = job.chosen.table.index[stored]
        cohort = job.manifest.select(ids=ids)
        print(cohort.save(_cohorts() / save, overwrite=overwrite))
        hint("synthbrain", "verify", save)
    elif job.count is not None:
        hint("synthbrain", "pull", name, "--limit", str(job.count), "--save", "mine")
    else:
        hint("synthbrain", "export", name, "--limit", str(int(stored.sum())), "--out", "volumes")


def _cohorts() -> Path:
    from synthbrain.home import home

    return home() / "cohorts"


def _pull_whole(
    ctx: typer.Context, torrent: str, to: Path | None, swarm: dict[str, Any], *, dry_run: bool
) -> None:
    from synthbrain.progress import measured
    from synthbrain.torrent.metainfo import Metainfo
    from synthbrain.torrent.whole import fetch_whole

    if to is None:
        raise UsageError("say where the files of the torrent go with --to DIR")
    meta = Metainfo.open(torrent)
    size = sum(file.size for file in meta.files)
    say(f"{meta.name}: {len(meta.files):,} files, {_text(size)}, to {to}")
    if dry_run:
        return
    with measured("pulling", size) as show:
        try:
            fetch_whole(torrent, to, progress=lambda s: show(s.done, f"{s.peers} peers"), **swarm)
        except KeyboardInterrupt:
            raise interrupted(ctx, f"what is here is kept in {to}") from None
    print(to / meta.name)
    hint("synthbrain", "seed", torrent, "--folder", str(to))


def _walk(found: ArchiveIndex, source: Bytes, out: Path) -> None:
    """Walk the headers, saving the index now and then."""
    from synthbrain.archive import extend
    from synthbrain.progress import measured
    from synthbrain.sources.archive import direct

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
    from synthbrain.plan import size_text

    return size_text(count)


def _addresses(peers: list[str] | None) -> tuple[tuple[str, int], ...]:
    def parsed() -> Iterator[tuple[str, int]]:
        for text in peers or ():
            host, _, port = text.rpartition(":")
            if not host or not port.isdigit():
                raise UsageError(f"--peer must be HOST:PORT, found {text!r}")
            yield host.strip("[]"), int(port)

    return tuple(parsed())


def _rate(text: str | None) -> int:
    return 0 if text is None else _size("a rate", text.removesuffix("/s"))


def _size(what: str, text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", text.strip())
    if match is None:
        raise UsageError(f"{what} must be a size such as 500kB, 20MB or 3GB; found {text!r}")
    return round(float(match[1]) * 1000 ** ("", "k", "M", "G", "T").index(match[2]))
