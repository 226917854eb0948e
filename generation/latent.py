"""Latent diffusion: a U-Net draws latents under covariates, an autoencoder decodes them.

The system of Pinaya et al. 2022 as published in the MONAI model zoo, and any other with its
layout: the conditioning vector is both concatenated to the latent as constant channels and attended
to as the only token of the context.
"""

from __future__ import annotations

import time
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from generation.covariates import NAMES, conditioning
from generation.engine import Progress, as_seeds, free_bytes, synchronise
from generation.fast_decoder import FastDecoder
from generation.options import Options
from generation.system import Checkpoint, DiffusionSystem

if TYPE_CHECKING:
    import pandas as pd


class LatentDiffusion(DiffusionSystem):
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

    kind = "latent"
    constants = len(NAMES)
    honours = frozenset(NAMES)

    def __init__(
        self,
        weights: Checkpoint,
        options: Options | None = None,
        *,
        decode: Literal["auto", "whole", "slabs"] = "auto",
        progress: Progress | None = None,
    ) -> None:
        super().__init__(weights, options, progress=progress)
        if decode not in ("auto", "whole", "slabs"):
            raise ValueError(f"decode must be 'auto', 'whole' or 'slabs', found {decode!r}")
        self.decode_mode = decode
        self.latent_shape = self.preset.latent_shape or (0, 0, 0, 0)
        self.batch_size = self.options.rows

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "decode": self.decode_mode}

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

    @cached_property
    def _autoencoder(self) -> nn.Module:
        return self.weights.network("autoencoder")

    @cached_property
    def _decoder(self) -> nn.Module:
        options = self.options
        if not options.rewrite:
            return self._autoencoder.to(options.place, options.type)
        return FastDecoder(self._autoencoder, dtype=options.type).to(options.place)
