"""What latent and pixel-space diffusion share: weights, a sampler, an identity."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from generation.engine import Progress, Sampler, Timing, peak_bytes, prepare
from generation.options import Options
from generation.presets import Preset, System

if TYPE_CHECKING:
    from torch import nn

VERSION = 1
"""Raise it whenever the same weights and row would give other voxels beyond rounding."""

_STEP_FLOP = {"latent": 1.3e12, "pixel": 3.4e12}
_DECODE_FLOP = {"latent": 11e12, "pixel": 0.0}


class Checkpoint(Protocol):
    """Weights of one system; see :class:`generation.weights.Weights`."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def preset(self) -> System:
        """Its system."""
        ...

    @property
    def target(self) -> str:
        """What its U-Net predicts; nothing where there is none."""
        ...

    @property
    def digest(self) -> str:
        """Hex SHA-256 of its weights."""
        ...

    def network(self, name: str) -> nn.Module:
        """One of its networks, in evaluation mode."""
        ...


class DiffusionSystem:
    """Weights, how to sample with them, and what that makes them.

    Parameters
    ----------
    weights
        A checkpoint of this kind of system.
    options
        How to sample.
    progress
        Told about every step and every decoded volume.

    Raises
    ------
    ValueError
        The checkpoint is of another kind.
    """

    kind: ClassVar[str]
    constants: ClassVar[int] = 0

    def __init__(
        self,
        weights: Checkpoint,
        options: Options | None = None,
        *,
        progress: Progress | None = None,
    ) -> None:
        preset = weights.preset
        if not isinstance(preset, Preset) or preset.system != self.kind:
            raise ValueError(
                f"{weights.name} is a {preset.system} system, expected a {self.kind} one"
            )
        self.weights, self.preset, self.options = weights, preset, options or Options()
        self.progress = progress
        self.name, self.shape, self.affine = weights.name, preset.shape, preset.affine
        self._decoding = Timing()

    def __getstate__(self) -> dict[str, Any]:
        return {"weights": self.weights, "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        type(self).__init__(self, **state)

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 over the weights and everything that changes what they give."""
        parts = {"weights": self.weights.digest, "version": str(VERSION), **self.options.words()}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def provenance(self) -> dict[str, str]:
        """How its volumes come about, as text."""
        return {
            "weights": self.weights.name,
            "weights_digest": self.weights.digest,
            "target": self.weights.target,
            **self.options.words(),
            "device": str(self.options.place),
            "torch": torch.__version__,
            "monai": version("monai"),
        }

    @property
    def seconds_per_volume(self) -> float:
        """As measured, or guessed from the published systems' operations before the first."""
        steps = len(self.options.solution(self.preset))
        if self._stepping.calls:
            return steps * self._stepping.mean + self._decoding.mean
        rate = 3e14 if self.options.place.type == "cuda" else 1.2e12
        if self.options.type == torch.float32:
            rate /= 4
        return (steps * _STEP_FLOP[self.kind] + _DECODE_FLOP[self.kind]) / rate

    @property
    def report(self) -> dict[str, float]:
        """Milliseconds a volume takes per step and to decode, and the peak of memory in GB."""
        found = {"ms_per_step": 1e3 * self._stepping.mean}
        if self._decoding.calls:
            found["ms_per_decode"] = 1e3 * self._decoding.mean
        return found | {"peak_gb": peak_bytes(self.options.place) / 1e9}

    @property
    def _stepping(self) -> Timing:
        sampler: Sampler | None = self.__dict__.get("_sampler")
        return Timing() if sampler is None else sampler.step

    @cached_property
    def _sampler(self) -> Sampler:
        weights, preset, options = self.weights, self.preset, self.options
        unet = weights.network("unet")
        denoiser = prepare(unet, preset, weights.target, options, constants=self.constants)
        return Sampler(denoiser, preset.latent_shape or (1, *preset.shape), options, preset.clip)
