"""The decoder of MONAI's ``AutoencoderKL``, rebuilt for inference, whole or slab by slab.

Group norm looks at the whole volume, so a decoder cannot work through it tile by tile without
seams. Layer by layer it can: each convolution runs over slabs with a voxel of halo, and collects
the statistics the next norm needs as it goes. The largest tensors, those behind an upsampling, are
never stored but computed again where they are needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from generation.layers import CHANNELS_LAST, Convolution, Moments, Norm, Upsampling

SLAB_BYTES = 192 * 2**20
"""Size of a slab's widest tensor."""


class FastDecoder(nn.Module):
    """Latents to volumes.

    Parameters
    ----------
    autoencoder
        MONAI's ``AutoencoderKL`` without attention in its decoder.
    dtype
        Type to compute in; statistics of norms are float32 at least.

    Raises
    ------
    ValueError
        The decoder has other parts than the published one.
    """

    def __init__(self, autoencoder: nn.Module, *, dtype: torch.dtype) -> None:
        super().__init__()
        source: Any = autoencoder
        first, *body, norm, last = source.decoder.blocks
        self.dtype = dtype
        self.first = nn.ModuleList(
            [_convolution(source.post_quant_conv, dtype), _convolution(first, dtype)]
        )
        self.body = nn.ModuleList([_stage(block, dtype) for block in body])
        self.norm = Norm(norm)
        self.last = _convolution(last, dtype)
        self.requires_grad_(False)

    def forward(self, latents: Tensor) -> Tensor:
        """Decode whole tensors.

        Parameters
        ----------
        latents
            ``(n, c, x, y, z)``, any floating type.

        Returns
        -------
        Tensor
            ``(n, 1, 8 x, 8 y, 8 z)`` of the computing type, not clamped.
        """
        h = latents.to(self.dtype, memory_format=CHANNELS_LAST)
        for step in (*self.first, *self.body):
            h = step(h)
        return self.last(self.norm(h))

    def in_slabs(
        self,
        latent: Tensor,
        *,
        slab_bytes: int = SLAB_BYTES,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Decode slab by slab: the same values up to rounding, in a fraction of the memory.

        Parameters
        ----------
        latent
            ``(1, c, x, y, z)``.
        slab_bytes
            Size of a slab; smaller ones need less memory and more time.
        progress
            Called with the number of layers done and their total.

        Returns
        -------
        Tensor
            ``(1, 1, 8 x, 8 y, 8 z)`` of the computing type, not clamped.

        Raises
        ------
        ValueError
            More than one latent.
        """
        if len(latent) != 1:
            raise ValueError(f"slabs are for one latent at a time, found {len(latent)}")
        h = latent.to(self.dtype, memory_format=CHANNELS_LAST)
        for step in self.first:
            h = step(h)
        rows: _Rows = _Stored(h, Moments().add(h))
        del h
        stages: Iterable[_Residual | _Upsample] = self.body  # type: ignore[assignment]
        for done, stage in enumerate(stages, 1):
            rows = stage.in_slabs(rows, slab_bytes)
            if progress is not None:
                progress(done, len(self.body))
        volume = _like(rows, self.last)
        for place, _, y in _sweep(rows, self.norm, self.last, slab_bytes, activate=False):
            volume[:, :, place] = y
        return volume

    def whole_bytes(self, latent_shape: Sequence[int]) -> int:
        """Memory that decoding one latent whole takes at its peak, in bytes.

        In the last level's first block: its input, the norm of that, and its output.
        """
        ups = sum(isinstance(stage, _Upsample) for stage in self.body)
        voxels = math.prod(latent_shape[1:]) * 8**ups
        widths = [len(m.weight) for m in self.modules() if isinstance(m, (Norm, Convolution))]
        return (
            voxels * (2 * max(widths) + self.norm.weight.numel()) * self.last.weight.element_size()
        )


class _Residual(nn.Module):
    """Residual block of the autoencoder."""

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm1 = Norm(block.norm1)
        self.conv1 = _convolution(block.conv1, dtype)
        self.norm2 = Norm(block.norm2)
        self.conv2 = _convolution(block.conv2, dtype)
        plain = isinstance(block.nin_shortcut, nn.Identity)
        self.shortcut = nn.Identity() if plain else _convolution(block.nin_shortcut, dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x, activate=True))
        h = self.conv2(self.norm2(h, activate=True))
        return h.add_(self.shortcut(x))

    def in_slabs(self, rows: _Rows, slab_bytes: int) -> _Rows:
        in_place = isinstance(rows, _Stored) and isinstance(self.shortcut, nn.Identity)
        total = rows.slab(0, rows.shape[2]) if in_place else _like(rows, self.conv1)
        hidden, moments = _like(rows, self.conv1), Moments()
        for place, x, y in _sweep(rows, self.norm1, self.conv1, slab_bytes):
            hidden[:, :, place] = y
            moments.add(y)
            if not in_place:
                total[:, :, place] = self.shortcut(x)
        middle, moments = _Stored(hidden, moments), Moments()
        for place, _, y in _sweep(middle, self.norm2, self.conv2, slab_bytes):
            moments.add(total[:, :, place].add_(y))
        return _Stored(total, moments)


class _Upsample(Upsampling):
    """Nearest ×2 and a convolution, put off until its rows are asked for."""

    def in_slabs(self, rows: _Rows, slab_bytes: int) -> _Rows:
        upsampled = _Upsampled(rows.slab(0, rows.shape[2]), self)
        for start, end in _ranges(upsampled.shape, slab_bytes, self.weight.element_size()):
            upsampled.moments.add(upsampled.slab(start, end))
        return upsampled


@dataclass(frozen=True, eq=False)
class _Stored:
    """Rows along x that lie in memory, and their statistics."""

    tensor: Tensor
    moments: Moments

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def slab(self, start: int, end: int) -> Tensor:
        return self.tensor[:, :, start:end]


class _Upsampled:
    """Rows along x that are computed when asked for, from the first to the last."""

    def __init__(self, source: Tensor, step: _Upsample) -> None:
        self.source, self.step, self.moments = source, step, Moments()
        n, _, x, y, z = source.shape
        self.shape = torch.Size((n, step.weight.shape[1], 2 * x, 2 * y, 2 * z))
        self._end, self._halo = 0, source[:, :, :0]

    def slab(self, start: int, end: int) -> Tensor:
        """Rows from ``start`` to ``end``; the last two of the slab before are not made again."""
        overlap = self._end - start
        if 0 < overlap <= self._halo.shape[2]:
            rows = torch.cat([self._halo[:, :, -overlap:], self._computed(self._end, end)], 2)
        else:
            rows = self._computed(start, end)
        self._end, self._halo = end, rows[:, :, -2:].clone()
        return rows

    def _computed(self, start: int, end: int) -> Tensor:
        low, high = max((start - 1) // 2, 0), min(end // 2 + 1, self.source.shape[2])
        y = self.step(self.source[:, :, low:high])
        # The outermost rows lack a neighbour, unless they are the volume's own border.
        return y[:, :, start - 2 * low : end - 2 * low]


_Rows = _Stored | _Upsampled


class _Slab(NamedTuple):
    place: slice
    x: Tensor
    y: Tensor


def _sweep(
    rows: _Rows, norm: Norm, convolution: Convolution, slab_bytes: int, *, activate: bool = True
) -> Iterator[_Slab]:
    """Slab by slab: its place, the rows themselves, and their norm and convolution."""
    depth = rows.shape[2]
    for start, end in _ranges(rows.shape, slab_bytes, convolution.weight.element_size()):
        low, high = max(start - 1, 0), min(end + 1, depth)
        x = rows.slab(low, high)
        h = norm.with_moments(x, rows.moments, activate=activate)
        missing = (int(low == start), int(high == end))
        if any(missing):
            h = F.pad(h, (0, 0, 0, 0, *missing))
        y = F.conv3d(h, convolution.weight, convolution.bias, padding=(0, 1, 1))
        yield _Slab(slice(start, end), x[:, :, start - low : end - low], y)


def _ranges(shape: torch.Size, slab_bytes: int, item: int) -> Iterator[tuple[int, int]]:
    rows = max(1, slab_bytes // (shape[1] * shape[3] * shape[4] * item))
    for start in range(0, shape[2], rows):
        yield start, min(start + rows, shape[2])


def _like(rows: _Rows, convolution: Convolution) -> Tensor:
    """Room for a convolution of some rows."""
    weight = convolution.weight
    shape = (1, len(weight), *rows.shape[2:])
    return torch.empty(shape, dtype=weight.dtype, device=weight.device, memory_format=CHANNELS_LAST)


def _convolution(block: Any, dtype: torch.dtype) -> Convolution:
    return Convolution(block.conv.weight, block.conv.bias, dtype)


def _stage(block: Any, dtype: torch.dtype) -> nn.Module:
    if hasattr(block, "nin_shortcut"):
        return _Residual(block, dtype)
    if hasattr(block, "postconv"):
        return _Upsample(block.postconv.conv.weight, block.postconv.conv.bias, dtype)
    raise ValueError(
        f"a decoder with a {type(block).__name__} cannot be prepared: expected residual blocks and "
        "nearest-neighbour upsampling, as in the published autoencoder"
    )
