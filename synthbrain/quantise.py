"""Intensities in [0, 1] and latents ↔ stored values.

``stored = floor(value / scale + 1/2)``; for uint8 and scale 1/255 the error is at most 1/510.
Latents are rounded to the nearest float16, a relative error of at most 1/2048.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from concurrent.futures import Executor

    import torch

    from synthbrain.header import Geometry

Array = np.ndarray[Any, np.dtype[Any]]

TOLERANCE = 1e-3
"""How far outside [0, 1] rounding may carry a value before it counts as wrong."""


_WORTH_SHARING = 2**20


def quantise(values: Array, geometry: Geometry) -> Array:
    """Intensities to stored values.

    Raises
    ------
    ValueError
        A value is not finite, or outside [0, 1] by more than :data:`TOLERANCE`.
    """
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("intensities must be finite, found NaN or infinity")
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        raise ValueError(f"intensities must lie in [0, 1], found {low:.4g} to {high:.4g}")
    if geometry.dtype != "uint8":
        return np.clip(values, 0, 1).astype(geometry.dtype)
    scaled = np.multiply(values, np.float32(1 / geometry.scale), dtype=np.float32)
    scaled += np.float32(0.5)
    return np.clip(scaled, 0, 255, out=scaled).astype(np.uint8)


def halves(latent: Array) -> Array:
    """A latent as it is stored: float16, each value rounded to the nearest.

    Raises
    ------
    ValueError
        A value is not finite, or beyond the largest float16.
    """
    largest, limit = float(np.abs(latent).max()), float(np.finfo(np.float16).max)
    if not np.isfinite(largest):
        raise ValueError("latents must be finite, found NaN or infinity")
    if largest > limit:
        raise ValueError(f"latents must lie in ±{limit:.0f} to fit float16, found {largest:.6g}")
    return latent.astype(np.float16)


def intensities(stored: Array, geometry: Geometry, *, threads: Executor | None = None) -> Array:
    """Stored values to float32 intensities in [0, 1], large arrays on a pool if there is one."""
    if geometry.dtype != "uint8":
        return stored.astype(np.float32)
    values = np.empty(stored.shape, np.float32)

    def cast(part: slice) -> None:
        np.multiply(stored[part], np.float32(geometry.scale), out=values[part], dtype=np.float32)

    if threads is None or stored.size < _WORTH_SHARING:
        cast(slice(None))
    else:
        edges = [len(stored) * k // 4 for k in range(5)]
        deque(threads.map(cast, map(slice, edges[:-1], edges[1:])), maxlen=0)
    return values


def as_float32(values: torch.Tensor, device: torch.device | str | None = None) -> torch.Tensor:
    """Halves as float32, moved to ``device`` first; exact."""
    import torch

    return values.to(device).to(torch.float32)


def as_float(
    image: torch.Tensor, device: torch.device | str | None = None, scale: float = 1 / 255
) -> torch.Tensor:
    """A uint8 image, or a batch of them, as float32 in [0, 1], moved to ``device`` first.

    Moving bytes and casting where the model is costs a quarter of moving floats.
    """
    import torch

    if image.dtype != torch.uint8:
        return image.to(device)
    image = image.to(device)
    if image.device.type != "cpu":
        return image.to(torch.float32).mul_(scale)
    # NumPy asks the system for huge pages, which halves the time a large new array takes to touch.
    return torch.from_numpy(np.multiply(image.numpy(), np.float32(scale), dtype=np.float32))
