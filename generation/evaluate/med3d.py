"""Med3D's ResNet-50: features of whole volumes, with the authors' weights or random ones.

The networks of MedicalNet (Chen, Ma and Zheng 2019, "Med3D: Transfer Learning for 3D Medical Image
Analysis", arXiv 1904.00625) were trained to segment organs on 8 or 23 public data sets. Pinaya et
al. 2022 measure their FID on them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from generation.checkpoints import read_state
from generation.evaluate.networks import built, digest_of, fill_randomly, load_strictly

_BLOCKS = (3, 4, 6, 3)
_STRIDES = (1, 2, 1, 1)
_DILATIONS = (1, 1, 2, 4)
_EXPANSION = 4
_FULL_WIDTH = 64
_TINY = 1e-5
"""Keeps the z-score of a constant volume finite."""

_PREFIX = "module."
_HEAD = "conv_seg."
_COUNTER = "num_batches_tracked"


class Bottleneck(nn.Module):
    """A residual block: 1³ convolution, dilated 3³, 1³, each normalised over the batch.

    Parameters
    ----------
    inside, width
        Channels that come in, and channels of the block; four times as many go out.
    stride, dilation
        Of the 3³ convolution.
    shortcut
        Whether what comes in is projected before it is added (shortcuts of type B).
    """

    def __init__(
        self, inside: int, width: int, *, stride: int, dilation: int, shortcut: bool
    ) -> None:
        super().__init__()
        outside = width * _EXPANSION
        self.conv1 = nn.Conv3d(inside, width, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = nn.Conv3d(
            width, width, 3, stride=stride, dilation=dilation, padding=dilation, bias=False
        )
        self.bn2 = nn.BatchNorm3d(width)
        self.conv3 = nn.Conv3d(width, outside, 1, bias=False)
        self.bn3 = nn.BatchNorm3d(outside)
        self.downsample = (
            nn.Sequential(
                nn.Conv3d(inside, outside, 1, stride=stride, bias=False), nn.BatchNorm3d(outside)
            )
            if shortcut
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """From ``(n, inside, x, y, z)`` to ``(n, 4 width, x, y, z)``, smaller by the stride."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return functional.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """MedicalNet's 3D ResNet-50 without its segmentation head.

    A 7³ stem of stride 2 and max-pooling are followed by four layers of blocks; the third and
    fourth are dilated by 2 and 4 instead of strided, so that features lie 8 voxels apart. Names
    are those of the authors' files.

    Parameters
    ----------
    width
        Channels of the stem; 64 in the paper.
    """

    def __init__(self, width: int = _FULL_WIDTH) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(1, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        inside = width
        for layer in range(4):
            wide = width * 2**layer
            blocks = [
                Bottleneck(
                    inside if first else wide * _EXPANSION,
                    wide,
                    stride=_STRIDES[layer] if first else 1,
                    dilation=_DILATIONS[layer],
                    shortcut=first,
                )
                for first in (block == 0 for block in range(_BLOCKS[layer]))
            ]
            self.add_module(f"layer{layer + 1}", nn.Sequential(*blocks))
            inside = wide * _EXPANSION
        self.size = inside

    def forward(self, x: Tensor) -> Tensor:
        """The last layer's mean over space: from ``(n, 1, x, y, z)`` to ``(n, 32 width)``."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.max_pool3d(y, 3, stride=2, padding=1)
        for layer in range(1, 5):
            y = self.get_submodule(f"layer{layer}")(y)
        return y.mean(dim=(2, 3, 4))


class Med3D:
    """A ResNet-50 of Med3D as a :class:`~generation.evaluate.networks.FeatureNetwork`.

    Every volume is brought to mean 0 and standard deviation 1 by itself, over all its voxels, as
    the evaluation of Pinaya et al. 2022 does. (MedicalNet's own training code takes both over what
    is not 0, and fills the rest with noise.)

    Parameters
    ----------
    net
        With its weights; put into evaluation mode and frozen.
    name
        What to call it.
    pretrained
        Whether its weights were learned.
    """

    def __init__(self, net: ResNet50, *, name: str, pretrained: bool) -> None:
        self._net = net.eval().requires_grad_(False)
        self.name, self.pretrained, self.size = name, pretrained, net.size
        kept = {key: value for key, value in net.state_dict().items() if not _is_ignored(key)}
        self.digest = digest_of("med3d-resnet50", f"z-score per volume, +{_TINY}", kept)

    def features(self, volumes: Tensor) -> Tensor:
        """Features of ``(n, 1, x, y, z)`` volumes: ``(n, size)`` float32, on their device."""
        net, volumes = self._net.to(volumes.device), volumes.float()
        with torch.inference_mode():
            spread, mean = torch.std_mean(volumes, dim=(1, 2, 3, 4), correction=0, keepdim=True)
            return net((volumes - mean) / (spread + _TINY))


def med3d(path: Path, *, name: str = "med3d-resnet50") -> Med3D:
    """Med3D's ResNet-50 with weights of the authors.

    Parameters
    ----------
    path
        ``resnet_50.pth`` or ``resnet_50_23dataset.pth`` of MedicalNet.
    name
        What to call it.

    Raises
    ------
    WeightsError
        The file cannot be read or holds something else.
    """
    net = built(ResNet50)
    state = {key.removeprefix(_PREFIX): tensor for key, tensor in read_state(path).items()}
    where = f"{path} is no ResNet-50 of MedicalNet"
    load_strictly(net, state, where=where, ignored=_is_ignored)
    return Med3D(net, name=name, pretrained=True)


def random_med3d(*, seed: int = 0, width: int = 16) -> Med3D:
    """The same network with random weights: for tests, and for comparisons without a download.

    Random convolutions answer to blur, noise and shape, but know no anatomy. Figures from them
    compare with nothing but figures from the same network; the name says ``random``.

    Parameters
    ----------
    seed
        Of the weights, which are the same on every machine.
    width
        Channels of the stem. 64 is the network of the paper; at 16 features are 512, and a volume
        takes a tenth of the time.
    """
    net = built(lambda: ResNet50(width))
    fill_randomly(net, seed)
    with torch.no_grad():
        # Or each of the sixteen blocks would double the variance.
        for block in (module for module in net.modules() if isinstance(module, Bottleneck)):
            block.bn3.weight.fill_(sum(_BLOCKS) ** -0.5)
    return Med3D(net, name=f"med3d-resnet50-random-w{width}-s{seed}", pretrained=False)


def _is_ignored(key: str) -> bool:
    """The segmentation head, and counters of training steps, which old PyTorch did not keep."""
    return key.startswith(_HEAD) or key.endswith(_COUNTER)
