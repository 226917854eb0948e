"""``synthbrain prepare``: raw scans."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from synthbrain.cli.console import examples, hint, interrupted, say
from synthbrain.cli.options import DryRun

if TYPE_CHECKING:
    from synthbrain.prepare import Preparation
    from synthbrain.scan_report import Record


def prepare(
    ctx: typer.Context,
    raw: Annotated[
        Path,
        typer.Argument(metavar="RAW", show_default=False,
                       help="Folder of T1w scans as .nii or .nii.gz: a BIDS dataset, or any."),
    ],
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", show_default=False,
                       help="Folder for the manifest, its store and the report."),
    ],
    participants: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Table with participant_id, sex, age, "
                     "ventricular_volume and brain_volume.", show_default="RAW/participants.tsv"),
    ] = None,
    jobs: Annotated[int, typer.Option(metavar="N", help="Processes, up to 2 GB each.")] = 1,
    unconditional: Annotated[
        bool, typer.Option("--unconditional", metavar=" ", help="Do without covariates.")
    ] = False,
    unires: Annotated[
        bool | None,
        typer.Option("--unires/--no-unires", help="Reconstruct scans at 1 mm with UniRes first.",
                     show_default="where it is installed"),
    ] = None,
    dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Register, crop and scale raw scans: a manifest to train on.

    A scan that is no good is left out, with the reason in OUT/report.html. Safe to interrupt and to
    run again: what is done is kept.
    """
    from synthbrain.prepare import Preparation

    job = Preparation(raw, out, participants, unconditional, unires=unires)
    if dry_run:
        todo = len(job.todo())
        print(f"{len(job.scans):,} scans, {todo:,} to prepare to {out}")
        return
    try:
        records = job.run(jobs=jobs)
    except KeyboardInterrupt:
        raise interrupted(ctx, f"scans that are done are kept in {out}") from None
    _conclude(job, records)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog=examples(
            "synthbrain prepare ukb-bids ready --dry-run",
            "synthbrain prepare ukb-bids ready --jobs 8",
            "synthbrain prepare scans ready --participants table.tsv",
            "synthbrain prepare scans ready --unconditional",
        )
    )(prepare)


def _conclude(job: Preparation, records: list[Record]) -> None:
    left_out = [record for record in records if record.reason]
    for record in left_out[:10]:
        say(f"left out: {record.source}: {record.reason}")
    if len(left_out) > 10:
        say(f"left out: {len(left_out) - 10:,} more")
    say(f"{len(records) - len(left_out):,} of {len(records):,} scans prepared; see {job.report}")
    manifest = job.out / "manifest"
    print(manifest.absolute())
    hint("synthbrain", "verify", str(manifest), "--store", str(job.out / "store"))
