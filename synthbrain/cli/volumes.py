"""``synthbrain fill``, ``verify`` and ``export``: the voxels of a cohort."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from synthbrain.cli.console import (
    PROBLEMS,
    again,
    examples,
    hint,
    interrupted,
    say,
    show_json,
)
from synthbrain.cli.options import (
    Cohort,
    DryRun,
    GeneratorName,
    Json,
    MadeBy,
    Selection,
    StoreFolder,
    generator,
    selecting,
)
from synthbrain.errors import MissingVolumeError, UsageError

if TYPE_CHECKING:
    from synthbrain.dataset import SynthBrainDataset


@selecting
def fill(
    ctx: typer.Context,
    cohort: Cohort,
    selection: Selection,
    generator_name: GeneratorName = "auto",
    store: StoreFolder = None,
    dry_run: DryRun = False,
) -> None:
    """Fetch or make every missing volume of a cohort.

    Safe to interrupt and to run many times, also at once: what is stored is kept.
    """
    dataset = _dataset(cohort, selection, generator_name, store)
    plan = dataset.plan()
    if dry_run:
        print(plan)
        return
    say(f"{dataset.manifest.name}: {plan}")
    try:
        made = dataset.fill()
    except KeyboardInterrupt:
        kept = len(dataset) - len(dataset.missing())
        where = f"{kept:,} of {len(dataset):,} volumes are kept in {_folder(dataset)}"
        raise interrupted(ctx, where) from None
    say(f"{made:,} new, {len(dataset):,} stored in {_folder(dataset)}")
    out = f"{Path(cohort).name}-bids"
    hint("synthbrain", "export", cohort, "--out", out, *again("--store", store))


@selecting
def verify(
    cohort: Cohort,
    selection: Selection,
    store: StoreFolder = None,
    generator_name: GeneratorName = "none",
    made_by: MadeBy = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            metavar=" ",
            help="Set damaged volumes aside, and fetch them again where a source has them.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Decode every stored volume and name the damaged ones.

    Exits with 1 if any are left. Volumes that --repair set aside and no source has are missing:
    fill makes them again.
    """
    dataset = _dataset(cohort, selection, generator_name, store, made_by)
    present = [i for i in range(len(dataset)) if dataset.resolver.path(i).exists()]
    found = list(damage(dataset, present))
    mended = _mend(dataset, [index for index, _ in found]) if repair else 0
    ids, path = dataset.manifest.table.index, dataset.resolver.path
    problems = [{"id": ids[i], "problem": why, "path": str(path(i))} for i, why in found]
    if json:
        show_json({"rows": len(dataset), "checked": len(present), "damaged": problems})
    else:
        for problem in problems:
            print(problem["id"], problem["problem"], sep="\t")
    missing = len(dataset) - len(present)
    told = f", {mended:,} of them mended" if repair and found else ""
    say(f"{len(present):,} checked, {len(found):,} damaged{told}, {missing:,} not stored")
    if len(found) > mended:
        next_one = ("fill", cohort) if repair else ("verify", cohort, "--repair")
        hint("synthbrain", *next_one, *again("--store", store))
        raise typer.Exit(PROBLEMS)


