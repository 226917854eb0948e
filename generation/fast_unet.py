"""MONAI's ``DiffusionModelUNet``, rebuilt for inference at a fixed list of timesteps.

The blocks below read their weights from MONAI's modules, apply the rewrites of
:mod:`generation.rewrites` and compute in any floating type: statistics of norms and softmax in
float32 at least, everything else in the type chosen. Tensors are ``channels_last_3d``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from generation.layers import CHANNELS_LAST, Convolution, Norm, convolution, upsampling
from generation.rewrites import (
    Affine,
    behind_layer_norm,
    constant_channels,
    single_token_attention,
    stacked,
    time_table,
)


class FastUNet(nn.Module):
    """A U-Net that knows its timesteps and what its constant channels and context will be.

    Parameters
    ----------
    unet
        MONAI's ``DiffusionModelUNet`` in three dimensions, on any device.
    times
        Timesteps it will be asked at.
    constants
        How many trailing input channels hold one value everywhere; the same values are the
        context's only token if the network has cross-attention.
    dtype
        Type to compute in.

    Notes
    -----
    Four exact rewrites: cross-attention to one token becomes a vector per row, constant channels
    a map per row, the time embedding a table that holds ``conv1``'s bias too, and nearest-neighbour
    upsampling part of the convolution that follows.
    """

    table: Tensor
    constant_weight: Tensor

    def __init__(
        self, unet: nn.Module, times: Sequence[int], *, constants: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        source: Any = unet
        if source.num_class_embeds is not None:
            raise ValueError("class embeddings are not supported: the published U-Nets have none")
        embedded = time_table(unet, torch.as_tensor(times, device=_device(unet)))
        kernel = source.conv_in.conv.weight
        split = kernel.shape[1] - constants
        self.dtype = dtype
        self.channels = split
        self.register_buffer("constant_weight", kernel[:, split:].clone())
        self.conv_in = Convolution(kernel[:, :split], None if constants else _bias(source), dtype)
        self.register_buffer("bias_in", _bias(source).clone() if constants else None)
        self._biases: list[Tensor] = []
        self._vectors: list[Affine] = []
        self.down = nn.ModuleList(
            [_Level(self, block, embedded, block.downsampler) for block in source.down_blocks]
        )
        middle = source.middle_block
        self.middle = nn.ModuleList(
            [
                self._res(middle.resnet_1, embedded),
                self._attention(middle.attention),
                self._res(middle.resnet_2, embedded),
            ]
        )
        self.up = nn.ModuleList(
            [_Level(self, block, embedded, block.upsampler) for block in source.up_blocks]
        )
        self.norm_out = Norm(source.out[0])
        self.conv_out = Convolution(source.out[2].conv.weight, source.out[2].conv.bias, dtype)
        self.register_buffer("table", torch.cat(self._biases, 1).to(dtype))
        self._register_vectors()
        del self._biases, self._vectors
        self.requires_grad_(False)

    def _register_vectors(self) -> None:
        vectors = self._vectors
        weight = torch.cat([v.weight for v in vectors]) if vectors else None
        bias = torch.cat([v.bias for v in vectors if v.bias is not None]) if vectors else None
        self.register_buffer("vector_weight", weight)
        self.register_buffer("vector_bias", bias)

    def _res(self, block: Any, embedded: Tensor) -> _Res:
        """A residual block, whose place in the table of biases is the next free one."""
        bias = block.time_emb_proj(embedded) + block.conv1.conv.bias
        start = sum(b.shape[1] for b in self._biases)
        self._biases.append(bias)
        return _Res(block, slice(start, start + bias.shape[1]), self.dtype)

    def _attention(self, block: Any) -> nn.Module:
        if not hasattr(block, "transformer_blocks"):
            return _SelfAttention(block, self.dtype)
        places = []
        for layer in block.transformer_blocks:
            start = sum(len(v.weight) for v in self._vectors)
            self._vectors.append(single_token_attention(layer.attn2))
            places.append(slice(start, start + len(self._vectors[-1].weight)))
        return _Transformer(block, places, self.dtype)

    def condition(self, values: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What a row's constants contribute, once for all steps.

        Parameters
        ----------
        values
            ``(n, constants)``.
        shape
            Voxels of the network's input.

        Returns
        -------
        tuple of Tensor
            Map ``(n, channels, x, y, z)`` and vectors ``(n, total)``, for :meth:`forward`; both
            empty if there are no constants.
        """
        if not self.constant_weight.shape[1]:
            empty = torch.empty((len(values), 0), dtype=self.dtype, device=values.device)
            return empty, empty
        exact = values.to(self.constant_weight)
        extra = constant_channels(self.constant_weight, exact, shape)
        extra = extra + self.bias_in.view(1, -1, 1, 1, 1)  # type: ignore[union-attr,operator]
        vectors = exact[:, :0]
        if self.vector_weight is not None:
            vectors = F.linear(exact, self.vector_weight, self.vector_bias)  # type: ignore[arg-type]
        return extra.to(self.dtype, memory_format=CHANNELS_LAST), vectors.to(self.dtype)

    def forward(self, x: Tensor, bias: Tensor, extra: Tensor, vectors: Tensor) -> Tensor:
        """The network's prediction at one timestep.

        Parameters
        ----------
        x
            ``(n, c, x, y, z)`` without the constant channels, any floating type.
        bias
            Row of :attr:`table` that belongs to the timestep.
        extra, vectors
            What :meth:`condition` gave.

        Returns
        -------
        Tensor
            ``(n, c, x, y, z)`` of the computing type.
        """
        h = self.conv_in(x.to(self.dtype, memory_format=CHANNELS_LAST))
        if extra.numel():
            h = h + extra
        skips = [h]
        for level in self.down:
            h = level.descend(h, bias, vectors, skips)  # type: ignore[operator]
        first, attention, second = self.middle
        h = second(attention(first(h, bias), vectors), bias)
        for level in self.up:
            h = level.ascend(h, bias, vectors, skips)  # type: ignore[operator]
        return self.conv_out(self.norm_out(h, activate=True))


