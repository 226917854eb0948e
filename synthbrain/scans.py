"""Raw scans: finding them, reading them, and making volumes of them one at a time.

Every scan becomes a record in a folder: ``<key>.json``, written last, ``<key>.shard`` and
``<key>.jpg``. The key is the hash of the file's bytes and of the settings, so what is done is never
done again, and what was killed half-way leaves nothing that counts.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from generation.preprocess import VERSION, ScanError, check, check_shape, prepare
from generation.unires import ReconstructionError, reconstruct
from synthbrain.files import write
from synthbrain.header import Geometry
from synthbrain.nifti import gunzip
from synthbrain.quantise import Array, quantise
from synthbrain.scan_report import Record, picture

_SUFFIXES = (".nii", ".nii.gz")
_MOST_BYTES = 2**32


@dataclass(frozen=True)
class Scan:
    """A raw file.

    Parameters
    ----------
    path
        Where it is.
    id
        Id of its row: the file's name without ``_T1w`` and suffix.
    """

    path: Path
    id: str

    @property
    def subject(self) -> str:
        """Its participant, as the table of covariates calls them."""
        found = re.match(r"sub-[A-Za-z0-9]+", self.id)
        return found[0] if found else f"sub-{self.id}"


def find_scans(raw: Path) -> list[Scan]:
    """The NIfTI files below a folder; of a BIDS dataset, its T1w files; never derivatives."""
    files = [
        path
        for path in sorted(raw.rglob("*.nii*"))
        if path.name.endswith(_SUFFIXES) and path.is_file()
        and not any(part == "derivatives" or part.startswith(".")
                    for part in path.relative_to(raw).parts)
    ]  # fmt: skip
    bids = [p for p in files if p.parent.name == "anat" and p.name.startswith("sub-")]
    t1w = [path for path in bids if re.search(r"_T1w\.nii(\.gz)?$", path.name)]
    return [Scan(path, _id(path)) for path in (t1w if bids else files)]


def prepare_file(folder: Path, geometry: Geometry, unires: str, scan: Scan) -> Record:
    """Prepare one file, or find its record; never raises for what is wrong with the file.

    Parameters
    ----------
    folder
        Where records are kept.
    geometry
        Grid of the volume.
    unires
        Version of UniRes that reconstructs the scan first; empty to do without.
    scan
        The file.

    Raises
    ------
    StoreError
        The folder cannot be written to.
    """
    same: dict[str, Any] = {"id": scan.id, "source": str(scan.path)}
    try:
        data = scan.path.read_bytes()
    except OSError as error:
        return Record(**same, reason=f"cannot be read: {error.strerror}", measures={})
    key = _key(data, geometry, unires)
    found = _recorded(folder / key)
    if found is None:
        found = _prepare(data, geometry, unires, folder / key)
        write(folder / f"{key}.json", json.dumps(found, indent=2).encode())
    return Record(**same, key=key, **found)


def is_done(folder: Path, geometry: Geometry, unires: str, scan: Scan) -> bool:
    """Whether a file has its record; it is read to find out.

    Parameters
    ----------
    folder, geometry, unires, scan
        As in :func:`prepare_file`.
    """
    try:
        data = scan.path.read_bytes()
    except OSError:
        return False
    return _recorded(folder / _key(data, geometry, unires)) is not None


def load(data: bytes) -> tuple[Array, Array]:
    """Voxels ``(x, y, z[, 1])`` and affine ``(4, 4)`` out of a NIfTI file's bytes, gzipped or not.

    Raises
    ------
    ScanError
        Damaged, cut short, of a shape or type no scan has, or without an orientation.
    """
    import nibabel

    try:
        plain = gunzip(data, _MOST_BYTES) if data[:2] == b"\x1f\x8b" else data
        kind = (
            nibabel.Nifti2Image if plain[:2] in (b"\x1c\x02", b"\x02\x1c") else nibabel.Nifti1Image
        )
        image: Any = kind.from_stream(io.BytesIO(plain))
        check_shape(image.shape)
        if not (int(image.header["sform_code"]) or int(image.header["qform_code"])):
            raise ScanError("states no orientation (sform and qform code 0); repair the header")
        if image.get_data_dtype().kind not in "biuf":
            raise ScanError(f"holds {image.get_data_dtype()}, expected plain numbers")
        return np.asarray(image.dataobj, dtype=np.float32), image.affine
    except ScanError:
        raise
    except Exception as error:
        line = " ".join(str(error).split()) or type(error).__name__
        raise ScanError(f"cannot be read ({line}); fetch the file again") from None


def _prepare(data: bytes, geometry: Geometry, unires: str, stem: Path) -> dict[str, Any]:
    """Measures of a scan and why it is left out, if it is; its volume and picture are written."""
    try:
        voxels, affine = load(data)
        if unires:
            voxels, affine = reconstruct(check(voxels, affine), affine)
        done = prepare(voxels, affine, geometry.shape, geometry.affine)
    except (ScanError, ReconstructionError) as error:
        return {"reason": str(error), "measures": {}}
    write(stem.with_suffix(".jpg"), picture(done.volume, geometry))
    reason = done.measures.problem()
    if reason is None:
        from synthbrain.shard import ShardLayout

        layout = ShardLayout(geometry.shape, geometry.chunks, geometry.dtype)
        write(stem.with_suffix(".shard"), layout.encode(quantise(done.volume, geometry)))
    return {"reason": reason or "", "measures": asdict(done.measures)}


def _recorded(stem: Path) -> dict[str, Any] | None:
    """What is written of a scan; None where it is not done, or its volume is gone."""
    try:
        found = json.loads(stem.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return None
    return found if found["reason"] or stem.with_suffix(".shard").exists() else None


def _key(data: bytes, geometry: Geometry, unires: str) -> str:
    """Name of what comes of a file: a hash of its bytes, of the code and of the grid."""
    code = f"prepare {VERSION}" + (f" UniRes {unires}" if unires else "")
    digest = hashlib.sha256(f"{code}\n{geometry.model_dump_json()}\n".encode())
    digest.update(data)
    return digest.hexdigest()[:32]


def _id(path: Path) -> str:
    """A file's name as an id: letters, digits, ``-`` and ``_``, a letter or digit first."""
    stem = re.sub(r"(_T1w)?\.nii(\.gz)?$", "", path.name)
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).lstrip("-_") or "scan"
