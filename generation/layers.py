"""Layers for inference: kernels laid out channels-last, statistics of norms in float32 at least."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from generation.rewrites import upsampling_kernel

CHANNELS_LAST = torch.channels_last_3d

MOST_VOXELS = 2**15
"""Voxels up to which PyTorch's group norm is exact enough on a CPU."""

_CHUNK = 16384
"""Voxels whose moments are taken at once on a CPU: few enough to stay in its cache."""

MOST_CHANNELS = 384
"""Input channels up to which oneDNN's convolutions are fast."""


class Moments:
    """Mean and variance per channel of everything added (Chan et al. 1983).

    PyTorch's own group norm adds up channels-last tensors in float32: on a CPU that costs two
    thousandths of a volume's range.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, slab: Tensor) -> Moments:
        """Take in ``(1, c, x, y, z)``; returns itself."""
        values = slab.permute(0, 2, 3, 4, 1).flatten(0, 3)
        chunk = _CHUNK if slab.device.type == "cpu" else len(values)
        for part in values.split(chunk):
            exact = part.to(torch.promote_types(part.dtype, torch.float32))
            mean = exact.mean(0)
            squares = (exact - mean).square_().sum(0)
            self._merge(len(part), mean.double(), squares.double())
        return self

    def _merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        total = self.count + count
        shift = mean - self.mean.to(mean.device)
        self.squares = self.squares.to(mean.device) + squares
        self.squares = self.squares + shift.square() * (self.count * count / total)
        self.mean = self.mean.to(mean.device) + shift * (count / total)
        self.count = total

    def grouped(self, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and variance of each channel's group, ``(c,)``."""
        means = self.mean.view(groups, -1)
        mean = means.mean(1, keepdim=True)
        within = (self.squares / self.count).view(groups, -1)
        variance = (within + (means - mean).square()).mean(1, keepdim=True)
        return mean.expand_as(means).flatten(), variance.expand_as(means).flatten()


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
        if x.device.type == "cpu" and x[0, 0].numel() > MOST_VOXELS:
            rows = [self.with_moments(row, Moments().add(row), activate) for row in x.split(1)]
            return rows[0] if len(rows) == 1 else torch.cat(rows)
        group_norm = F.group_norm if x.device.type == "cpu" else grouped_norm
        h = group_norm(x, self.groups, self.weight, self.bias, self.eps)
        return F.silu(h, inplace=True) if activate else h

    def with_moments(self, x: Tensor, moments: Moments, activate: bool = False) -> Tensor:
        """Normalise part of a row, ``(1, c, ...)``, by the moments of all of it."""
        mean, variance = (part.to(self.weight) for part in moments.grouped(self.groups))
        h = F.batch_norm(x, mean, variance, self.weight, self.bias, False, 0.0, self.eps)
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


class SplitConvolution(nn.Module):
    """The same, as a sum over groups of input channels.

    oneDNN's kernels lose up to four fifths of their speed when a convolution has so many channels
    that its operands leave the cache.

    Parameters
    ----------
    weight, bias, dtype
        As for :class:`Convolution`.
    parts
        How many groups; divides the input channels.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, parts: int) -> None:
        super().__init__()
        first, *others = weight.chunk(parts, 1)
        self.first = Convolution(first, bias, dtype)
        self.others = nn.ModuleList([Convolution(part, None, dtype) for part in others])

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """As :meth:`Convolution.forward`."""
        first, *others = x.chunk(len(self.others) + 1, 1)
        total: Tensor = self.first(first, bias)
        for convolution, part in zip(self.others, others, strict=True):
            total = total.add_(convolution(part))
        return total


def convolution(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Convolution | SplitConvolution:
    """The faster of the two for where ``weight`` lies."""
    channels = weight.shape[1]
    parts = 1
    while channels // parts > MOST_CHANNELS and channels % (parts * 2) == 0:
        parts *= 2
    if weight.device.type != "cpu" or parts == 1:
        return Convolution(weight, bias, dtype)
    return SplitConvolution(weight, bias, dtype, parts)


class Upsampling(nn.Module):
    """Nearest ×2 and a 3³ convolution in one transposed convolution.

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


class PhaseUpsampling(nn.Module):
    """The same as eight small convolutions, one for each corner of a block of 2³ voxels.

    oneDNN's transposed convolution is slow for many channels and few voxels.

    Parameters
    ----------
    weight, bias, dtype
        As for :class:`Upsampling`.
    """

    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        # A transposed kernel's taps 3, 1 make the even voxels and 2, 0 the odd ones.
        taps = upsampling_kernel(weight).transpose(0, 1).flip(2, 3, 4)
        self.out_channels = len(weight)
        for i, j, k in _CORNERS:
            phase = _kernel(taps[:, :, i::2, j::2, k::2], dtype)
            self.register_buffer(f"weight{i}{j}{k}", phase)
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype, copy=True))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """As :meth:`Upsampling.forward`."""
        bias = self.bias if bias is None else bias
        n, _, *size = x.shape
        padded = F.pad(x, (1,) * 6)
        out = torch.empty(
            (n, self.out_channels, *(2 * length for length in size)),
            dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST,
        )  # fmt: skip
        for i, j, k in _CORNERS:
            a, b, c = (slice(s, s + length + 1) for s, length in zip((i, j, k), size, strict=True))
            phase = getattr(self, f"weight{i}{j}{k}")
            out[:, :, i::2, j::2, k::2] = F.conv3d(padded[:, :, a, b, c], phase, bias)
        return out


def upsampling(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Upsampling | PhaseUpsampling:
    """The faster of the two for where ``weight`` lies."""
    many = weight.device.type == "cpu" and weight.shape[1] > MOST_CHANNELS
    return (PhaseUpsampling if many else Upsampling)(weight, bias, dtype)


_CORNERS = tuple(itertools.product((0, 1), repeat=3))


def _kernel(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.detach().to(dtype, copy=True, memory_format=CHANNELS_LAST)
