"""Latent diffusion: a U-Net draws latents under covariates, an autoencoder decodes them.

The system of Pinaya et al. 2022 as published in the MONAI model zoo, and any other with its
layout: the conditioning vector is both concatenated to the latent as constant channels and attended
to as the only token of the context.
"""

from __future__ import annotations

import hashlib
import json
import time
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from generation.covariates import NAMES, conditioning
from generation.engine import (
    Progress,
    Sampler,
    Timing,
    as_seeds,
    free_bytes,
    peak_bytes,
    prepare,
    synchronise,
)
from generation.fast_decoder import FastDecoder
from generation.options import Options

if TYPE_CHECKING:
    import pandas as pd

    from generation.presets import Preset

VERSION = 1
"""Raise it whenever the same weights and row would give other voxels beyond rounding."""


class Checkpoint(Protocol):
    """Weights of one system; see :class:`generation.weights.Weights`."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def preset(self) -> Preset:
        """Its system."""
        ...

    @property
    def target(self) -> str:
        """What its U-Net predicts."""
        ...

    @property
    def digest(self) -> str:
        """Hex SHA-256 of its weights."""
        ...

    def network(self, name: str) -> nn.Module:
        """One of its networks, in evaluation mode."""
        ...


class LatentDiffusion:
    """Volumes from rows, through latents.

    Parameters
    ----------
    weights
        A checkpoint with the networks ``"autoencoder"`` and ``"unet"``.
    options
        How to sample; UniPC with 20 steps by default.
    decode
        ``"whole"``, ``"slabs"`` (a third of the memory, exact, slower), or ``"auto"``, which
        looks at the free memory.
    progress
        Told about every step and every decoded volume.

    Notes
    -----
    Networks are read when first needed, and each process reads its own. The decoder's output is
    clamped to [0, 1] and never rescaled, so that intensities stay comparable between volumes.
    """

    honours = frozenset(NAMES)

    def __init__(
        self,
        weights: Checkpoint,
        options: Options | None = None,
        *,
        decode: Literal["auto", "whole", "slabs"] = "auto",
        progress: Progress | None = None,
    ) -> None:
        if weights.preset.system != "latent" or weights.preset.latent_shape is None:
            raise ValueError(f"{weights.name} is not a latent diffusion system")
        self.weights, self.options = weights, options or Options()
        self.decode_mode, self.progress = decode, progress
        self.name = weights.name
        self.shape, self.affine = weights.preset.shape, weights.preset.affine
        self.latent_shape = weights.preset.latent_shape
        self.batch_size = self.options.rows
        self._decoding = Timing()

    def __getstate__(self) -> dict[str, Any]:
        return {"weights": self.weights, "options": self.options, "decode": self.decode_mode}

    def __setstate__(self, state: dict[str, Any]) -> None:
        LatentDiffusion.__init__(self, **state)

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 over the weights and everything that changes what they give."""
        return digest_of(self.weights, self.options)

    @property
    def provenance(self) -> dict[str, str]:
        """How its volumes come about, as text."""
        return provenance_of(self.weights, self.options)

    @property
    def seconds_per_volume(self) -> float:
        """As measured, or guessed before the first volume."""
        step, decode = self._step, self._decoding
        if not (step.calls and decode.calls):
            return guess_seconds(self.weights.preset, self.options)
        evaluations = len(self.options.solution(self.weights.preset))
        return step.seconds / step.calls * evaluations + decode.seconds / decode.calls

    @property
    def report(self) -> dict[str, float]:
        """Milliseconds a volume takes per step and to decode, and the peak of memory in GB."""
        step, decode = self._step, self._decoding
        return {
            "ms_per_step": 1e3 * step.seconds / max(step.calls, 1),
            "ms_per_decode": 1e3 * decode.seconds / max(decode.calls, 1),
            "peak_gb": peak_bytes(self.options.place) / 1e9,
        }

    def sample(self, rows: pd.DataFrame) -> Tensor:
        """Make one volume per row.

        Parameters
        ----------
        rows
            Normalised covariate columns, which may lie outside [0, 1], and an integer ``seed``.

        Returns
        -------
        Tensor
            ``(n, 1, 160, 224, 160)`` float32 in [0, 1], on the device.

        Raises
        ------
        CovariateError
            A covariate is absent or not finite.
        """
        return self.decode(self.sample_latents(rows))

    @torch.inference_mode()
    def sample_latents(self, rows: pd.DataFrame) -> Tensor:
        """Make one latent per row.

        Parameters
        ----------
        rows
            As for :meth:`sample`.

        Returns
        -------
        Tensor
            ``(n, 3, 20, 28, 20)`` float32, on the device.
        """
        values = torch.tensor(conditioning(rows))
        if not len(rows):
            return torch.empty((0, *self.latent_shape), device=self.options.place)
        return self._sampler.draw(as_seeds(rows["seed"]), values, self.progress).float()

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents to volumes, one at a time.

        Parameters
        ----------
        latents
            ``(n, 3, 20, 28, 20)``, any floating type, anywhere.

        Returns
        -------
        Tensor
            ``(n, 1, 160, 224, 160)`` float32 in [0, 1], on the device.
        """
        device = self.options.place
        out = torch.empty((len(latents), 1, *self.shape), device=device)
        for i, latent in enumerate(latents):
            began = time.perf_counter()
            out[i] = self._decoded(latent[None].to(device))[0].clamp(0, 1)
            synchronise(device)
            self._decoding.seconds += time.perf_counter() - began
            self._decoding.calls += 1
            if self.progress is not None:
                self.progress("decoding", i + 1, len(latents))
        return out

    @torch.inference_mode()
    def encode(self, volumes: Tensor) -> Tensor:
        """Volumes to the means of their latents.

        Parameters
        ----------
        volumes
            ``(n, 1, 160, 224, 160)`` in [0, 1].

        Returns
        -------
        Tensor
            ``(n, 3, 20, 28, 20)`` float32, on the device.
        """
        device = self.options.place
        encoder: Any = self._autoencoder.to(device)
        dtype = next(encoder.parameters()).dtype
        means = [encoder.encode(volume[None].to(device, dtype))[0].float() for volume in volumes]
        return torch.cat(means) if means else torch.empty((0, *self.latent_shape), device=device)

    def _decoded(self, latent: Tensor) -> Tensor:
        decoder = self._decoder
        if not isinstance(decoder, FastDecoder):
            return decoder.decode(latent.to(self.options.type)).float()  # type: ignore[operator]
        if self._whole(decoder):
            try:
                return decoder(latent).float()
            except torch.cuda.OutOfMemoryError:
                if self.decode_mode == "whole":
                    raise
                torch.cuda.empty_cache()
        return decoder.in_slabs(latent).float()

    def _whole(self, decoder: FastDecoder) -> bool:
        if self.decode_mode != "auto":
            return self.decode_mode == "whole"
        return free_bytes(self.options.place) > 1.2 * decoder.whole_bytes(self.latent_shape)

    @property
    def _step(self) -> Timing:
        sampler = self.__dict__.get("_sampler")
        return Timing() if sampler is None else sampler.step

    @cached_property
    def _sampler(self) -> Sampler:
        preset, options = self.weights.preset, self.options
        unet = self.weights.network("unet")
        denoiser = prepare(unet, preset, self.weights.target, options, constants=len(NAMES))
        return Sampler(denoiser, self.latent_shape, options, preset.clip)

    @cached_property
    def _autoencoder(self) -> nn.Module:
        return self.weights.network("autoencoder")

    @cached_property
    def _decoder(self) -> nn.Module:
        options = self.options
        if not options.rewrite:
            return self._autoencoder.to(options.place, options.type)
        return FastDecoder(self._autoencoder, dtype=options.type).to(options.place)


def digest_of(weights: Checkpoint, options: Options) -> str:
    """Hex SHA-256 over a checkpoint and what changes its samples."""
    parts = {"weights": weights.digest, "version": str(VERSION), **options.words()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def provenance_of(weights: Checkpoint, options: Options) -> dict[str, str]:
    """How a checkpoint's samples come about, as text."""
    return {
        "weights": weights.name,
        "weights_digest": weights.digest,
        "target": weights.target,
        **options.words(),
        "device": str(options.place),
        "torch": torch.__version__,
        "monai": version("monai"),
    }


def guess_seconds(preset: Preset, options: Options) -> float:
    """Rough cost of one volume, from the floating-point operations of the published systems."""
    per_step, once = (1.3e12, 11e12) if preset.system == "latent" else (3.4e12, 0.0)
    rate = 3e14 if options.place.type == "cuda" else 1.2e12
    if options.type == torch.float32:
        rate /= 4
    return (per_step * len(options.solution(preset)) + once) / rate
