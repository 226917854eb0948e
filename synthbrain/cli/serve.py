"""``synthbrain serve-samples``: the process that makes volumes for all workers of a machine."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from synthbrain.cli.console import examples, say, show_json, show_table
from synthbrain.cli.options import Json
from synthbrain.errors import UsageError


def serve_samples(
    generator: Annotated[
        str, typer.Argument(metavar="NAME", help="A generator, as `synthbrain info` lists them.")
    ] = "auto",
    device: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="cpu, cuda:0; by default the generator's choice."),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Rows made at once.", show_default="the generator's"),
    ] = None,
    idle: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0, help="Stop when nobody was connected for so long.",
                     show_default="run until stopped"),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Of the GPU's memory, at most.", show_default="all"),
    ] = None,
    status: Annotated[
        bool, typer.Option("--status", metavar=" ", help="Ask the one that runs, and leave it.")
    ] = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Hold a generator in one process, for the DataLoader workers and ranks of this machine.

    `SharedGenerator(NAME)` starts one by itself; this is for those who want to see it run.
    """
    from synthbrain import sampling
    from synthbrain.sampling.spec import Spec

    if status:
        found = sampling.status(Spec(generator, device, {}).folder())
        if json:
            show_json(found)
        else:
            show_table(("", ""), [(name, str(value)) for name, value in found.items()])
        return
    if json:
        raise UsageError("--json goes with --status")
    try:
        sampling.serve(
            generator, device=device, batch=batch, idle=idle, memory=memory,
            ready=lambda: say(f"serving {generator}; stop with Ctrl-C"),
        )  # fmt: skip
    except KeyboardInterrupt:
        say("stopped")
    # A thread may still be inside the generator, working for nobody: nothing waits for it.
    os._exit(0)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        name="serve-samples",
        epilog=examples(
            "synthbrain serve-samples ukb-ldm --device cuda:0",
            "synthbrain serve-samples ukb-ldm --device cuda:0 --status",
        ),
    )(serve_samples)
