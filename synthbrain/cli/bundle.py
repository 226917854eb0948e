"""``synthbrain export-bundle``: weights for people who have MONAI and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from synthbrain.cli.console import examples, say


def export_bundle(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Installed weights.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
) -> None:
    """Write weights as a MONAI bundle, which runs without synthbrain.

    It samples like the published bundle: DDIM in float32. docs/README.md in it says how to run it,
    and with which options `synthbrain generate` gives the same volumes.
    """
    from generation.bundle import export
    from synthbrain.generators import find_weights

    export(find_weights(name), out)
    say(f"{name} is a bundle in {out}; it needs monai, einops, fire and nibabel to run")
    say(f"next: python -m monai.bundle run --config_file {out}/configs/inference.json "
        f"--bundle_root {out} --seed 1")  # fmt: skip
    print(out.absolute())


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="export-bundle", epilog=examples("synthbrain export-bundle mine mine-bundle"))(
        export_bundle
    )
