"""Layers for inference: kernels laid out channels-last, statistics of norms in float32 at least."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from generation.rewrites import upsampling_kernel

CHANNELS_LAST = torch.channels_last_3d


class Norm(nn.Module):
    """Group norm, and the SiLU behind it if asked.

    Parameters
    ----------
    norm
        The norm to copy; its affine map stays in its own type.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        self.register_buffer("weight", norm.weight.detach().clone())
        self.register_buffer("bias", norm.bias.detach().clone())

    def forward(self, x: Tensor, activate: bool = False) -> Tensor:
        """Normalise ``(n, c, x, y, z)``."""
        group_norm = F.group_norm if x.device.type == "cpu" else grouped_norm
        h = group_norm(x, self.groups, self.weight, self.bias, self.eps)
        return F.silu(h, inplace=True) if activate else h


def grouped_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Group norm from plain operations, which compilers fuse and which keep channels last.

    Parameters
    ----------
    x
        ``(n, c, x, y, z)``.
    groups, weight, bias, eps
        As of :class:`torch.nn.GroupNorm`; the affine map in the type of the statistics.
    """
    values = x.to(weight.dtype)
    grouped = values.unflatten(1, (groups, -1))
    variance, mean = torch.var_mean(grouped, dim=(2, 3, 4, 5), correction=0)
    factor = torch.rsqrt(variance + eps)
    per_channel = x.shape[1] // groups
    scale = factor.repeat_interleave(per_channel, 1) * weight
    shift = bias - mean.repeat_interleave(per_channel, 1) * scale
    shaped = (len(x), -1, 1, 1, 1)
    return (values * scale.view(shaped) + shift.view(shaped)).to(x.dtype)


class Convolution(nn.Module):
    """Padded convolution of odd kernel size.

    Parameters
    ----------
    weight, bias
        ``(out, in, k, k, k)`` and ``(out,)`` or None.
    dtype
        Type to compute in.
    stride
        1 or 2.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, stride: int = 1
    ) -> None:
        super().__init__()
        self.padding, self.stride = weight.shape[-1] // 2, stride
        self.register_buffer("weight", _kernel(weight, dtype))
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype, copy=True))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolve ``(n, in, x, y, z)``, with another bias if one is given."""
        bias = self.bias if bias is None else bias
        return F.conv3d(x, self.weight, bias, stride=self.stride, padding=self.padding)


class Upsampling(nn.Module):
    """Nearest ×2 and a 3³ convolution in one.

    Parameters
    ----------
    weight, bias, dtype
        Of the convolution, as for :class:`Convolution`.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", _kernel(upsampling_kernel(weight), dtype))
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype, copy=True))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Upsample and convolve ``(n, in, x, y, z)``, with another bias if one is given."""
        bias = self.bias if bias is None else bias
        return F.conv_transpose3d(x, self.weight, bias, stride=2, padding=1)


def _kernel(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.detach().to(dtype, copy=True, memory_format=CHANNELS_LAST)
