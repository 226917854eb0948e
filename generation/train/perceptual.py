"""Losses on what is seen rather than on single voxels."""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_LEVELS = 4


class PyramidLoss(nn.Module):
    """Mean absolute difference of Laplacian pyramids: no weights, no download.

    Edges count on every scale, each level in proportion to its side rather than to its volume
    (Bojanowski et al. 2018, "Optimizing the Latent Space of Generative Networks", sec. 3).
    """

    def forward(self, made: Tensor, wanted: Tensor) -> Tensor:
        """The loss between ``(n, 1, x, y, z)`` volumes."""
        difference = made.float() - wanted.float()
        total = difference.new_zeros(())
        for level in range(_LEVELS):
            if min(difference.shape[2:]) < 4:
                break
            coarse = functional.avg_pool3d(difference, 2)
            size = difference.shape[2:]
            smooth = functional.interpolate(coarse, size, mode="trilinear", align_corners=False)
            total = total + 2**level * (difference - smooth).abs().mean()
            difference = coarse
        return total


class PerceptualUnavailableWarning(UserWarning):
    """The perceptual network's weights are not here; a loss that needs none is used."""


def perceptual_loss(name: str) -> tuple[nn.Module, str]:
    """A perceptual loss, and what it is: ``"pyramid"`` where the wished one cannot be had.

    Parameters
    ----------
    name
        ``"squeeze"``: LPIPS (Zhang et al. 2018) with SqueezeNet on a random quarter of the slices
        along each axis, as MONAI computes it, with weights that PyTorch downloads once; or
        ``"pyramid"``, :class:`PyramidLoss`.

    Warns
    -----
    PerceptualUnavailableWarning
        The packages or weights are not here and cannot be fetched.
    """
    if name == "pyramid":
        return PyramidLoss(), name
    try:
        return _squeeze().requires_grad_(False).eval(), name
    except Exception as error:  # missing packages, no network, a damaged download
        reason = " ".join(str(error).split())[:120]
        warnings.warn(
            f"no perceptual network ({type(error).__name__}: {reason}): training with the pyramid "
            "loss, which needs no weights; `pip install lpips torchvision` and a connection, once, "
            "give the published loss",
            PerceptualUnavailableWarning,
            stacklevel=2,
        )
        return PyramidLoss(), "pyramid"


def _squeeze() -> Any:
    from monai.losses import PerceptualLoss  # type: ignore[attr-defined]

    with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng():
        return PerceptualLoss(3, network_type="squeeze", is_fake_3d=True, fake_3d_ratio=0.25)
