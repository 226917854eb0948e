"""Algebra that makes MONAI's diffusion networks cheaper without changing what they compute.

Each function turns the weights of one construct into those of a cheaper one that gives the same
numbers up to rounding. They work in the precision they are given: pass float32 or float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn


class Affine(NamedTuple):
    """Weight and bias of a linear map or convolution."""

    weight: Tensor
    bias: Tensor | None


def upsampling_kernel(weight: Tensor) -> Tensor:
    """Nearest ×2 followed by a 3³ convolution, as one transposed convolution.

    An output voxel sees each input voxel it touches through one or two of the three taps, so the
    sums of those taps form a 4³ kernel of stride 2: 8 products instead of 27, borders included.

    Parameters
    ----------
    weight
        ``(out, in, 3, 3, 3)`` of the convolution with padding 1.

    Returns
    -------
    Tensor
        ``(in, out, 4, 4, 4)`` for ``conv_transpose3d(stride=2, padding=1)``.

    Examples
    --------
    >>> upsampling_kernel(torch.ones(1, 1, 3, 3, 3)).sum()
    tensor(216.)
    """
    for axis in (2, 3, 4):
        first, middle, last = weight.unbind(axis)
        weight = torch.stack([last, middle + last, first + middle, first], axis)
    return weight.transpose(0, 1)


def single_token_attention(attention: nn.Module) -> Affine:
    """Cross-attention over one context token, as a linear map of that token.

    With a single key the softmax is 1 whatever the query, so every voxel receives
    ``out_proj(to_v(context))``.

    Parameters
    ----------
    attention
        MONAI's ``CrossAttentionBlock``.

    Returns
    -------
    Affine
        ``(channels, context)`` and ``(channels,)``.
    """
    source: Any = attention
    project, value = source.out_proj, source.to_v
    bias = project.bias if value.bias is None else project.bias + project.weight @ value.bias
    return Affine(project.weight @ value.weight, bias)


def constant_channels(weight: Tensor, constants: Tensor, shape: Sequence[int]) -> Tensor:
    """What channels that hold one value everywhere add to a padded 3³ convolution.

    Parameters
    ----------
    weight
        ``(out, k, 3, 3, 3)``: the part of the kernel that sees them.
    constants
        ``(n, k)`` their values.
    shape
        Voxels, ``(x, y, z)``.

    Returns
    -------
    Tensor
        ``(n, out, x, y, z)``, to be added to the convolution of the other channels.
    """
    ones = torch.ones((1, 1, *shape), dtype=weight.dtype, device=weight.device)
    kernels = torch.einsum("okxyz,nk->noxyz", weight, constants).flatten(0, 1)[:, None]
    return F.conv3d(ones, kernels, padding=1).unflatten(1, (len(constants), -1))[0]


def time_table(unet: nn.Module, times: Tensor) -> Tensor:
    """A U-Net's embedding of some timesteps, after the activation its blocks begin with.

    Parameters
    ----------
    unet
        MONAI's ``DiffusionModelUNet``.
    times
        ``(n,)``.

    Returns
    -------
    Tensor
        ``(n, channels)``.
    """
    from monai.networks.nets.diffusion_model_unet import get_timestep_embedding

    source: Any = unet
    sinusoids = get_timestep_embedding(times, source.block_out_channels[0])
    return F.silu(source.time_embed(sinusoids.to(source.time_embed[0].weight)))


def behind_layer_norm(norm: nn.LayerNorm, linear: Affine) -> Affine:
    """A linear map that includes the scale and shift of the layer norm before it."""
    bias = linear.weight @ norm.bias
    return Affine(linear.weight * norm.weight, bias if linear.bias is None else bias + linear.bias)


def stacked(linears: Sequence[nn.Linear]) -> Affine:
    """Several linear maps of the same input as one."""
    sources: list[Any] = list(linears)
    bias = None if sources[0].bias is None else torch.cat([linear.bias for linear in sources])
    return Affine(torch.cat([linear.weight for linear in sources]), bias)
