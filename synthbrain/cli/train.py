"""``synthbrain train``: from a cohort to a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from synthbrain.cli.console import examples, hint, interrupted, say, show_json, show_table
from synthbrain.cli.options import DryRun, Json, StoreFolder
from synthbrain.errors import UsageError

if TYPE_CHECKING:
    from generation.train.loop import Run
    from generation.train.settings import Settings
    from synthbrain.training import Training

PRESETS = {
    "autoencoder": "autoencoder-brlp",
    "diffusion": "ldm-epsilon",
    "pixel": "medforj",
    "vae-gan": "vae-gan",
    "lsgan": "lsgan",
    "regression": "brain-age",
}
"""What is trained, and the recipe taken by default."""


def train(
    ctx: typer.Context,
    kind: Annotated[
        str,
        typer.Argument(metavar="KIND", show_default=False, help=f"{', '.join(PRESETS)}."),
    ],
    data: Annotated[
        str,
        typer.Option(metavar="COHORT|FOLDER", show_default=False,
                     help="A manifest, what `synthbrain prepare` wrote, or phantoms[:N], made on "
                     "the way."),
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="RUN", show_default=False,
                     help="Folder of the run; an unfinished one is gone on with."),
    ],
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="A recipe, or a JSON file of settings.",
                     show_default="the published one"),
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Another value of a setting; many times."),
    ] = None,
    autoencoder: Annotated[
        str | None,
        typer.Option(metavar="RUN|NAME", help="Whose latents diffusion is trained on: a run or "
                     "installed weights."),
    ] = None,
    latents: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where latents are kept.", show_default="RUN/latents"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Train on N volumes at most.")
    ] = None,
    generator: Annotated[
        str, typer.Option(metavar="NAME", help="Who makes missing volumes: auto, none, or a name.")
    ] = "auto",
    store: StoreFolder = None,
    workers: Annotated[
        int, typer.Option(metavar="N", min=0, help="Processes that read ahead.")
    ] = 0,
    device: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="cpu, cuda; the first GPU if there is one."),
    ] = None,
    until: Annotated[
        int | None, typer.Option(metavar="STEP", min=1, help="Stop there for now.")
    ] = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Train a model on a cohort. Safe to stop at any time: the same line goes on where it was.

    With several GPUs: torchrun --nproc-per-node 4 -m synthbrain train …
    """
    settings = _settings(kind, preset, change or [])
    if dry_run:
        _describe(settings, as_json=json)
        return
    if json:
        raise UsageError("--json shows the settings that --dry-run would; a run logs to log.jsonl")
    from synthbrain.training import Training

    training = Training(
        settings, data, out, generator=None if generator == "none" else generator, store=store,
        limit=limit, autoencoder=autoencoder, latents=latents, workers=workers, device=device,
    )  # fmt: skip
    try:
        run = _run(training, until)
    except KeyboardInterrupt:
        raise interrupted(ctx, f"what {out} keeps is gone on with; run the same again") from None
    if run.world.rank == 0:
        _conclude(run, autoencoder)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog=examples(
            "synthbrain train autoencoder --data ready --out runs/ae --dry-run",
            "synthbrain train autoencoder --data ready --out runs/ae --set batch=4",
            "synthbrain train diffusion --data ready --autoencoder runs/ae --out runs/ldm",
            "synthbrain train pixel --data older --preset medforj --out runs/pixel --workers 8",
        )
    )(train)


def _settings(kind: str, preset: str | None, changes: list[str]) -> Settings:
    from generation.train.settings import read_settings, recipe

    if kind not in PRESETS:
        raise UsageError(f"KIND must be one of {', '.join(PRESETS)}; found {kind!r}")
    name = preset or PRESETS[kind]
    is_file = name.endswith(".json") or Path(name).is_file()
    found = read_settings(Path(name), changes) if is_file else recipe(name, changes)
    if found.kind != kind:
        raise UsageError(f"preset {name} trains {found.kind!r}, not {kind!r}; choose another")
    return found


def _describe(settings: Settings, *, as_json: bool) -> None:
    from synthbrain.training import sizes

    if as_json:
        show_json(settings.model_dump(mode="json"))
        return
    rows = [("kind", settings.kind), ("source", settings.source or "settings of your own")]
    rows += [(name, f"{count / 1e6:,.2f} M parameters") for name, count in sizes(settings).items()]
    skipped = {"kind", "source", "system"}
    rows += [(key, str(value)) for key, value in settings if key not in skipped]
    show_table(("setting", "value"), rows)


def _run(training: Training, until: int | None) -> Run:
    from synthbrain.progress import counted
    from synthbrain.training import advance

    run = training.start()
    if run.world.rank:
        for _ in advance(run, until=until):
            pass
        return run
    if run.step:
        say(f"going on at step {run.step:,} of {training.settings.steps:,}")
    end = min(until or training.settings.steps, training.settings.steps)
    notes = {"": ""}
    with counted(f"training {training.settings.kind}", end, run.step) as told:
        run.told = lambda step: told(step, notes[""])
        for line in advance(run, until=until):
            notes[""] = _note(line)
    return run


def _note(line: dict[str, float]) -> str:
    """Losses in a few words."""
    hidden = ("step", "samples_per_second", "peak_gb")
    return ", ".join(f"{name} {value:.4g}" for name, value in line.items() if name not in hidden)


def _conclude(run: Run, autoencoder: str | None) -> None:
    kind = run.settings.kind
    say(f"{run.folder} is at step {run.step:,} of {run.settings.steps:,}")
    print(run.folder.absolute())
    if run.step < run.settings.steps:
        return
    if kind == "autoencoder":
        hint("synthbrain", "train", "diffusion", "--data", "…", "--autoencoder", str(run.folder),
             "--out", "…")  # fmt: skip
    elif kind in ("diffusion", "pixel"):
        other = () if autoencoder is None else ("--autoencoder", autoencoder)
        hint("synthbrain", "weights", "add", "mine", *other, "--diffusion", str(run.folder))
    elif kind != "regression":
        hint("synthbrain", "weights", "add", "mine", "--generator", str(run.folder))