class _Level(nn.Module):
    """Blocks at one resolution, and the way to the next."""

    def __init__(self, unet: FastUNet, block: Any, embedded: Tensor, resample: Any) -> None:
        super().__init__()
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        self.res, self.attention = nn.ModuleList(), nn.ModuleList()
        for res, attention in zip(block.resnets, attentions, strict=True):
            self.res.append(unet._res(res, embedded))
            self.attention.append(
                nn.Identity() if attention is None else unet._attention(attention)
            )
        self.resample: nn.Module | None = None
        if resample is not None:
            with_time = hasattr(resample, "time_emb_proj")
            self.resample = (
                unet._res(resample, embedded) if with_time else _resampler(resample, unet.dtype)
            )

    def descend(self, h: Tensor, bias: Tensor, vectors: Tensor, skips: list[Tensor]) -> Tensor:
        for res, attention in zip(self.res, self.attention, strict=True):
            h = self._attend(attention, res(h, bias), vectors)
            skips.append(h)
        if self.resample is not None:
            h = self.resample(h, bias)
            skips.append(h)
        return h

    def ascend(self, h: Tensor, bias: Tensor, vectors: Tensor, skips: list[Tensor]) -> Tensor:
        for res, attention in zip(self.res, self.attention, strict=True):
            h = torch.cat([h, skips.pop()], 1)
            h = self._attend(attention, res(h, bias), vectors)
        return h if self.resample is None else self.resample(h, bias)

    @staticmethod
    def _attend(attention: nn.Module, h: Tensor, vectors: Tensor) -> Tensor:
        return h if isinstance(attention, nn.Identity) else attention(h, vectors)


class _Res(nn.Module):
    """Residual block; up- or downsampling happens inside."""

    def __init__(self, block: Any, place: slice, dtype: torch.dtype) -> None:
        super().__init__()
        self.place = place
        self.up, self.down = block.upsample is not None, block.downsample is not None
        self.norm1, self.norm2 = Norm(block.norm1), Norm(block.norm2)
        kernel = block.conv1.conv.weight
        self.conv1 = (upsampling if self.up else convolution)(kernel, None, dtype)
        self.conv2 = convolution(block.conv2.conv.weight, block.conv2.conv.bias, dtype)
        skip = block.skip_connection
        plain = isinstance(skip, nn.Identity)
        self.skip = nn.Identity() if plain else Convolution(skip.conv.weight, skip.conv.bias, dtype)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        h = self.norm1(x, activate=True)
        if self.down:
            h, x = _halved(h), _halved(x)
        elif self.up:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        h = self.conv1(h, bias[self.place])
        h = self.conv2(self.norm2(h, activate=True))
        return h + self.skip(x)


