"""Feature networks: what they are, which are published, and fetching their weights on request."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from generation.checkpoints import some
from generation.errors import WeightsError
from generation.hub import Published, RemoteFile, commit_of, fetch
from generation.train.latents import fingerprint

RECORD = "source.json"

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


@dataclass(frozen=True)
class _Source:
    """Where weights of a feature network are published."""

    repo: str
    file: str
    licence: str
    citation: str


_MED3D = "Chen, Ma and Zheng 2019, Med3D: Transfer Learning for 3D Medical Image Analysis"

SOURCES: Mapping[str, _Source] = {
    "med3d-resnet50": _Source(
        "TencentMedicalNet/MedicalNet-Resnet50", "resnet_50.pth", "MIT", _MED3D
    ),
    "med3d-resnet50-23": _Source(
        "TencentMedicalNet/MedicalNet-Resnet50", "resnet_50_23dataset.pth", "MIT", _MED3D
    ),
    "dinov2-vits14": _Source(
        "timm/vit_small_patch14_dinov2.lvd142m",
        "model.safetensors",
        "Apache-2.0",
        "Oquab et al. 2023, DINOv2: Learning Robust Visual Features without Supervision",
    ),
}
"""Published weights of feature networks, by name. Their authors give no checksums.

The code of Pinaya et al. 2022 measures its FID with ``med3d-resnet50-23``, trained on 23 data sets.
"""


def load(name: str, folder: Path) -> FeatureNetwork:
    """A feature network whose weights were fetched before, or one of random weights.

    Parameters
    ----------
    name
        One of :data:`SOURCES`, or ``"random"``: :func:`generation.evaluate.med3d.random_med3d`,
        which needs no file.
    folder
        Where :func:`pull` put the weights.

    Raises
    ------
    WeightsError
        Unknown name, the weights are not there, or not those that were fetched.
    """
    from generation.evaluate.med3d import med3d, random_med3d
    from generation.evaluate.slices import dinov2

    if name == "random":
        return random_med3d()
    source = _source(name)
    home = folder / name
    path, pinned = home / source.file, _pinned(home)
    if pinned is None or not path.is_file():
        raise WeightsError(
            f"no weights {name!r} in {folder}; fetch them with `synthbrain weights pull {name}`"
        )
    _check(path, pinned, home)
    return dinov2(path) if name.startswith("dinov2") else med3d(path, name=name)


def pull(name: str, folder: Path, *, force: bool = False) -> Path:
    """Fetch published weights of a feature network; this alone downloads.

    The SHA-256 of the first file fetched is recorded beside it, and every later one must have it.

    Parameters
    ----------
    name
        One of :data:`SOURCES`.
    folder
        Where to put them, in a folder of that name.
    force
        Fetch again what is there.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    WeightsError
        Unknown name, the Hub cannot be reached or refuses, or the file is not the one fetched
        first. What was there before is untouched.
    """
    source = _source(name)
    home = folder / name
    path, pinned = home / source.file, _pinned(home)
    if pinned is not None and path.is_file() and not force:
        _check(path, pinned, home)
        return path
    remote = RemoteFile(source.file)
    fetched = fetch(_entry(name, source, remote), remote, force=force)
    digest = _sha256(fetched)
    if pinned is not None:
        _check(fetched, pinned, home)
    home.mkdir(parents=True, exist_ok=True)
    scratch = home / f"{source.file}.{os.getpid()}.partial"
    try:
        shutil.copyfile(fetched, scratch)
        os.replace(scratch, path)
        facts = {"repo": source.repo, "commit": commit_of(fetched), "sha256": digest}
        scratch.write_text(json.dumps(facts, indent=2))
        os.replace(scratch, home / RECORD)
    finally:
        scratch.unlink(missing_ok=True)
    return path


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


def _source(name: str) -> _Source:
    if name not in SOURCES:
        raise WeightsError(
            f"unknown feature network {name!r}; there are {', '.join(SOURCES)} and random"
        )
    return SOURCES[name]


def _entry(name: str, source: _Source, remote: RemoteFile) -> Published:
    """A source as the Hub's client takes it; feature networks have no target."""
    return Published(
        name=name,
        preset="",
        target="",
        repo=source.repo,
        files={"features": remote},
        use="Research.",
        licence=source.licence,
        citation=source.citation,
    )


def _pinned(home: Path) -> str | None:
    """The SHA-256 recorded when weights were first fetched, if they were."""
    record = home / RECORD
    try:
        return str(json.loads(record.read_text())["sha256"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{record} is damaged ({error}); delete {home} and fetch again"
        ) from None


def _check(path: Path, pinned: str, home: Path) -> None:
    found = _sha256(path)
    if found != pinned:
        raise WeightsError(
            f"{path} has SHA-256 {found[:12]}…, expected {pinned[:12]}… as first fetched: damaged "
            f"or replaced; delete {home} and fetch again if you trust what is published now"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
