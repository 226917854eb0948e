"""Features of many volumes, each computed once and kept.

A folder holds one folder a network, named by its digest, and in it files of fixed-size records:
the SHA-256 of a volume's name, its features, and the SHA-256 of both. Every process appends to a
file of its own, so that any number may write at once. A record that was cut short or damaged does
not fit its checksum, and the volume counts as never seen.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor

from generation.errors import EvaluationError
from generation.evaluate.networks import FeatureNetwork

if TYPE_CHECKING:
    from numpy.typing import NDArray

RECORD = "network.json"

_HASH = 32
_SUFFIX = ".features"
_SLACK = 1e-3
"""How far intensities may be out of [0, 1]; interpolation does that."""


class Volumes(Protocol):
    """Volumes by number."""

    def __len__(self) -> int:
        """How many."""
        ...

    def __getitem__(self, index: int) -> Any:
        """One of them: a tensor or array ``(1, x, y, z)`` or ``(x, y, z)``, float, in [0, 1]."""
        ...


def volume_digest(volume: Any) -> str:
    """Hex SHA-256 of a volume's shape and float32 values; a name for what has none.

    Parameters
    ----------
    volume
        Tensor or array ``(1, x, y, z)`` or ``(x, y, z)``.
    """
    array = np.ascontiguousarray(_checked(volume, "the volume").numpy(), dtype="<f4")
    return hashlib.sha256(str(array.shape).encode() + array.tobytes()).hexdigest()


def extract(
    volumes: Volumes,
    names: Sequence[str],
    network: FeatureNetwork,
    folder: Path,
    *,
    batch: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[int]:
    """Compute the features of volumes; those that are kept already are not even looked at.

    Parameters
    ----------
    volumes
        One by one, as they are needed; ``batch`` of them are held at once.
    names
        For each, what stands for its voxels: its id in a data set that never changes, or
        :func:`volume_digest`. A name must never come to mean another volume.
    network
        What computes the features.
    folder
        Where to keep them.
    batch
        How many volumes to compute at once; makes no difference but to speed and memory.
    device
        Where. GPUs may round convolutions to 10 bits (TF32); switch that off for features that
        agree with those of a CPU.

    Yields
    ------
    int
        The number of each volume when its features are kept; safe to stop at any time, also by
        ``kill -9``: what is kept is found again.

    Raises
    ------
    EvaluationError
        Names do not fit the volumes, or something is no volume in [0, 1].
    """
    if len(names) != len(volumes):
        raise EvaluationError(f"expected a name a volume, found {len(names)} for {len(volumes)}")
    if batch < 1:
        raise EvaluationError(f"batch must be at least 1, found {batch}")
    kept = _Kept(folder, network)
    waiting: dict[str, list[int]] = {}
    with contextlib.closing(_Writer(folder, network)) as writer:

        def computed() -> Iterator[int]:
            tensors = {name: _checked(volumes[of[0]], repr(name)) for name, of in waiting.items()}
            for name, row in _compute(tensors, network, device):
                kept.add(name, *writer.append(name, row))
            yield from (index for indices in waiting.values() for index in indices)
            waiting.clear()

        for index, name in enumerate(names):
            if name in kept:
                yield index
                continue
            waiting.setdefault(name, []).append(index)
            if len(waiting) == batch:
                yield from computed()
        yield from computed()


def read(names: Sequence[str], network: FeatureNetwork, folder: Path) -> NDArray[np.float32]:
    """Features kept by :func:`extract`.

    Parameters
    ----------
    names
        Of the volumes, in the order wanted.
    network
        What computed them.
    folder
        Where they are.

    Returns
    -------
    ndarray
        ``(n, size)``.

    Raises
    ------
    EvaluationError
        Features of some are not there.
    """
    return _Kept(folder, network).rows(names)


class _Kept:
    """Which features a folder holds, and where; each record is checked once, here."""

    def __init__(self, folder: Path, network: FeatureNetwork) -> None:
        self._network, self._folder = network, folder
        self._places: dict[bytes, tuple[Path, int]] = {}
        length = _length(network)
        for path in sorted(_home(folder, network).glob(f"*{_SUFFIX}")):
            with path.open("rb") as file:
                place = 0
                while len(record := file.read(length)) == length:
                    if hashlib.sha256(record[:-_HASH]).digest() == record[-_HASH:]:
                        self._places[record[:_HASH]] = path, place
                    place += length

    def __contains__(self, name: str) -> bool:
        return _key(name) in self._places

    def add(self, name: str, path: Path, place: int) -> None:
        self._places[_key(name)] = path, place

    def rows(self, names: Sequence[str]) -> NDArray[np.float32]:
        lacking = [name for name in names if name not in self]
        if lacking:
            raise EvaluationError(
                f"{self._folder} lacks {self._network.name} features of {len(lacking)} of "
                f"{len(names)} volumes, the first {lacking[0]!r}; extract them first"
            )
        found = np.empty((len(names), self._network.size), dtype="<f4")
        by_file: dict[Path, list[tuple[int, int]]] = {}
        for row, name in enumerate(names):
            path, place = self._places[_key(name)]
            by_file.setdefault(path, []).append((row, place))
        for path, places in by_file.items():
            with path.open("rb") as file:
                for row, place in places:
                    file.seek(place + _HASH)
                    found[row] = np.frombuffer(file.read(found.strides[0]), "<f4")
        return found.astype(np.float32, copy=False)


class _Writer:
    """Appends records to a file of its own, made when there is a first one."""

    def __init__(self, folder: Path, network: FeatureNetwork) -> None:
        self._network, self._home = network, _home(folder, network)
        self._path = self._home / f"{uuid.uuid4().hex}{_SUFFIX}"
        self._file: BinaryIO | None = None

    def append(self, name: str, row: NDArray[np.float32]) -> tuple[Path, int]:
        if self._file is None:
            self._describe()
            self._file = self._path.open("xb")
        place = self._file.tell()
        record = _key(name) + row.astype("<f4").tobytes()
        self._file.write(record + hashlib.sha256(record).digest())
        self._file.flush()
        return self._path, place

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _describe(self) -> None:
        """Say whose features these are, for people."""
        self._home.mkdir(parents=True, exist_ok=True)
        facts = {key: getattr(self._network, key) for key in ("name", "digest", "size")}
        facts["pretrained"] = self._network.pretrained
        scratch = self._path.with_suffix(".partial")
        scratch.write_text(json.dumps(facts, indent=2))
        os.replace(scratch, self._home / RECORD)


def _compute(
    tensors: Mapping[str, Tensor], network: FeatureNetwork, device: torch.device | str
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """The features of each of some volumes, computed at once."""
    if not tensors:
        return
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(sorted({str(tuple(t.shape[1:])) for t in tensors.values()}))
        raise EvaluationError(f"volumes of one batch have several shapes: {shapes}; use batch=1")
    stack = torch.stack(list(tensors.values()))
    rows = network.features(stack.to(device)).float().cpu().numpy()
    for name, row in zip(tensors, rows, strict=True):
        if not np.isfinite(row).all():
            raise EvaluationError(f"{network.name} features of {name!r} are not finite")
        yield name, row


def _checked(volume: Any, what: str) -> Tensor:
    """A volume as a ``(1, x, y, z)`` float32 tensor on the CPU."""
    tensor = torch.as_tensor(volume).detach().cpu()
    shape = tuple(tensor.shape)
    if not (len(shape) == 3 or (len(shape) == 4 and shape[0] == 1)) or 0 in shape:
        raise EvaluationError(f"expected {what} to be (1, x, y, z) or (x, y, z), found {shape}")
    if not tensor.is_floating_point():
        raise EvaluationError(
            f"expected {what} to be real numbers in [0, 1], found {tensor.dtype}; scale it"
        )
    low, high = tensor.min().item(), tensor.max().item()
    if math.isnan(low):
        raise EvaluationError(f"expected {what} to lie in [0, 1], found NaN voxels; leave it out")
    if not -_SLACK <= low <= high <= 1 + _SLACK:
        raise EvaluationError(
            f"expected {what} to lie in [0, 1], found [{low:g}, {high:g}]; scale its intensities"
        )
    return tensor.float().reshape(1, *shape[-3:])


def _home(folder: Path, network: FeatureNetwork) -> Path:
    return folder / network.digest


def _key(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _length(network: FeatureNetwork) -> int:
    return 2 * _HASH + 4 * network.size
