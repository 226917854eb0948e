"""A small set of volumes, laid out as the published one is: a tar, its table, a header."""

from __future__ import annotations

import gzip
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np

from synthbrain.header import Archive, Geometry, Header, Licence
from synthbrain.manifest import Manifest
from synthbrain.quantise import quantise

SHAPE = Geometry(shape=(24, 32, 24), chunks=(12, 16, 12))
MEMBER = "SET/rawdata/{id}/anat/{id}_T1w.nii.gz"
TABLE = "SET/participants.tsv"


@dataclass(frozen=True)
class Released:
    """The tar, the folder of its manifest (a header without rows), and its volumes."""

    tar: Path
    manifest: Path
    values: dict[str, np.ndarray]
    geometry: Geometry

    def stored(self, id: str) -> np.ndarray:
        return quantise(self.values[id], self.geometry)

    def open(self) -> Manifest:
        return Manifest.open(self.manifest)

    def with_sources(self, sources) -> Path:
        """The header, naming sources too."""
        header = self.open().header.model_copy(update={"sources": sources})
        (self.manifest / "manifest.json").write_text(header.text())
        return self.manifest


def nifti(values: np.ndarray, affine, *, packed: bool = True) -> bytes:
    data = nibabel.Nifti1Image(values, np.array(affine)).to_bytes()
    return gzip.compress(data, 1, mtime=0) if packed else data


def table(ids) -> bytes:
    lines = ["participant_id\tage\tsex\tventricle_vol\tbrain_vol"]
    for number, id in enumerate(ids):
        sex = "FM"[number % 2]
        lines.append(f"{id}\t{45 + number % 37}\t{sex}\t{20000 + 100 * number}\t{1400000 + number}")
    return "\n".join(lines).encode() + b"\n"


def add(tar: tarfile.TarFile, path: str, data: bytes) -> None:
    info = tarfile.TarInfo(path)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def release(
    folder: Path,
    n: int,
    *,
    geometry: Geometry = SHAPE,
    table_first: bool = True,
    extra: dict[str, bytes] | None = None,
    licence: str | None = "CC-BY-4.0",
) -> Released:
    """Write ``n`` volumes in an order that is not that of their ids."""
    rng = np.random.default_rng(n)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "SET.tar"
    ids = [f"sub-{number:06d}" for number in range(n)]
    values: dict[str, np.ndarray] = {}
    with tarfile.open(path, "w") as tar:
        root = tarfile.TarInfo("SET")
        root.type = tarfile.DIRTYPE
        tar.addfile(root)
        about = (
            b'{"Name": "a set"' + (f', "License": "{licence}"' if licence else "").encode() + b"}"
        )
        add(tar, "SET/dataset_description.json", about)
        if table_first:
            add(tar, TABLE, table(ids))
        for number in rng.permutation(n):
            id = ids[number]
            values[id] = rng.random(geometry.shape, dtype=np.float32)
            add(tar, MEMBER.format(id=id), nifti(values[id], geometry.affine))
        if not table_first:
            add(tar, TABLE, table(ids))
        for name, data in (extra or {}).items():
            add(tar, name, data)
    manifest = folder / "tiny-set"
    manifest.mkdir(exist_ok=True)
    (manifest / "manifest.json").write_text(header(path, geometry).text())
    return Released(path, manifest, values, geometry)


def header(tar: Path, geometry: Geometry = SHAPE) -> Header:
    """The header of such a set, whose rows are in its tar."""
    archive = Archive(
        name=tar.name,
        size=tar.stat().st_size,
        member=MEMBER,
        participants=TABLE,
        column_aliases={
            "id": ("participant_id",),
            "ventricular_volume": ("ventricle_vol",),
            "brain_volume": ("brain_vol",),
        },
    )
    licence = Licence(status="unknown")
    return Header(name="tiny-set", rows=0, licence=licence, geometry=geometry, archive=archive)
