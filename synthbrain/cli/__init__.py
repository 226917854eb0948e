"""The ``synthbrain`` command.

Nothing here imports torch, MONAI or pandas before a command runs: ``--help`` is instant.
"""

from __future__ import annotations

from typing import Annotated

import typer

import synthbrain
from synthbrain.cli import (
    archives,
    bundle,
    demo,
    evaluate,
    generate,
    info,
    manifests,
    prepare,
    publish,
    pull,
    serve,
    train,
    volumes,
    weights,
)
from synthbrain.cli.console import Commands, examples

__all__ = ["app", "main"]

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "synthbrain demo",
        "synthbrain draw -n 200 --age 60y:75y --sex balanced --out older",
        "synthbrain fill older",
        "synthbrain export older --out older-bids --format bids",
    ),
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"synthbrain {synthbrain.__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[
        bool,
        typer.Option("--debug", metavar=" ", help="Show tracebacks; so does SYNTHBRAIN_DEBUG=1."),
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            metavar=" ",
            help="Show the version.",
            is_eager=True,
            callback=_show_version,
        ),
    ] = False,
) -> None:
    """Synthetic brain MRI for deep learning: ask for a cohort, get volumes."""


demo.register(app)
info.register(app)
manifests.register(app)
volumes.register(app)
pull.register(app)
prepare.register(app)
train.register(app)
evaluate.register(app)
archives.register(app)
publish.register(app)
generate.register(app)
serve.register(app)
weights.register(app)
bundle.register(app)


def main() -> None:
    """Run the ``synthbrain`` command; the exit codes are those of :class:`.console.Commands`."""
    app(prog_name="synthbrain")
