"""``synthbrain generate``: from covariates straight to files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from synthbrain.cli.console import examples, interrupted, say
from synthbrain.cli.options import StoreFolder, ranges
from synthbrain.errors import UsageError

if TYPE_CHECKING:
    from generation.generator import Generator
    from synthbrain.dataset import SynthBrainDataset
    from synthbrain.export import Export
    from synthbrain.manifest import Manifest

_ROWS, _SAMPLING = "Which brains", "How to sample"

Age = Annotated[
    str | None,
    typer.Option(metavar="VALUE", help="Years (70y) or normalised (0.7); LO:HI draws from a "
                 "range.", rich_help_panel=_ROWS),
]  # fmt: skip
Sex = Annotated[
    str | None,
    typer.Option("--sex", "--gender", metavar="female|male|balanced",
                 help="Or 0 and 1, as in the published bundle.", rich_help_panel=_ROWS),
]  # fmt: skip
Ventricles = Annotated[
    str | None,
    typer.Option("--ventricles", "--ventricular_vol", metavar="VALUE",
                 help="Ventricular volume: 60mL, mm3, or normalised.", rich_help_panel=_ROWS),
]  # fmt: skip
Brain = Annotated[
    str | None,
    typer.Option("--brain", "--brain_vol", metavar="VALUE",
                 help="Brain volume: 1400mL, mm3, or normalised.", rich_help_panel=_ROWS),
]  # fmt: skip
Extrapolate = Annotated[
    bool,
    typer.Option("--extrapolate", metavar=" ", help="Allow values beyond the trained ones.",
                 rich_help_panel=_ROWS),
]  # fmt: skip
GeneratorName = Annotated[
    str,
    typer.Option("--generator", metavar="NAME", help="Who makes them: auto, or a name "
                 "`synthbrain info` lists.", rich_help_panel=_SAMPLING),
]  # fmt: skip
Solver = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="dpm++, unipc, ddim, ddpm, euler or heun.",
                 rich_help_panel=_SAMPLING),
]  # fmt: skip
Steps = Annotated[
    int | None, typer.Option(metavar="N", help="Solver steps.", rich_help_panel=_SAMPLING)
]
Spacing = Annotated[
    str | None,
    typer.Option(metavar="leading|trailing|logsnr", help="Where the steps lie; the solver's "
                 "favourite.", rich_help_panel=_SAMPLING),
]  # fmt: skip
Precision = Annotated[
    str | None,
    typer.Option(metavar="float32|bfloat16", help="By default what the device is fast at.",
                 rich_help_panel=_SAMPLING),
]  # fmt: skip
Device = Annotated[
    str | None,
    typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1; the first GPU if there is one.",
                 rich_help_panel=_SAMPLING),
]  # fmt: skip
Decode = Annotated[
    str | None,
    typer.Option(metavar="auto|whole|slabs", help="slabs need less memory and more time.",
                 rich_help_panel=_SAMPLING),
]  # fmt: skip


def generate(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.")],
    n: Annotated[int, typer.Option("-n", metavar="N", help="How many brains.")] = 1,
    age: Age = None,
    sex: Sex = None,
    ventricles: Ventricles = None,
    brain: Brain = None,
    seed: Annotated[
        int,
        typer.Option(metavar="S", help="The same seed, the same brains.", rich_help_panel=_ROWS),
    ] = 0,
    extrapolate: Extrapolate = False,
    generator_name: GeneratorName = "auto",
    solver: Solver = None,
    steps: Steps = None,
    spacing: Spacing = None,
    precision: Precision = None,
    device: Device = None,
    decode: Decode = None,
    format: Annotated[
        str, typer.Option(metavar="nifti|bids", help="Plain files, or a BIDS derivative dataset.")
    ] = "nifti",
    dtype: Annotated[
        str, typer.Option(metavar="uint8|float32", help="uint8 carries a scale in its header.")
    ] = "uint8",
    store: StoreFolder = None,
) -> None:
    """Make brains with the covariates asked for, as NIfTI files.

    Covariates that are not given are drawn as they occur together. Volumes are also kept in the
    store, and an interrupted run goes on where it stopped. OUT/cohort is the cohort, for
    `SynthBrainDataset` and the other commands.
    """
    # Read by PyTorch when it starts: large arrays then come in huge pages, a third faster to fill.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from synthbrain.cohort import draw_cohort
    from synthbrain.dataset import SynthBrainDataset
    from synthbrain.export import FORMATS, Export
    from synthbrain.generators import load_generator

    if format not in FORMATS:
        raise UsageError(f"--format must be one of {', '.join(FORMATS)}; found {format!r}")
    given = {
        "solver": solver, "steps": steps, "spacing": spacing, "dtype": precision,
        "device": device, "decode": decode,
    }  # fmt: skip
    sampling = {key: value for key, value in given.items() if value is not None}
    maker = load_generator(generator_name, **sampling)
    asked = {"age": age, "ventricles": ventricles, "brain": brain}
    if not maker.honours and (sex or any(asked.values())):
        raise UsageError(f"{maker.name} follows no covariates: leave out --sex, --age and volumes")
    cohort = draw_cohort(
        n, sex=_sex(sex), seed=seed, extrapolate=extrapolate, name="generated", **ranges(**asked)
    )
    cohort = _for(maker, cohort)
    dataset = SynthBrainDataset(cohort, generator=maker, store=store)
    say(f"{dataset.resolver.made_by}: {dataset.plan()}")
    job = Export(dataset, out, FORMATS[format], dtype)  # type: ignore[arg-type]
    try:
        written = _run(job, dataset)
    except KeyboardInterrupt:
        kept = len(dataset) - len(dataset.missing())
        raise interrupted(ctx, f"{kept:,} of {len(dataset):,} volumes are kept") from None
    cohort.save(out / "cohort", overwrite=True)
    say(f"{written:,} new, {len(dataset):,} volumes in {out}")
    print(out.absolute())


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog=examples(
            "synthbrain generate -n 4 --sex male --age 70y --ventricles 0.7 --out men",
            "synthbrain generate --generator ukb-ldm --solver dpm++ --steps 20 --out one",
            "synthbrain generate --gender 1.0 --age 0.7 --ventricular_vol 0.7 --brain_vol 0.5 "
            "--out bundle",
        )
    )(generate)


def _for(generator: Generator, cohort: Manifest) -> Manifest:
    """The cohort with the geometry a generator makes, unconditional if it is."""
    from synthbrain.generators import geometry_of

    update = {"geometry": geometry_of(generator), "conditional": bool(generator.honours)}
    return type(cohort).create(cohort.header.model_copy(update=update), cohort.table)


def _run(job: Export, dataset: SynthBrainDataset) -> int:
    """Export, showing the steps of generators that tell them and else the volumes."""
    from synthbrain.progress import stages

    generator: Any = dataset.resolver.generator
    if not hasattr(generator, "progress"):
        return job.run()
    with stages(len(dataset.missing())) as told:
        generator.progress = told
        return job.run(progress=False)


def _sex(text: str | None) -> str | float | None:
    """A sex as the library takes it; the published bundle writes 0 and 1."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text
