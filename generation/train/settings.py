"""How to train: settings with names, checked, and read from the recipes of the papers."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from generation.errors import TrainingError
from generation.presets import GanPreset, Preset, System

if TYPE_CHECKING:
    from torch import nn

_SHOWN = 60

Positive = Annotated[float, Field(gt=0)]
Natural = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(gt=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Augmentation(_Strict):
    """What is done to a volume at random before it is learned from.

    Parameters
    ----------
    flip
        Share of volumes mirrored left to right.
    affine
        Share of volumes moved.
    degrees, voxels, scale
        How far at most: rotation about and shift along each axis, relative change of size.
    gamma
        Intensities are raised to a power between one less this and one more.
    """

    flip: Share = 0.0
    affine: Share = 0.0
    degrees: Natural = 0.0
    voxels: Natural = 0.0
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.0
    gamma: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Settings(_Strict):
    """What all training runs have.

    Parameters
    ----------
    kind
        What is trained; decides which settings there are besides.
    source
        Where the recipe comes from.
    steps, batch, accumulate
        Optimiser steps; samples of a step over all processes; parts a process takes its share in.
    learning_rate, weight_decay, betas
        Of AdamW (Loshchilov & Hutter 2019); Adam where the decay is 0.
    rates
        Learning rates of single networks, where they differ.
    warm_up
        Steps over which the rates rise from 0.
    half_life
        Steps in which the rates halve; 0 to keep them.
    clip
        Largest norm of the gradient.
    average
        Decay of the exponential moving average of the weights; 0 for none.
    precision
        Of the forward pass: parameters and optimiser stay float32.
    augment
        What is done to volumes at random.
    keep_every, keep, log_every, sheet_every, validate_every
        Steps between checkpoints, how many to keep, and steps between log lines, sample sheets and
        validations; 0 for never.
    seed
        Of everything random.
    """

    kind: str
    system: System
    source: str = ""
    steps: Count
    batch: Count = 1
    accumulate: Count = 1
    learning_rate: Positive
    rates: dict[str, Positive] = {}
    weight_decay: Natural = 0.0
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    warm_up: Annotated[int, Field(ge=0)] = 0
    half_life: Natural = 0.0
    clip: Positive = 1.0
    average: Decay = 0.0
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    augment: Augmentation = Augmentation()
    keep_every: Annotated[int, Field(ge=0)] = 1000
    keep: Count = 3
    log_every: Count = 50
    sheet_every: Annotated[int, Field(ge=0)] = 1000
    validate_every: Annotated[int, Field(ge=0)] = 1000
    seed: Annotated[int, Field(ge=0)] = 0

    def text(self) -> str:
        """Themselves as JSON."""
        return self.model_dump_json(indent=2)


class DiffusionSettings(Settings):
    """Settings of a denoiser, of latents or of volumes.

    Parameters
    ----------
    system
        The architecture, its schedule, target and shapes.
    drop_conditions
        Share of samples trained without their covariates, for guidance.
    objective
        ``"mse"`` or ``"l1"`` between prediction and target.
    latent_scale
        What latents are multiplied by; ``"measured"`` for one over their standard deviation.
    """

    kind: Literal["diffusion", "pixel"]
    system: Preset
    drop_conditions: Share = 0.0
    objective: Literal["mse", "l1"] = "mse"
    latent_scale: Positive | Literal["measured"] = 1.0


class AutoencoderSettings(Settings):
    """Settings of the autoencoder of a latent system.

    Parameters
    ----------
    system
        The architecture.
    kl
        Weight of the divergence of latents from a standard normal distribution, summed over a
        latent's values.
    perceptual, perceptual_network
        Weight of the perceptual loss, and what computes it: ``"squeeze"`` is LPIPS with a
        downloaded SqueezeNet on random slices, ``"pyramid"`` needs no weights.
    adversarial, adversarial_from, adversarial_over
        Weight of the patch discriminator's verdict, the step its training starts, and the steps
        over which the weight rises from 0.
    discriminator
        Arguments of MONAI's ``PatchDiscriminator``.
    crop
        Train on boxes of this many voxels, each a multiple of the reduction; whole volumes
        without.
    """

    kind: Literal["autoencoder"]
    system: Preset
    kl: Natural = 1e-7
    perceptual: Natural = 0.0
    perceptual_network: Literal["squeeze", "pyramid"] = "squeeze"
    adversarial: Natural = 0.0
    adversarial_from: Annotated[int, Field(ge=0)] = 0
    adversarial_over: Annotated[int, Field(ge=0)] = 0
    discriminator: dict[str, Any] = {"channels": 32, "num_layers_d": 3}
    crop: tuple[Count, Count, Count] | None = None


class GanSettings(Settings):
    """Settings of a GAN.

    Parameters
    ----------
    system
        Networks, length of the noise, shape.
    """

    kind: Literal["lsgan", "vae-gan"]
    system: GanPreset


class VaeGanSettings(GanSettings):
    """Settings of a VAE-GAN.

    Parameters
    ----------
    kl
        Weight of the encoder's divergence from a standard normal distribution, summed over the
        latent's values, beside half the squared difference of features, which is the mean over
        all features. Larsen et al. 2016 sum that too: their equal weights are 1 over the number of
        features here.
    gamma
        Weight of the features' difference for the generator, beside the discriminator's verdict.
    features
        Layer of the discriminator whose features are compared: ``"layer1"`` and so on.
    """

    kind: Literal["vae-gan"]
    kl: Natural = 1e-6
    gamma: Natural = 1.0
    features: str = "layer3"


REGRESSOR = "regressor"
"""The one network of a regressor."""


class RegressorSpec(_Strict):
    """The network of a regressor.

    Parameters
    ----------
    channels
        Of each block; each halves the volume.
    norm
        ``"batch"`` as published, or ``"instance"``. Batch norms see the samples a process takes
        through at once: with them ``accumulate`` and the number of processes change the result, and
        the first process's averages are kept. Instance norms see one sample.
    """

    channels: Annotated[tuple[Count, ...], Field(min_length=1)]
    norm: Literal["batch", "instance"] = "batch"


class RegressorPreset(System):
    """A regressor; :mod:`generation.evaluate.regressor` says what its network is.

    Parameters
    ----------
    targets
        Covariates it tells, in this order.
    downsample
        Volumes are averaged over so many voxels along each axis before they are looked at.
    """

    system: Literal["regressor"]
    networks: dict[str, RegressorSpec]
    targets: Annotated[
        tuple[Literal["sex", "age", "ventricular_volume", "brain_volume"], ...],
        Field(min_length=1),
    ]
    downsample: Literal[1, 2, 4] = 1

    def make(self, network: str) -> nn.Module:
        """As in :class:`~generation.presets.System`: ``"regressor"``."""
        from generation.evaluate.cole import ColeNetwork

        spec = self.networks[REGRESSOR]
        return ColeNetwork(self.shape, spec.channels, len(self.targets), spec.norm, self.downsample)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if set(self.networks) != {REGRESSOR}:
            raise ValueError(f"expected one network, {REGRESSOR!r}, found {list(self.networks)}")
        if len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets are named twice in {', '.join(self.targets)}")
        blocks = len(self.networks[REGRESSOR].channels)
        if any(side // self.downsample < 2**blocks for side in self.shape):
            raise ValueError(
                f"{blocks} blocks need {self.downsample * 2**blocks} voxels a side, found shape "
                f"{self.shape}"
            )
        return self


class RegressionSettings(Settings):
    """Settings of a regressor of covariates.

    Parameters
    ----------
    system
        Its network, what it tells, and the shape of its volumes.
    """

    kind: Literal["regression"]
    system: RegressorPreset


KINDS: dict[str, type[Settings]] = {
    "autoencoder": AutoencoderSettings,
    "diffusion": DiffusionSettings,
    "pixel": DiffusionSettings,
    "vae-gan": VaeGanSettings,
    "lsgan": GanSettings,
    "regression": RegressionSettings,
}
"""Settings by what is trained."""

_OPEN = (["rates"], ["discriminator"])
"""Groups that take keys they do not have yet."""


def recipe(name: str, changes: Iterable[str] = ()) -> Settings:
    """A published recipe, with changes.

    Parameters
    ----------
    name
        Of a file in ``generation/presets/train``.
    changes
        ``key=value``, with dots into nested settings: ``batch=4``, ``system.target=velocity``.

    Raises
    ------
    TrainingError
        No such recipe or key, the nearest one is named; or a value that makes no sense.
    """
    folder = files("generation.presets") / "train"
    known = sorted(path.name.removesuffix(".json") for path in folder.iterdir())
    if name not in known:
        raise TrainingError(f"no recipe {name!r}{_near(name, known)}; there are {', '.join(known)}")
    fields = json.loads((folder / f"{name}.json").read_text())
    return settings(_with_system(fields), changes)


def read_settings(path: Path, changes: Iterable[str] = ()) -> Settings:
    """Settings in a JSON file, such as a run's ``settings.json``, with changes.

    Raises
    ------
    TrainingError
        The file cannot be read, or as in :func:`recipe`.
    """
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TrainingError(f"cannot read settings from {path} ({error})") from None
    if not isinstance(fields, dict):
        raise TrainingError(f"{path} holds no settings: expected a JSON object")
    return settings(_with_system(fields), changes)


def _with_system(fields: dict[str, Any]) -> dict[str, Any]:
    """A system's name replaced by what it stands for."""
    base = fields.get("system")
    if not isinstance(base, str):
        return fields
    known = sorted(p.name.removesuffix(".json") for p in files("generation.presets").iterdir()
                   if p.name.endswith(".json"))  # fmt: skip
    if base not in known:
        raise TrainingError(f"no system {base!r}{_near(base, known)}; there are {', '.join(known)}")
    text = (files("generation.presets") / f"{base}.json").read_text()
    return {**fields, "system": json.loads(text)}


