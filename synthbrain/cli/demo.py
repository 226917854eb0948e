"""``synthbrain demo``: the whole package in under three minutes."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from synthbrain.cli.console import examples, interrupted, say, show_table
from synthbrain.cli.options import StoreFolder
from synthbrain.errors import UsageError

if TYPE_CHECKING:
    from synthbrain.demo import Demo


def demo(
    ctx: typer.Context,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the picture and the cohort.")
    ] = Path("synthbrain-demo"),
    seed: Annotated[int, typer.Option(min=0, metavar="S", help="Other brains.")] = 0,
    generator: Annotated[
        str, typer.Option(metavar="NAME", help="auto, or a name `synthbrain info` lists.")
    ] = "auto",
    store: StoreFolder = None,
) -> None:
    """Draw brains by age and ventricular volume, make them, stream them, and lay them out.

    Leaves a contact sheet and a cohort in a folder, and the volumes in the store.
    """
    start = time.perf_counter()
    from synthbrain.demo import run_demo

    if generator == "none":
        raise UsageError("the demo makes volumes: --generator must be auto or a generator's name")
    try:
        done = run_demo(out, generator=generator, store=store, seed=seed)
    except KeyboardInterrupt:
        raise interrupted(ctx, "the volumes made so far are kept") from None
    show_table(("", ""), _report(done, time.perf_counter() - start))
    say("\nwhat next")
    for line in _next(done, out, store):
        say(f"  {line}")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=examples("synthbrain demo", "synthbrain demo --out elsewhere --seed 7"))(
        demo
    )


def _report(done: Demo, seconds: float) -> list[tuple[str, str]]:
    first, second = (1000 * t / done.volumes for t in (done.first_epoch, done.second_epoch))
    made = f"{done.made} of {done.volumes} made by {done.made_by}"
    return [
        ("volumes", made if done.made else f"{done.volumes}, all stored by an earlier run"),
        ("epoch 1", f"{done.first_epoch:.1f} s, {first:,.0f} ms a volume"),
        ("epoch 2", f"{done.second_epoch:.2f} s, {second:,.1f} ms a volume, from the store"),
        ("stored", f"{done.bytes_stored / 1e6:.1f} MB in {done.store}"),
        ("cohort", str(done.cohort)),
        ("picture", str(done.picture.absolute())),
        ("in all", f"{seconds:.0f} s"),
    ]


def _next(done: Demo, out: Path, store: Path | None) -> list[str]:
    again = () if store is None else ("--store", str(store))
    cohort = str(out / "cohort")
    bids = ("export", cohort, "--out", str(out / "bids"), *again)
    return [
        shlex.join(("synthbrain", *bids)),
        "synthbrain draw -n 200 --age 60y:75y --sex balanced --out older",
        f'python -c "from synthbrain import SynthBrainDataset; '
        f"print(SynthBrainDataset({cohort!r})[0]['image'].shape)\"",
    ]
