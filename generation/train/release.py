"""Training runs as weights: a run's last checkpoint becomes an installed generator.

Latents are trained on at a scale; installed systems know none. So the scale goes into the
autoencoder, whose outermost convolutions have kernels of one voxel, and the U-Net stays as it is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from generation import weights
from generation.checkpoints import fitted, read_state, some
from generation.covariates import NAMES
from generation.errors import TrainingError, WeightsError
from generation.presets import Preset, System, load_preset, read_preset
from generation.train import checkpoints

RELEASED: dict[str, str] = {
    "autoencoder": "autoencoder",
    "diffusion": "unet",
    "pixel": "unet",
    "vae-gan": "generator",
    "lsgan": "generator",
}
"""Which player of a run is released, by the run's kind; its system calls the network the same.

Kinds of runs that train other networks enter here, with a :class:`System` that builds them."""

_CHECKPOINT = re.compile(r"step-\d{9}\.pt")
_OPTIONS = {"autoencoder": "--autoencoder", "unet": "--diffusion", "generator": "--generator"}


@dataclass(frozen=True)
class Trained:
    """What a training run has to give.

    Parameters
    ----------
    folder, step, kind
        Of the run: where it is, how far the checkpoint is, and what was trained.
    preset
        The system it was trained for.
    network
        ``"unet"``, ``"autoencoder"`` or, of a GAN, ``"generator"``.
    state
        Its weights: averaged ones, where the run keeps an average.
    scale
        What latents were multiplied by.
    recipe
        Where the recipe comes from.
    """

    folder: Path
    step: int
    kind: str
    preset: System
    network: str
    state: Mapping[str, Tensor] = field(repr=False)
    scale: float = 1.0
    recipe: str = ""

    @property
    def source(self) -> dict[str, str]:
        """Where the network comes from, as text."""
        facts = {"": str(self.folder), "_step": str(self.step), "_kind": self.kind}
        facts |= {"_recipe": self.recipe} if self.recipe else {}
        facts |= {"_latent_scale": repr(self.scale)} if self.kind == "diffusion" else {}
        return {self.network + name: text for name, text in facts.items()}


def is_run(path: Path) -> bool:
    """Whether a path is to be read as a training run: a folder, or a checkpoint in one."""
    return path.is_dir() or _CHECKPOINT.fullmatch(path.name) is not None


def trained(path: Path) -> Trained:
    """The network of a training run.

    Parameters
    ----------
    path
        The run's folder, for its last checkpoint; or one of the checkpoints in it.

    Raises
    ------
    WeightsError
        No run, none with a checkpoint yet, one that cannot be read, or of a kind that is not
        released.
    """
    if path.is_dir():
        path = _last(path)
    try:
        found = checkpoints.read(path)
    except TrainingError as error:
        raise WeightsError(str(error)) from None
    try:
        return _told(found, path)
    except WeightsError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise WeightsError(
            f"{path} is no checkpoint of a training run ({type(error).__name__}: {reason}); found "
            f"{some(list(found))}, expected step, settings and modules: give a run's folder"
        ) from None


def folded(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """An autoencoder whose latents are a multiple of another's.

    Parameters
    ----------
    state
        Weights of MONAI's ``AutoencoderKL``.
    scale
        What its latents are multiplied by.

    Returns
    -------
    dict
        The same autoencoder on scaled latents: it encodes to ``scale`` times the mean and the
        standard deviation, and decodes ``scale z`` to what the other decodes ``z`` to.

    Notes
    -----
    MONAI clamps the logarithm of the variance to [-30, 20], and these bounds do not scale along:
    standard deviations below 3e-7 or above 2e4 change.
    """
    factors = {"quant_conv_mu.conv.weight": scale, "quant_conv_mu.conv.bias": scale,
               "post_quant_conv.conv.weight": 1 / scale}  # fmt: skip
    out = dict(state)
    for key, factor in factors.items():
        out[key] = (state[key].double() * factor).to(state[key].dtype)
    key = "quant_conv_log_sigma.conv.bias"
    out[key] = (state[key].double() + 2 * math.log(scale)).to(state[key].dtype)
    return out


def add(
    name: str,
    paths: Mapping[str, Path],
    folder: Path,
    *,
    preset: str | System | None = None,
    target: str | None = None,
    half: bool = False,
) -> weights.Weights:
    """Install weights from training runs, from files, or from one of each.

    Parameters
    ----------
    name
        What to call them.
    paths
        By network: a run's folder, one of its checkpoints, or a file as
        :func:`generation.weights.add` takes it.
    folder
        Where to install; weights of that name are replaced.
    preset, target
        The system, and what its U-Net predicts. Runs know both: they must then agree, if given.
    half
        As in :func:`generation.weights.add`.

    Raises
    ------
    WeightsError
        A run or file is not what it should be, or they do not fit each other. What was installed
        before is untouched.
    """
    runs = {network: trained(path) for network, path in paths.items() if is_run(path)}
    if not runs:
        files: dict[str, weights.Given] = dict(paths)
        usual = "lsgan" if "generator" in paths else "ukb-ldm"
        return weights.add(name, files, folder, preset=preset or usual, target=target, half=half)
    for network, run in runs.items():
        _check_kind(network, run)
    system = _system(runs, _preset(preset), sorted(paths))
    _check_asked(system, _preset(preset), target, runs)
    given: dict[str, weights.Given] = {}
    source: dict[str, str] = {}
    for network, path in paths.items():
        found = runs.get(network)
        source |= found.source if found else {network: str(path)}
        given[network] = fitted(found.state, network, system, str(path))[0] if found else path
    if "autoencoder" in paths and "unet" in runs:
        given["autoencoder"] = _scaled(paths["autoencoder"], given["autoencoder"], system, runs)
    return weights.add(name, given, folder, preset=system, target=target, source=source, half=half)


def _told(found: Mapping[str, Any], path: Path) -> Trained:
    """What a checkpoint tells, as far as it concerns a generator."""
    facts = json.loads(found["settings"])
    kind = str(facts["kind"])
    if kind not in RELEASED:
        raise WeightsError(
            f"{path} is of a run of kind {kind!r}, expected one of {', '.join(RELEASED)}; other "
            "kinds cannot be installed"
        )
    network = RELEASED[kind]
    return Trained(
        folder=path.parent,
        step=int(found["step"]),
        kind=kind,
        preset=read_preset(facts["system"]),
        network=network,
        state=dict(found["averages"].get(network) or found["modules"][network]),
        scale=_checked_scale(found["task"].get("scale", 1.0), path),
        recipe=str(facts.get("source", "")),
    )


def _last(folder: Path) -> Path:
    if not (folder / "settings.json").is_file():
        raise WeightsError(
            f"{folder} is no training run: it holds no settings.json; give the folder of a run, "
            "or a checkpoint file"
        )
    steps = checkpoints.steps(folder)
    if not steps:
        raise WeightsError(
            f"the run in {folder} has no checkpoint yet, expected step-*.pt; train on until it "
            "keeps one (keep_every)"
        )
    return folder / f"step-{steps[-1]:09d}.pt"


def _checked_scale(scale: Any, path: Path) -> float:
    if not (isinstance(scale, float | int) and math.isfinite(scale) and scale > 0):
        raise WeightsError(
            f"{path} says that latents were multiplied by {scale!r}, expected a positive number; "
            "train again with another latent_scale"
        )
    return float(scale)


def _check_kind(network: str, run: Trained) -> None:
    if run.network != network:
        fitting = " or ".join(repr(kind) for kind, player in RELEASED.items() if player == network)
        raise WeightsError(
            f"{run.folder} holds a run of kind {run.kind!r}, expected {fitting} for "
            f"{_OPTIONS[network]}; give it as {_OPTIONS[run.network]}"
        )


def _preset(preset: str | System | None) -> System | None:
    return load_preset(preset) if isinstance(preset, str) else preset


def _system(runs: Mapping[str, Trained], asked: System | None, networks: list[str]) -> System:
    """The system of some runs: a GAN's, or the U-Net's with the autoencoder's architecture."""
    if "generator" in networks:
        if len(networks) > 1:
            raise WeightsError(f"a GAN is its generator alone, found {', '.join(networks)}")
        return runs["generator"].preset
    unet, autoencoder = runs.get("unet"), runs.get("autoencoder")
    base = unet.preset if unet else asked or next(iter(runs.values())).preset
    if not isinstance(base, Preset):
        raise WeightsError(
            f"this is a {base.system} system, expected a latent or pixel one for --diffusion"
        )
    if base.system == "pixel" and "autoencoder" in networks:
        raise WeightsError(
            "this is a pixel system, which has no autoencoder; leave out --autoencoder, or give a "
            "run of kind 'diffusion' as --diffusion"
        )
    if base.system == "latent" and "autoencoder" not in networks:
        raise WeightsError(
            "a latent system needs its autoencoder too, found a U-Net only; give the one whose "
            "latents it was trained on as --autoencoder"
        )
    if autoencoder is not None:
        _check_shapes(base, autoencoder)
        spec = autoencoder.preset.networks["autoencoder"]
        base = base.model_copy(update={"networks": {**base.networks, "autoencoder": spec}})
    _check_latents(base)
    return base


