"""Latents as a denoiser trains on them: mean and standard deviation, kept as files.

A folder holds one safetensors file a volume (``mean`` and ``sigma`` ``(c, x, y, z)``, ``condition``
``(4,)``, float32) and ``latents.json``, which says whose they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from generation.errors import TrainingError
from generation.train.loop import CONDITION, IMAGE, MEAN, SPREAD, Data

RECORD = "latents.json"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Latents:
    """Kept latents, to train on.

    Parameters
    ----------
    folder
        Where they are.
    names
        Which, in this order.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, list(names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Mean and standard deviation of a latent, and the covariates if there are any.

        Raises
        ------
        TrainingError
            The file is gone or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = _path(self.folder, self.names[index])
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"cannot read {path} ({error}); delete it and run again, it is then encoded again"
            ) from None


def encode(
    volumes: Data, names: Sequence[str], autoencoder: nn.Module, folder: Path, device: torch.device
) -> Iterator[str]:
    """Keep the latents of volumes; those that are kept already are passed over.

    Parameters
    ----------
    volumes
        Samples with ``image`` and, of conditional data, ``condition``.
    names
        What each is called; its file's name.
    autoencoder
        MONAI's ``AutoencoderKL``, float32.
    folder
        Where to keep them.
    device
        Where to encode.

    Yields
    ------
    str
        The name of each volume when its latent is there; safe to stop at any time.

    Raises
    ------
    TrainingError
        The folder holds latents of another autoencoder or cannot be written to, or a name cannot
        be a file's.
    """
    _claim(folder, autoencoder)
    model: Any = autoencoder.to(device).eval()
    for index, name in enumerate(names):
        path = _path(folder, name)
        if not path.is_file():
            sample = volumes[index]
            with torch.no_grad():
                mean, spread = model.encode(sample[IMAGE][None].to(device))
            kept = {MEAN: mean[0].float().cpu(), SPREAD: spread[0].float().cpu()}
            if CONDITION in sample:
                kept[CONDITION] = sample[CONDITION]
            _write(path, kept)
        yield name


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 of a network's weights."""
    sha = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu()
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(
            value.flatten().view(torch.uint8).numpy().tobytes()
            if value.ndim
            else repr(value).encode()
        )
    return sha.hexdigest()


def _claim(folder: Path, autoencoder: nn.Module) -> None:
    digest, record = fingerprint(autoencoder.state_dict()), folder / RECORD
    folder.mkdir(parents=True, exist_ok=True)
    if not record.exists():
        scratch = record.with_suffix(f".{os.getpid()}.partial")
        scratch.write_text(json.dumps({"autoencoder": digest}))
        os.replace(scratch, record)
    try:
        found = json.loads(record.read_text())["autoencoder"]
    except (ValueError, KeyError, TypeError):
        found = "none that can be read"
    if found != digest:
        raise TrainingError(
            f"{folder} holds latents of another autoencoder ({str(found)[:8]}, this one is "
            f"{digest[:8]}); choose another folder, or delete this one"
        )


def _path(folder: Path, name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise TrainingError(f"{name!r} cannot name a file: use letters, digits, '.', '_' and '-'")
    return folder / f"{name}.safetensors"


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    scratch = path.with_suffix(f".{os.getpid()}.partial")
    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, scratch)
        os.replace(scratch, path)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"cannot write {path} ({error}); latents before it are kept: make room and run again"
        ) from None
    finally:
        scratch.unlink(missing_ok=True)
