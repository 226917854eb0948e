"""What a feature network is, and what those of several origins are made with."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from generation.checkpoints import some
from generation.errors import WeightsError
from generation.train.latents import fingerprint

_Module = TypeVar("_Module", bound=nn.Module)


class FeatureNetwork(Protocol):
    """What turns volumes into feature vectors.

    Attributes
    ----------
    name
        What it is called; of random weights it says ``random``.
    digest
        Hex SHA-256 of its architecture, weights and preprocessing.
    size
        Length of a feature vector.
    pretrained
        Whether its weights were learned. Figures from random weights compare with no others and
        must be labelled.
    """

    name: str
    digest: str
    size: int
    pretrained: bool

    def features(self, volumes: Tensor) -> Tensor:
        """Features of ``(n, 1, x, y, z)`` volumes in [0, 1]: ``(n, size)``, on their device.

        A volume's features depend on it alone, not on what else is in the batch.
        """
        ...


def digest_of(architecture: str, preprocessing: str, state: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 that names a feature network: what it is, what it does first, its weights."""
    told = json.dumps([architecture, preprocessing, fingerprint(state)])
    return hashlib.sha256(told.encode()).hexdigest()


def load_strictly(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    where: str,
    ignored: Callable[[str], bool],
) -> None:
    """Give a network its weights: each of them there, of its shape, and no others.

    Parameters
    ----------
    module
        Is changed.
    state
        Tensors under the network's names.
    where
        What the error calls them.
    ignored
        Names that may be missing from ``state`` or be too many there.

    Raises
    ------
    WeightsError
        Tensors are missing, unexpected or of another shape; the message names them.
    """
    expected = {k: tuple(t.shape) for k, t in module.state_dict().items() if not ignored(k)}
    found = {key: tensor for key, tensor in state.items() if not ignored(key)}
    problems = {
        "missing": [key for key in expected if key not in found],
        "unexpected": [key for key in found if key not in expected],
        "of another shape": [
            f"{key} {tuple(found[key].shape)} instead of {shape}"
            for key, shape in expected.items()
            if key in found and tuple(found[key].shape) != shape
        ],
    }
    told = [f"{len(keys)} {what} ({some(keys)})" for what, keys in problems.items() if keys]
    if told:
        raise WeightsError(f"{where}: of {len(expected)} tensors {'; '.join(told)}")
    module.load_state_dict(found, strict=False)


def built(make: Callable[[], _Module]) -> _Module:
    """A network whose weights are given later; what it starts with moves no global generator."""
    with torch.random.fork_rng(devices=[]):
        return make()


def fill_randomly(module: nn.Module, seed: int) -> None:
    """Random weights that are the same bytes on every machine.

    Weights of two or more axes are drawn from U(-b, b) with b = sqrt(6 / fan-in) (He et al. 2015,
    in its uniform form), which keeps the variance through convolutions and rectifiers. Biases are
    0, and what else has one axis stays as it is. What is drawn are the leading 24 bits of Philox's
    raw integers, which no library or processor rounds.

    Parameters
    ----------
    module
        Is changed.
    seed
        Of all its weights together.
    """
    bits = np.random.Philox(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            if parameter.ndim < 2:
                continue
            drawn = (bits.random_raw(parameter.numel()) >> np.uint64(40)).astype(np.float32)
            bound = np.float32(math.sqrt(6 / parameter[0].numel()))
            values = (drawn * np.float32(2**-23) - 1) * bound
            parameter.copy_(torch.from_numpy(values).view(parameter.shape))