def _check_shapes(base: System, autoencoder: Trained) -> None:
    found = autoencoder.preset
    if "autoencoder" not in found.networks or found.shape != base.shape:
        raise WeightsError(
            f"the autoencoder in {autoencoder.folder} was trained for volumes of {found.shape}, "
            f"and the U-Net's system has {base.shape}; give two runs of the same system"
        )


def _check_latents(preset: Preset) -> None:
    """The latents an autoencoder gives must be those the U-Net draws, under all covariates."""
    unet, drawn, covariates = preset.networks["unet"], 1, 0
    if preset.system == "latent":
        autoencoder, covariates = preset.networks["autoencoder"], len(NAMES)
        drawn = autoencoder.get("latent_channels", 3)
        reduction = 2 ** (len(autoencoder["channels"]) - 1)
        made = (drawn, *(side // reduction for side in preset.shape))
        if preset.latent_shape != made or unet["out_channels"] != drawn:
            raise WeightsError(
                f"the autoencoder has latents of {made}, and the U-Net draws "
                f"{unet['out_channels']} channels of {preset.latent_shape}; give the autoencoder "
                "it was trained on"
            )
    if unet["in_channels"] != drawn + covariates:
        raise WeightsError(
            f"the U-Net takes {unet['in_channels']} channels, expected {drawn} to draw and "
            f"{covariates} covariates; train one with system.networks.unet.in_channels="
            f"{drawn + covariates}"
        )


def _check_asked(
    system: System, asked: System | None, target: str | None, runs: Mapping[str, Trained]
) -> None:
    """What was asked for must be what the runs say."""
    where = next(iter(runs.values())).folder
    if asked is not None and asked != system:
        fields = type(asked).model_fields
        other = [key for key in fields if getattr(asked, key) != getattr(system, key, None)]
        raise WeightsError(
            f"the run in {where} has another system than --preset: {', '.join(other)} differ; "
            "leave out --preset, the run knows its system"
        )
    if target is None or "unet" not in runs or not isinstance(system, Preset):
        return
    if target != system.target:
        raise WeightsError(
            f"the run in {runs['unet'].folder} predicts {system.target!r}, found --target "
            f"{target!r}; leave out --target, the run knows it"
        )


def _scaled(
    path: Path, given: weights.Given, system: System, runs: Mapping[str, Trained]
) -> weights.Given:
    """An autoencoder whose latents are at the scale the U-Net was trained at."""
    if runs["unet"].scale == 1:
        return given
    if isinstance(given, Path):
        given = fitted(read_state(given), "autoencoder", system, str(path))[0]
    return folded(given, runs["unet"].scale)
