"""How to train: settings with names, checked, and read from the recipes of the papers."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from generation.errors import TrainingError
from generation.presets import Preset

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]


class Settings(BaseModel):
    """Settings of a training run.

    Parameters
    ----------
    kind
        What is trained.
    system
        The architecture, and for diffusion its schedule, target and shapes.
    source
        Where the recipe comes from.
    steps, batch, accumulate
        Optimiser steps; samples of a step over all processes; parts a process takes its share in.
    learning_rate, weight_decay, betas
        Of AdamW (Loshchilov & Hutter 2019); Adam where the decay is 0.
    warm_up
        Steps over which the rate rises from 0.
    clip
        Largest norm of the gradient.
    average
        Decay of the exponential moving average of the weights; 0 for none.
    precision
        Of the forward pass: parameters and optimiser stay float32.
    drop_conditions
        Share of samples trained without their covariates, for guidance.
    objective
        ``"mse"`` or ``"l1"`` between prediction and target.
    latent_scale
        What latents are multiplied by; ``"measured"`` for one over their standard deviation.
    keep_every, keep, log_every, sheet_every, validate_every
        Steps between checkpoints, how many to keep, and steps between log lines, sample sheets and
        validations; 0 for never.
    seed
        Of everything random.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["diffusion", "pixel"]
    system: Preset
    source: str = ""
    steps: Count
    batch: Count = 1
    accumulate: Count = 1
    learning_rate: Positive
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    warm_up: Annotated[int, Field(ge=0)] = 0
    clip: Positive = 1.0
    average: Annotated[float, Field(ge=0, lt=1)] = 0.0
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    drop_conditions: Annotated[float, Field(ge=0, le=1)] = 0.0
    objective: Literal["mse", "l1"] = "mse"
    latent_scale: float | Literal["measured"] = 1.0
    keep_every: Annotated[int, Field(ge=0)] = 1000
    keep: Count = 3
    log_every: Count = 50
    sheet_every: Annotated[int, Field(ge=0)] = 0
    validate_every: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0)] = 0

    def text(self) -> str:
        """Themselves as JSON."""
        return self.model_dump_json(indent=2)


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
    base = fields.get("system")
    if isinstance(base, str):
        fields["system"] = json.loads((files("generation.presets") / f"{base}.json").read_text())
    return settings(fields, changes)


def settings(fields: Mapping[str, Any], changes: Iterable[str] = ()) -> Settings:
    """Settings from their fields; see :func:`recipe`."""
    filled = json.loads(json.dumps(fields))
    for change in changes:
        _change(filled, change)
    try:
        return Settings.model_validate(filled)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(map(str, problem["loc"]))
        raise TrainingError(
            f"setting {place}: {problem['msg']}, found {problem['input']!r}"
        ) from None


def _change(fields: dict[str, Any], change: str) -> None:
    key, found, text = change.partition("=")
    if not found:
        raise TrainingError(f"{change!r} changes no setting; write key=value")
    *path, last = key.strip().split(".")
    known: Iterable[str] = Settings.model_fields
    for name in path:
        if not isinstance(fields.get(name), dict):
            raise TrainingError(f"no settings {name!r}{_near(name, known)} to change {key} in")
        fields = fields[name]
        known = [*fields, *(Preset.model_fields if name == "system" else ())]
    if last not in known:
        raise TrainingError(f"no setting {key!r}{_near(last, known)}")
    try:
        fields[last] = json.loads(text)
    except json.JSONDecodeError:
        fields[last] = text


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f" (did you mean {near[0]!r}?)" if near else ""
