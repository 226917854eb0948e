"""``synthbrain evaluate``: what volumes are worth, in one report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from synthbrain.cli.console import examples, interrupted, say, show_json, show_table
from synthbrain.cli.options import Json, StoreFolder
from synthbrain.errors import UsageError

if TYPE_CHECKING:
    from synthbrain.evaluation.run import Evaluation

_FAILED_GATE = 3


def evaluate(
    ctx: typer.Context,
    synthetic: Annotated[
        str,
        typer.Argument(metavar="SYNTHETIC", show_default=False,
                       help="A manifest, what `synthbrain prepare` wrote, or phantoms[:N[:SEED]]."),
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", show_default=False,
                     help="Folder for report.html, results.json and what a later run takes up."),
    ],
    real: Annotated[
        str | None,
        typer.Option(metavar="COHORT", help="Volumes to compare with; named like SYNTHETIC."),
    ] = None,
    training: Annotated[
        str | None,
        typer.Option(metavar="COHORT", help="What the generator learned from, with a split train "
                     "and others it never saw: looks for copies."),
    ] = None,
    generator: Annotated[
        str, typer.Option(metavar="NAME", help="Who makes missing synthetic volumes, or none.")
    ] = "auto",
    limit: Annotated[
        int, typer.Option(metavar="N", min=1, help="Volumes of each set, at most.")
    ] = 1000,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PART", help="fidelity, diversity, conditioning, memorisation, "
                     "utility; many times.", show_default="all that can be measured"),
    ] = None,
    features: Annotated[
        str,
        typer.Option(metavar="NAME", help="Network of features: random, or one that `synthbrain "
                     "weights pull` fetched: med3d-resnet50, med3d-resnet50-23, dinov2-vits14."),
    ] = "random",
    autoencoder: Annotated[
        str | None,
        typer.Option(metavar="RUN|NAME", help="Look for copies among its latents, too."),
    ] = None,
    segmenter: Annotated[
        str | None,
        typer.Option(metavar="NAME|COMMAND", help="What measures volumes: phantom, synthseg, "
                     "fastsurfer, deepmriprep, or a command with {in} and {out}.",
                     show_default="phantom for phantoms and the embedded model"),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Instead, FreeSurfer label maps named after the ids."),
    ] = None,
    regressor: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="A run of `synthbrain train regression`: age, sex."),
    ] = None,
    sweeps: Annotated[
        int,
        typer.Option(metavar="SEEDS", min=0, help="Also move one covariate at a time, at this many "
                     "seeds: five volumes of each measured covariate a seed."),
    ] = 0,
    pairs: Annotated[
        int, typer.Option(metavar="N", min=2, help="Pairs of volumes diversity compares.")
    ] = 1000,
    measure: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="ms-ssim, 4-g-r-ssim; many times.", show_default="both"),
    ] = None,
    utility: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="Train networks by this recipe of kind regression, "
                     "such as brain-age, on real, on synthetic and on both."),
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(metavar="CONDITION", help='Such as "ventricles.r>=0.95": exit code 3 where it '
                     "is not met; many times."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="S", min=0, help="Of all draws.")] = 0,
    device: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="cpu, cuda; the first GPU if there is one."),
    ] = None,
    store: StoreFolder = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Measure fidelity, diversity, conditioning, copies and use for training; write a report.

    Safe to interrupt and to run again: features, pairs and measurements that are done are kept.
    """
    from synthbrain.evaluation.gates import Gate
    from synthbrain.evaluation.opening import Inputs

    gates = [Gate.read(text) for text in require or []]
    for gate in gates:
        if only and gate.part not in only:
            raise UsageError(f"{gate.metric} is a figure of {gate.part}; add --only {gate.part}")
    inputs = Inputs(
        synthetic=synthetic, folder=out, real=real, training=training, generator=generator,
        limit=limit, features=features, autoencoder=autoencoder, segmenter=segmenter,
        labels=labels, regressor=regressor, sweeps=sweeps, pairs=pairs, measures=measure,
        utility=utility, parts=only, seed=seed, device=device, store=store,
    )  # fmt: skip
    try:
        evaluation = inputs.open()
        results = evaluation.run()
    except KeyboardInterrupt:
        raise interrupted(ctx, f"what is measured is kept in {out}") from None
    _tell(evaluation, results, as_json=json)
    failures = [why for gate in gates if (why := gate.failure(results["metrics"])) is not None]
    for why in failures:
        say(f"not met: {why}")
    if failures:
        raise typer.Exit(_FAILED_GATE)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog=examples(
            "synthbrain evaluate older --out report",
            "synthbrain evaluate older --real ready --training ready --out report",
            "synthbrain evaluate older --segmenter synthseg --regressor runs/age --out report",
            'synthbrain evaluate older --out report --require "ventricles.r>=0.95"',
        )
    )(evaluate)


def _tell(evaluation: Evaluation, results: dict[str, Any], *, as_json: bool) -> None:
    report = evaluation.folder / "report.html"
    if as_json:
        show_json(results)
    else:
        rows = [(name, f"{value:.5g}") for name, value in results["metrics"].items()]
        show_table(("figure", "value"), rows)
    for part, why in results["not_measured"].items():
        say(f"not measured: {part}: {why}")
    volumes = results["sets"]["synthetic"]["volumes"]
    for part, seconds in results["seconds"].items():
        say(f"{part} took {seconds:,.0f} s, {seconds / volumes:.2g} s a synthetic volume")
    say(f"the report is {report.absolute()}")
