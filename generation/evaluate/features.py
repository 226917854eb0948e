"""Feature networks: which are published, and fetching their weights on request."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from generation.errors import WeightsError
from generation.evaluate.med3d import med3d, random_med3d
from generation.evaluate.networks import FeatureNetwork
from generation.evaluate.slices import dinov2
from generation.hub import Published, RemoteFile, commit_of, fetch

RECORD = "source.json"


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
