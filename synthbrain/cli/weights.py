"""``synthbrain weights``: the checkpoints of generators."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from synthbrain.cli.console import examples, say, show_json, show_table
from synthbrain.cli.options import Json
from synthbrain.errors import UsageError

if TYPE_CHECKING:
    from generation.hub import Published
    from generation.weights import Weights

Name = Annotated[str, typer.Argument(metavar="NAME", help="What the weights are called.")]

_SYSTEMS = ("ukb-ldm", "demo-ldm", "medforj", "vae-gan", "lsgan")

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="List, fetch, add and remove the weights of generators.",
    epilog=examples("synthbrain weights list", "synthbrain weights pull ukb-ldm"),
)


@app.command(name="list", epilog=examples("synthbrain weights list --json"))
def list_(json: Json = False) -> None:
    """Show what is published and what is installed."""
    from generation.hub import PUBLISHED
    from generation.weights import installed

    here = installed(_folder())
    rows = [_entry(name, PUBLISHED.get(name), here.get(name)) for name in {**PUBLISHED, **here}]
    if json:
        show_json(rows)
        return
    columns = ("name", "system", "covariates", "installed", "source")
    show_table(columns, [[str(row[column]) for column in columns] for row in rows])


@app.command(
    epilog=examples("synthbrain weights pull ukb-ldm", "synthbrain weights pull ukb-ldm --force")
)
def pull(
    name: Name,
    force: Annotated[
        bool, typer.Option("--force", metavar=" ", help="Fetch again what is here already.")
    ] = False,
) -> None:
    """Fetch published weights from the Hugging Face Hub, check and install them.

    Also those that evaluation computes features with: med3d-resnet50, med3d-resnet50-23 and
    dinov2-vits14. HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE work as usual.
    """
    from generation import weights
    from generation.evaluate.features import SOURCES
    from generation.hub import PUBLISHED

    if name in SOURCES:
        _pull_features(name, force)
        return
    published = PUBLISHED.get(name)
    if published is not None:
        say(f"from: https://huggingface.co/{published.repo}")
        say(f"intended use: {published.use}")
        say(f"licence: {published.licence}")
        say(f"cite: {published.citation}")
    _installed(weights.pull(name, _folder(), force=force))


@app.command(
    epilog=examples(
        "synthbrain weights add ours --autoencoder autoencoder.pt --diffusion model.pt",
        "synthbrain weights add pixel --preset medforj --diffusion ema.pt --target flow",
        "synthbrain weights add mine --autoencoder runs/autoencoder --diffusion runs/diffusion",
        "synthbrain weights add gan --generator runs/lsgan",
    )
)
def add(
    name: Name,
    diffusion: Annotated[
        Path | None,
        typer.Option(metavar="RUN|FILE", help="The U-Net's training run, or a checkpoint."),
    ] = None,
    autoencoder: Annotated[
        Path | None,
        typer.Option(metavar="RUN|FILE", help="The autoencoder's; for latent systems."),
    ] = None,
    generator: Annotated[
        Path | None,
        typer.Option(metavar="RUN|FILE", help="Instead of both, a GAN's run or checkpoint."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(metavar="SYSTEM", help=f"The architecture: {', '.join(_SYSTEMS)}.",
                     show_default="the run's; for files ukb-ldm, or lsgan"),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="epsilon, sample, velocity or flow.",
                     show_default="the system's"),
    ] = None,
    half: Annotated[
        bool, typer.Option("--half", metavar=" ", help="Keep them as float16, in half the space.")
    ] = False,
    folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Install there, to hand them on.",
                     show_default="where `weights path` says"),
    ] = None,
) -> None:  # fmt: skip
    """Install weights from training runs or files.

    Of a run's folder the last checkpoint is taken, with averaged weights where it has them; name a
    checkpoint in it for another. Files are in MONAI's layout or the older GenerativeModels one.
    """
    from generation.diffusion import TARGETS
    from generation.train import release

    if preset not in (None, *_SYSTEMS):
        raise UsageError(f"--preset must be one of {', '.join(_SYSTEMS)}; found {preset!r}")
    if target is not None and target not in TARGETS:
        raise UsageError(f"--target must be one of {', '.join(TARGETS)}; found {target!r}")
    if (diffusion is None) == (generator is None):
        raise UsageError("give --diffusion, or --generator for a GAN: one of the two")
    given = {"unet": diffusion, "autoencoder": autoencoder, "generator": generator}
    paths = {network: path for network, path in given.items() if path is not None}
    where = folder or _folder()
    added = release.add(name, paths, where, preset=preset, target=target, half=half)
    if folder is None:
        _installed(added)
        return
    say(f"{name} is written ({added.digest[:8]})")
    print(added.folder)


@app.command(epilog=examples("synthbrain weights path ukb-ldm"))
def path(name: Name) -> None:
    """Print the folder installed weights lie in."""
    from generation.weights import load

    print(load(name, _folder()).folder)


@app.command(epilog=examples("synthbrain weights remove ukb-ldm"))
def remove(name: Name) -> None:
    """Delete installed weights; the Hub's own cache keeps what it holds."""
    from generation.weights import remove as delete

    delete(name, _folder())
    say(f"{name} is removed")


def register(parent: typer.Typer) -> None:
    """Add the group of commands."""
    parent.add_typer(app, name="weights")


def _folder() -> Path:
    from synthbrain.generators import weights_folder

    return weights_folder()


def _pull_features(name: str, force: bool) -> None:
    from generation.evaluate.features import SOURCES, pull
    from synthbrain.evaluation.opening import features_folder

    source = SOURCES[name]
    say(f"from: https://huggingface.co/{source.repo}")
    say(f"licence: {source.licence}")
    say(f"cite: {source.citation}")
    print(pull(name, features_folder(), force=force))
    say(f"next: synthbrain evaluate … --features {name}")


def _installed(weights: Weights) -> None:
    say(f"{weights.name} is installed ({weights.digest[:8]})")
    say(f"next: synthbrain generate -n 1 --generator {weights.name} --out brains")
    print(weights.folder)


def _entry(name: str, published: Published | None, here: Weights | None) -> dict[str, Any]:
    """What is known of some weights, for the table and as JSON."""
    from generation.presets import load_preset
    from synthbrain.sizes import size_text

    preset = here.preset if here else load_preset(published.preset if published else "")
    size = sum(p.stat().st_size for p in here.folder.iterdir()) if here else 0
    source = dict(here.source) if here else {}
    return {
        "name": name,
        "system": preset.system,
        "covariates": "all four" if preset.system == "latent" else "none",
        "installed": size_text(size) if here else "no",
        "source": source.get("repo") or (published.repo if published else _origin(source)),
        "digest": here.digest if here else None,
    }


def _origin(source: dict[str, str]) -> str:
    return "training" if any(key.endswith("_step") for key in source) else "files"