@selecting
def export(
    ctx: typer.Context,
    cohort: Cohort,
    selection: Selection,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.")],
    format: Annotated[
        str, typer.Option(metavar="bids|nifti", help="A BIDS derivative dataset, or plain files.")
    ] = "bids",
    dtype: Annotated[
        str, typer.Option(metavar="uint8|float32", help="uint8 carries a scale in its header.")
    ] = "uint8",
    generator_name: GeneratorName = "none",
    made_by: MadeBy = None,
    store: StoreFolder = None,
    author: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Author of the BIDS dataset; may be repeated."),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Write the volumes of a cohort as NIfTI files.

    Without --generator only what is stored is exported. What is exported already is kept.
    """
    from synthbrain.export import FORMATS, Export

    if format not in FORMATS:
        raise UsageError(f"--format must be one of {', '.join(FORMATS)}; found {format!r}")
    dataset = _dataset(cohort, selection, generator_name, store, made_by)
    if generator_name == "none":
        dataset = _only_stored(dataset, cohort)
    job = Export(dataset, out, FORMATS[format], dtype, tuple(author or ()))  # type: ignore[arg-type]
    if dry_run:
        todo = len(job.todo())
        print(f"{len(dataset) - todo:,} exported already, {todo:,} to export to {out}")
        return
    try:
        written = job.run()
    except KeyboardInterrupt:
        kept = len(dataset) - len(job.todo())
        where = f"{kept:,} of {len(dataset):,} volumes are exported to {out}"
        raise interrupted(ctx, where) from None
    say(f"{written:,} new, {len(dataset):,} volumes in {out}")
    print(out.absolute())


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(
        epilog=examples(
            "synthbrain fill older --dry-run",
            "synthbrain fill older",
            "synthbrain fill synthbrain-100k --split train --age 60y:75y --limit 500",
        )
    )(fill)
    app.command(
        epilog=examples(
            "synthbrain verify older",
            "synthbrain verify older --repair || synthbrain fill older",
        )
    )(verify)
    app.command(
        epilog=examples(
            "synthbrain export older --out older-bids --format bids",
            "synthbrain export older --out older-nifti --format nifti --dtype float32",
            "synthbrain export synthbrain-100k --sex male --limit 20 --generator auto --out men",
        )
    )(export)


def damage(dataset: SynthBrainDataset, indices: list[int]) -> Iterator[tuple[int, str]]:
    """Decode the volumes of some rows; yields the index and the problem of each damaged one."""
    from synthbrain.progress import track

    def check(index: int) -> str | None:
        store = dataset.resolver.store_of(index)
        checked = store.verify([int(dataset.manifest.positions[index])])
        return next((found.problem for _, found in checked if found is not None), None)

    for index in track(indices, total=len(indices), what="verifying"):
        problem = check(index)
        if problem is not None:
            yield index, problem


def _mend(dataset: SynthBrainDataset, damaged: list[int]) -> int:
    """Set damaged volumes aside and have again those that can be had; how many that were."""
    import numpy as np

    from synthbrain.progress import track

    resolver = dataset.resolver
    for index in damaged:
        resolver.store_of(index).quarantine(dataset.manifest.positions[index])
    can_be_had = np.setdiff1d(damaged, resolver.plan(damaged).unavailable).tolist()
    plan = resolver.plan(can_be_had)
    with contextlib.suppress(MissingVolumeError):
        for _ in track(resolver.fill(plan), total=plan.missing, what="mending"):
            pass
    return int(resolver.stored(np.array(damaged, dtype=np.int64)).sum())


def _dataset(
    cohort: str,
    selection: Selection,
    generator_name: str,
    store: Path | None,
    made_by: str | None = None,
) -> SynthBrainDataset:
    from synthbrain.dataset import SynthBrainDataset

    return SynthBrainDataset(
        cohort,
        generator=generator(generator_name),
        store=store,
        made_by=made_by,
        **selection.keywords(),
    )


def _only_stored(dataset: SynthBrainDataset, cohort: str) -> SynthBrainDataset:
    """The dataset without the rows that are not stored."""
    missing = set(dataset.missing())
    if not missing:
        return dataset
    stored = [id for id in dataset.manifest.table.index if id not in missing]
    if not stored:
        raise MissingVolumeError(
            f"none of the {len(dataset):,} volumes is stored; run `synthbrain fill {cohort}` "
            "first, or pass --generator auto"
        )
    say(f"note: {len(missing):,} rows are not stored and left out; --generator auto makes them")
    rest: dict[str, Any] = {"generator": None, "made_by": dataset.resolver.made_by}
    return type(dataset)(dataset.manifest.select(ids=stored), store=dataset.resolver.folder, **rest)


def _folder(dataset: SynthBrainDataset) -> Path:
    return dataset.resolver.folder / dataset.manifest.store_key