class _Transformer(nn.Module):
    """Self-attention, the vector that cross-attention comes down to, and a gated MLP."""

    def __init__(self, block: Any, places: Sequence[slice], dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = Norm(block.norm)
        self.proj_in = _Linear(_flat(block.proj_in.conv), dtype)
        self.layers = nn.ModuleList(
            [
                _TransformerLayer(layer, place, dtype)
                for layer, place in zip(block.transformer_blocks, places, strict=True)
            ]
        )
        self.proj_out = _Linear(_flat(block.proj_out.conv), dtype)

    def forward(self, x: Tensor, vectors: Tensor) -> Tensor:
        tokens = self.proj_in(_tokens(self.norm(x)))
        for layer in self.layers:
            tokens = layer(tokens, vectors)
        return x + _volume(self.proj_out(tokens), x)


class _TransformerLayer(nn.Module):
    def __init__(self, layer: Any, place: slice, dtype: torch.dtype) -> None:
        super().__init__()
        attention, mlp = layer.attn1, layer.ff
        self.place, self.heads, self.scale = place, attention.num_heads, attention.scale
        self.eps = layer.norm1.eps
        qkv = stacked([attention.to_q, attention.to_k, attention.to_v])
        self.qkv = _Linear(behind_layer_norm(layer.norm1, qkv), dtype)
        self.out = _Linear(Affine(attention.out_proj.weight, attention.out_proj.bias), dtype)
        into = Affine(mlp.linear1.weight, mlp.linear1.bias)
        self.mlp_in = _Linear(behind_layer_norm(layer.norm3, into), dtype)
        self.mlp_out = _Linear(Affine(mlp.linear2.weight, mlp.linear2.bias), dtype)

    def forward(self, x: Tensor, vectors: Tensor) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        x = x + self.out(_attend(self.qkv(normed), self.heads, self.scale))
        x = x + vectors[:, None, self.place]
        value, gate = self.mlp_in(F.layer_norm(x, x.shape[-1:], eps=self.eps)).chunk(2, -1)
        return x + self.mlp_out(value * F.gelu(gate))


class _SelfAttention(nn.Module):
    """MONAI's ``SpatialAttentionBlock``."""

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        super().__init__()
        attention = block.attn
        self.heads, self.scale = attention.num_heads, attention.scale
        self.norm = Norm(block.norm)
        self.qkv = _Linear(stacked([attention.to_q, attention.to_k, attention.to_v]), dtype)
        self.out = _Linear(Affine(attention.out_proj.weight, attention.out_proj.bias), dtype)

    def forward(self, x: Tensor, vectors: Tensor) -> Tensor:
        tokens = _attend(self.qkv(_tokens(self.norm(x))), self.heads, self.scale)
        return x + _volume(self.out(tokens), x)


class _Linear(nn.Module):
    def __init__(self, affine: Affine, dtype: torch.dtype) -> None:
        super().__init__()
        bias = affine.bias
        self.register_buffer("weight", affine.weight.detach().to(dtype, copy=True))
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype, copy=True))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)  # type: ignore[arg-type]


class _WithoutTime(nn.Module):
    """A resampling convolution, called as residual blocks are."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.convolution(x)


def _resampler(block: Any, dtype: torch.dtype) -> nn.Module:
    if hasattr(block, "op"):
        return _WithoutTime(Convolution(block.op.conv.weight, block.op.conv.bias, dtype, stride=2))
    return _WithoutTime(upsampling(block.postconv.conv.weight, block.postconv.conv.bias, dtype))


def _attend(qkv: Tensor, heads: int, scale: float) -> Tensor:
    """Attention over tokens ``(n, tokens, 3 * channels)``, softmax in float32 at least."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


def _tokens(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 4, 1).flatten(1, 3)


def _volume(tokens: Tensor, like: Tensor) -> Tensor:
    return tokens.unflatten(1, like.shape[2:]).permute(0, 4, 1, 2, 3)


def _halved(x: Tensor) -> Tensor:
    """Means of 2³ blocks; the CPU has no such kernel for half precision."""
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):
        return F.avg_pool3d(x.float(), 2).to(x.dtype)
    return F.avg_pool3d(x, 2)


def _flat(convolution: nn.Conv3d) -> Affine:
    """A 1³ convolution as a linear map."""
    return Affine(convolution.weight.flatten(1), convolution.bias)


def _bias(unet: Any) -> Tensor:
    return unet.conv_in.conv.bias


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