def settings(fields: Mapping[str, Any], changes: Iterable[str] = ()) -> Settings:
    """Settings from their fields; see :func:`recipe`."""
    kind = fields.get("kind")
    if kind not in KINDS:
        raise TrainingError(f"kind must be one of {', '.join(KINDS)}; found {kind!r}")
    filled = _checked(kind, fields).model_dump(mode="json")
    for change in changes:
        _change(filled, change)
    return _checked(kind, filled)


def _checked(kind: str, fields: Mapping[str, Any]) -> Settings:
    try:
        return KINDS[kind].model_validate(fields)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(map(str, problem["loc"]))
        raise TrainingError(
            f"setting {place}: {problem['msg']}, found {_short(problem['input'])}"
        ) from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _change(fields: dict[str, Any], change: str) -> None:
    key, found, text = change.partition("=")
    if not found:
        raise TrainingError(f"{change!r} changes no setting; write key=value")
    *path, last = key.strip().split(".")
    for name in path:
        if not isinstance(fields.get(name), dict):
            raise TrainingError(f"no settings {name!r}{_near(name, fields)} to change {key} in")
        fields = fields[name]
    if last not in fields and path not in _OPEN:
        raise TrainingError(f"no setting {key!r}{_near(last, fields)}")
    try:
        fields[last] = json.loads(text)
    except json.JSONDecodeError:
        fields[last] = text


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f" (did you mean {near[0]!r}?)" if near else ""
