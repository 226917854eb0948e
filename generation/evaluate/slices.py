"""2.5-D features: a network of photographs looks at slices along three axes.

Self-supervised networks rank generated images as people do, Inception does not (Stein et al. 2023,
"Exposing flaws of generative model evaluation metrics and their unfair treatment of diffusion
models"). MONAI's 2.5-D FID (tutorials, MAISI) averages over three axes the distance of the features
of single slices. Here a volume has one vector: the mean over its slices, axis after axis, so that
one distance is between volumes, and neighbours are volumes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from generation.checkpoints import read_state
from generation.errors import EvaluationError
from generation.evaluate.networks import built, digest_of, fill_randomly, load_strictly

_MEAN = (0.485, 0.456, 0.406)
_DEVIATION = (0.229, 0.224, 0.225)
_VIT = "vit_small_patch14_dinov2"
_VIT_WIDTH = 384
_MASK = "mask_token"
"""What hides patches in training; the authors' file has it, timm's has not."""


class SliceNetwork:
    """A 2-D network on slices as a :class:`~generation.evaluate.networks.FeatureNetwork`.

    Of each axis, slices are taken from the middle half, evenly spaced. They are padded with 0 to
    a square as wide as the volume's longest axis, so that all keep one scale, resized if that is
    not the side the network wants (at 160 x 224 x 160 voxels and side 224 it is), repeated over
    three channels, and normalised with ImageNet's mean and standard deviation. Features of one
    axis are means over its slices; axes follow each other, sagittal, coronal, axial: entries
    ``[a * width : (a + 1) * width]`` are those of axis ``a``.

    Parameters
    ----------
    backbone
        From ``(n, 3, side, side)`` to ``(n, width)``, a class token for one; put into evaluation
        mode and frozen.
    width
        Length of what it gives.
    architecture
        What it is, for the digest.
    name
        What to call it.
    pretrained
        Whether its weights were learned.
    slices
        How many of each axis.
    side
        Of the squares, in pixels.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        width: int,
        architecture: str,
        name: str,
        pretrained: bool,
        slices: int = 8,
        side: int = 224,
    ) -> None:
        self._backbone = backbone.eval().requires_grad_(False)
        self._slices, self._side = slices, side
        self.name, self.pretrained, self.size = name, pretrained, 3 * width
        self.digest = digest_of(
            architecture,
            f"2.5-D: {slices} slices of the middle half of 3 axes, padded to the longest axis, "
            f"bilinear to {side}, mean {_MEAN}, deviation {_DEVIATION}, mean over slices",
            backbone.state_dict(),
        )

    def features(self, volumes: Tensor) -> Tensor:
        """Features of ``(n, 1, x, y, z)`` volumes in [0, 1]: ``(n, size)``, on their device."""
        backbone = self._backbone.to(volumes.device)
        with torch.inference_mode():
            return torch.stack([self._of_one(backbone, volume) for volume in volumes[:, 0].float()])

    def _of_one(self, backbone: nn.Module, volume: Tensor) -> Tensor:
        per_axis = [backbone(self._pictures(volume, axis)).mean(dim=0) for axis in range(3)]
        return torch.cat(per_axis)

    def _pictures(self, volume: Tensor, axis: int) -> Tensor:
        """Slices across an axis as the backbone takes them: ``(slices, 3, side, side)``."""
        length, longest = volume.shape[axis], max(volume.shape)
        steps = (torch.arange(self._slices) + 0.5) / (2 * self._slices) + 0.25
        places = (steps * length).long().to(volume.device)
        taken = volume.index_select(axis, places).movedim(axis, 0)
        tall, wide = (longest - extent for extent in taken.shape[1:])
        edges = (wide // 2, wide - wide // 2, tall // 2, tall - tall // 2)
        squares = functional.pad(taken, edges)[:, None]
        if longest != self._side:
            squares = functional.interpolate(
                squares, (self._side,) * 2, mode="bilinear", antialias=True, align_corners=False
            )
        mean, deviation = (volume.new_tensor(x).view(3, 1, 1) for x in (_MEAN, _DEVIATION))
        return (squares - mean) / deviation


def dinov2(path: Path, *, slices: int = 8) -> SliceNetwork:
    """Class tokens of DINOv2's ViT-S/14 (Oquab et al. 2023), 3 x 384 of them.

    Parameters
    ----------
    path
        Its weights in timm's layout, such as ``model.safetensors`` of
        ``timm/vit_small_patch14_dinov2.lvd142m`` on the Hugging Face Hub, or the authors'
        ``dinov2_vits14_pretrain.pth``. Position embeddings are resampled from 37 x 37 patches to
        16 x 16, as timm does it.
    slices
        How many of each axis.

    Raises
    ------
    WeightsError
        The file cannot be read or holds something else.
    EvaluationError
        timm is not installed.
    """
    net = _vit()
    where = f"{path} is no DINOv2 ViT-S/14"
    load_strictly(net, read_state(path), where=where, ignored=_is_ignored)
    return _sliced(net, "dinov2-vits14", slices, pretrained=True)


def random_dinov2(*, seed: int = 0, slices: int = 8) -> SliceNetwork:
    """The same network with random weights, for tests; the name says ``random``.

    Parameters
    ----------
    seed
        Of the weights.
    slices
        How many of each axis.

    Raises
    ------
    EvaluationError
        timm is not installed.
    """
    net = _vit()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("gamma"):  # timm starts the blocks' shares near 0
                parameter.fill_(1)
    fill_randomly(net, seed)
    return _sliced(net, f"dinov2-vits14-random-s{seed}", slices, pretrained=False)


def _vit() -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise EvaluationError(
            f"DINOv2 needs the package timm ({error}); install it with "
            "`pip install 'synthbrain[dinov2]'`, or use Med3D's features"
        ) from None
    net: nn.Module = built(lambda: timm.create_model(_VIT, pretrained=False, num_classes=0))
    return net


def _sliced(net: nn.Module, name: str, slices: int, *, pretrained: bool) -> SliceNetwork:
    side = 224
    net.set_input_size(img_size=(side, side))  # type: ignore[operator]
    return SliceNetwork(
        net,
        width=_VIT_WIDTH,
        architecture=_VIT,
        name=name,
        pretrained=pretrained,
        slices=slices,
        side=side,
    )


def _is_ignored(key: str) -> bool:
    return key == _MASK
