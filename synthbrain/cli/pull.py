"""``synthbrain pull``: published volumes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from synthbrain.cli.console import again, examples, hint, interrupted, same_command, say
from synthbrain.cli.options import DryRun, Overwrite, Selection, StoreFolder, selecting
from synthbrain.cli.swarm import (
    SWARM,
    DownloadLimit,
    Peers,
    Private,
    UploadLimit,
    addresses,
    rate,
)
from synthbrain.errors import UsageError
from synthbrain.sizes import byte_count

if TYPE_CHECKING:
    from synthbrain.manifest import Manifest
    from synthbrain.plan import Plan
    from synthbrain.pull import Pull
    from synthbrain.sources.opening import SourceOptions

_FROM = "Where from"


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
        typer.Option(metavar="DIR", rich_help_panel=SWARM, help="Folder for pieces of a torrent.",
                     show_default="cache/ in the package's home"),
    ] = None,
    scratch_limit: Annotated[
        str, typer.Option(metavar="SIZE", rich_help_panel=SWARM, help="Disk for pieces.")
    ] = "20GB",
    timeout: Annotated[
        float,
        typer.Option(metavar="SECONDS", rich_help_panel=SWARM,
                     help="Give a torrent up after so long without any progress."),
    ] = 120.0,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Fetch published volumes into the store: the rows asked for, checked, and no more.

    Safe to interrupt and to run again: what is stored is kept. Where nothing says where in an
    archive a volume lies, --limit takes whichever come first.
    """
    from synthbrain.sources.opening import SourceOptions

    swarm: dict[str, Any] = {
        "peers": addresses(peer), "private": private,
        "download_limit": rate(download_limit), "upload_limit": rate(upload_limit),
        "timeout": timeout,
    }  # fmt: skip
    if manifest.endswith(".torrent"):
        if selection.given or any((from_, url, torrent, only, index, participants, originals,
                                   any_affine, save, store, scratch, overwrite)):  # fmt: skip
            raise UsageError(
                "a .torrent is fetched whole, with --to alone; for some of its volumes name their "
                f"manifest: synthbrain pull ldm-100k --torrent {manifest}"
            )
        _pull_whole(ctx, manifest, to, swarm, dry_run=dry_run)
        return
    if to is not None:
        raise UsageError("--to is for the files of a .torrent; --store says where volumes go")
    given = SourceOptions(
        folders=from_ or (), urls=url or (), torrent=torrent, only=only, index=index,
        originals=originals, any_affine=any_affine, scratch=scratch,
        scratch_limit=byte_count(scratch_limit, "--scratch-limit"), torrent_options=swarm,
    )  # fmt: skip
    _pull_rows(ctx, manifest, given, selection, store, participants,
               save=save, dry_run=dry_run, overwrite=overwrite)  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog=examples(
            "synthbrain pull ldm-100k --torrent LDM_100k.torrent --limit 1000 --dry-run",
            "synthbrain pull ldm-100k --age 60y:70y --limit 500 --index LDM_100k.index.parquet",
            "synthbrain pull ldm-100k --from /data/LDM_100k.tar --sex female",
            "synthbrain pull hf://datasets/ORG/NAME --split train",
            "synthbrain pull LDM_100k.torrent --to /data",
        )
    )(pull)


def _pull_rows(
    ctx: typer.Context,
    name: str,
    options: SourceOptions,
    selection: Selection,
    store: Path | None,
    participants: Path | None,
    *,
    save: str | None,
    dry_run: bool,
    overwrite: bool,
) -> None:
    from synthbrain.manifest import Manifest, check_folder
    from synthbrain.pull import Pull

    if save is not None:
        check_folder(_cohorts() / save, overwrite=overwrite)
    manifest = Manifest.open(name)
    job = Pull.of(manifest, options, store=store, table=participants, **selection.keywords())
    try:
        plan = job.plan()
        _announce(job, plan)
        if dry_run:
            return
        _run(ctx, job, plan)
    finally:
        job.close()
    if save is not None:
        print(_saved(job).save(_cohorts() / save, overwrite=overwrite))
        hint("synthbrain", "verify", save, *again("--store", store))
    elif job.count is not None:
        say(f"next: {same_command(ctx)} --save mine")
    else:
        # Rows that were just learnt are found by the manifest's own name alone.
        known = name if manifest.header.rows_digest is not None else manifest.name
        hint("synthbrain", "export", known, "--out", "volumes", *again("--store", store))


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


def _saved(job: Pull) -> Manifest:
    """The rows asked for, as a cohort."""
    stored = job.resolver.stored(job.rows)
    return job.manifest.select(ids=job.chosen.table.index[stored][: job.count])


def _cohorts() -> Path:
    from synthbrain.home import home

    return home() / "cohorts"


def _pull_whole(
    ctx: typer.Context, torrent: str, to: Path | None, swarm: dict[str, Any], *, dry_run: bool
) -> None:
    from synthbrain.progress import measured
    from synthbrain.sizes import size_text
    from synthbrain.torrent.metainfo import Metainfo
    from synthbrain.torrent.whole import fetch_whole

    if to is None:
        raise UsageError("say where the files of the torrent go with --to DIR")
    meta = Metainfo.open(torrent)
    size = sum(file.size for file in meta.files)
    say(f"{meta.name}: {len(meta.files):,} files, {size_text(size)}, to {to}")
    if dry_run:
        return
    with measured("pulling", size) as show:
        try:
            fetch_whole(torrent, to, progress=lambda s: show(s.done, f"{s.peers} peers"), **swarm)
        except KeyboardInterrupt:
            raise interrupted(ctx, f"what is here is kept in {to}") from None
    print(to / meta.name)
    hint("synthbrain", "seed", torrent, "--folder", str(to))
