"""From a folder of raw T1w scans to a manifest and its stored volumes.

Every scan becomes a record in ``scans/``: ``<key>.json``, written last, ``<key>.shard`` and
``<key>.jpg``. The key is the hash of the file's bytes and of the settings, so what is done is never
done again, and what was killed half-way leaves nothing that counts. Manifest, store and report are
put together from the records.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from generation.covariates import NAMES
from generation.preprocess import VERSION, ScanError, check_shape, prepare, template
from synthbrain.errors import StoreError, SynthBrainError, UsageError
from synthbrain.header import Geometry, Header, Licence
from synthbrain.nifti import gunzip
from synthbrain.progress import track
from synthbrain.quantise import Array, quantise
from synthbrain.rows import PUBLISHED, make_table, split_of
from synthbrain.sheet import PLANES, cut

if TYPE_CHECKING:
    import pandas as pd

ALIASES = {
    "id": ("participant_id",),
    "sex": ("gender",),
    "age": ("age_years",),
    "ventricular_volume": ("ventricular_mm3",),
    "brain_volume": ("brain_mm3",),
}
"""Accepted headers of the table of covariates; see :mod:`synthbrain.participants`."""

_SUFFIXES = (".nii", ".nii.gz")
_MOST_BYTES = 2**32
_SLICES = (2.0, -18.0, 16.0)
"""Where the report cuts the sagittal, coronal and axial plane, mm."""
_EDGE = (122, 190, 255)


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


@dataclass(frozen=True, kw_only=True)
class Record:
    """What became of a scan.

    Parameters
    ----------
    id, source
        The scan's id, and the path of its file.
    key
        Name of its files in ``scans/``; empty where the file was not read.
    reason
        Why it is left out; empty where it is not.
    measures
        :class:`generation.preprocess.Measures`; empty where it did not come so far.
    """

    id: str
    source: str
    key: str = ""
    reason: str = ""
    measures: dict[str, float]


@dataclass(frozen=True, eq=False)
class Preparation:
    """Raw scans, and the folder that what they become goes to.

    Parameters
    ----------
    raw
        Folder of ``.nii`` and ``.nii.gz`` files; of a BIDS dataset only ``*_T1w`` files are taken.
    out
        Folder to write: ``manifest/``, ``store/``, ``scans/``, ``report.html``, ``report.json``.
    participants
        Table with participant_id, sex, age, ventricular and brain volume; by default
        ``participants.tsv`` in ``raw``.
    unconditional
        Without covariates: the rows' are placeholders, and the header says ``conditional: false``.
    geometry
        Grid of the volumes.

    Raises
    ------
    UsageError
        Nothing to prepare, no table of covariates, or ``out`` lies inside ``raw``.
    ManifestError
        A table that is none.

    Examples
    --------
    >>> job = Preparation(Path("raw"), Path("ready"), unconditional=True)  # doctest: +SKIP
    >>> job.run(jobs=4)  # doctest: +SKIP
    """

    raw: Path
    out: Path
    participants: Path | None = None
    unconditional: bool = False
    geometry: Geometry = field(default_factory=Geometry)

    def __post_init__(self) -> None:
        if not self.raw.is_dir():
            raise UsageError(f"{self.raw} is not a folder; give the folder of the raw scans")
        if self.out.resolve().is_relative_to(self.raw.resolve()):
            raise UsageError(f"{self.out} lies inside {self.raw}; choose a folder outside of it")
        if self.unconditional and self.participants:
            raise UsageError("give --participants or --unconditional, not both")
        if not self.scans:
            raise UsageError(f"found no .nii or .nii.gz file below {self.raw}; give another folder")
        if self._covariates is not None and not any(map(self._is_known, self.scans)):
            raise UsageError(
                f"no scan has a complete row in {self._table}, {self.scans[0].subject!r} first; "
                f"it needs participant_id, {', '.join(NAMES)} (or use --unconditional)"
            )

    @cached_property
    def scans(self) -> list[Scan]:
        """The files to prepare, by path."""
        return find_scans(self.raw)

    def todo(self) -> list[Scan]:
        """Scans that have no record yet; every file is read to find out."""
        return [scan for scan in self._usable() if not self._kept(scan)]

    def run(self, *, jobs: int = 1, progress: bool = True) -> list[Record]:
        """Prepare what is not prepared yet, then write manifest, store and report.

        Parameters
        ----------
        jobs
            Processes, each with one thread and up to 2 GB of memory; a script that asks for
            several must do so below ``if __name__ == "__main__":``.
        progress
            Show a progress bar on standard error.

        Returns
        -------
        list
            One record a scan; those with a reason were left out.

        Raises
        ------
        UsageError
            ``jobs`` is less than 1.
        SynthBrainError
            SimpleITK is missing, or no scan could be used; then only the report is written.
        StoreError
            The folder cannot be written to.
        """
        require_itk()
        if jobs < 1:
            raise UsageError(f"jobs must be at least 1, found {jobs}")
        (self.out / "scans").mkdir(parents=True, exist_ok=True)
        usable = self._usable()
        done = track(self._records(usable, jobs), total=len(usable), what="preparing",
                     show=progress)  # fmt: skip
        records = sorted([*done, *self._refused()], key=lambda record: record.source)
        write_report(self.out, records)
        if all(record.reason for record in records):
            raise SynthBrainError(f"none of {len(records):,} scans is usable; see {self.report}")
        self._publish([record for record in records if not record.reason])
        return records

    @property
    def report(self) -> Path:
        """The report for people."""
        return self.out / "report.html"

    @cached_property
    def _table(self) -> Path:
        return self.participants or self.raw / "participants.tsv"

    @cached_property
    def _covariates(self) -> pd.DataFrame | None:
        if self.unconditional:
            return None
        if not self._table.is_file():
            raise UsageError(
                f"found no table of covariates at {self._table}; name one with --participants, "
                "or use --unconditional"
            )
        return read_table(self._table)

    def _is_known(self, scan: Scan) -> bool:
        return self._covariates is None or scan.subject in self._covariates.index

    @cached_property
    def _firsts(self) -> dict[str, Scan]:
        """The first scan of each id."""
        return {scan.id: scan for scan in reversed(self.scans)}

    def _usable(self) -> list[Scan]:
        return [s for s in self.scans if self._is_known(s) and self._firsts[s.id] is s]

    def _refused(self) -> Iterator[Record]:
        """Records of scans that are not even read."""
        for scan in self.scans:
            reason = ""
            if self._firsts[scan.id] is not scan:
                reason = f"has the id of {self._firsts[scan.id].path}; rename one of them"
            elif not self._is_known(scan):
                reason = f"{scan.subject} has no complete row in {self._table}; add it"
            if reason:
                yield Record(id=scan.id, source=str(scan.path), reason=reason, measures={})

    def _kept(self, scan: Scan) -> bool:
        try:
            data = scan.path.read_bytes()
        except OSError:
            return False
        return _recorded(self.out / "scans" / _key(data, self.geometry)) is not None

    def _records(self, scans: list[Scan], jobs: int) -> Iterator[Record]:
        work = partial(prepare_file, self.out / "scans", self.geometry)
        if jobs == 1:
            yield from map(work, scans)
            return
        from concurrent.futures import ProcessPoolExecutor, as_completed
        from concurrent.futures.process import BrokenProcessPool
        from multiprocessing import get_context

        with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
            try:
                for future in as_completed([pool.submit(work, scan) for scan in scans]):
                    yield future.result()
            except BrokenProcessPool:
                raise SynthBrainError(
                    "a process died, perhaps for want of memory; run again with fewer --jobs"
                ) from None
            finally:
                pool.shutdown(cancel_futures=True)

    def _publish(self, records: Sequence[Record]) -> None:
        from synthbrain.manifest import Manifest
        from synthbrain.resolver import Resolver

        manifest = Manifest.create(self._header(), self._rows([r.id for r in records]))
        store = Resolver(manifest, self.out / "store").published
        for position, record in enumerate(records):
            if not store.has(position):
                store.write_shard(position, _shard(self.out, record).read_bytes())
        manifest.save(self.out / "manifest", overwrite=True)

    def _header(self) -> Header:
        name = re.sub(r"[^a-z0-9._-]+", "-", self.out.resolve().name.lower()).strip("-._")
        return Header(
            name=name[:80] or "prepared",
            description="T1w scans, rigidly registered to MNI152",
            geometry=self.geometry,
            conditional=not self.unconditional,
            rows=0,
            licence=Licence(status="unknown", note="that of the raw scans"),
            provenance={"prepared": f"synthbrain prepare, version {VERSION}"},
        )

    def _rows(self, ids: list[str]) -> pd.DataFrame:
        import pandas as pd

        if self._covariates is None:
            columns: dict[str, Any] = dict.fromkeys(NAMES, np.full(len(ids), 0.5))
        else:
            known = self._covariates.loc[[self._firsts[id].subject for id in ids]]
            columns = {name: known[name].to_numpy() for name in NAMES}
        columns |= {
            "split": [split_of(self._firsts[id].subject) for id in ids],  # one person, one split
            "seed": pd.array([pd.NA] * len(ids), dtype="Int64"),
            "origin": np.full(len(ids), PUBLISHED, dtype=object),
        }
        return make_table(columns, ids, str(self.raw))


def require_itk() -> None:
    """Raise unless SimpleITK is installed.

    Raises
    ------
    SynthBrainError
        It is not.
    """
    try:
        import SimpleITK  # noqa: F401
    except ImportError:
        raise SynthBrainError(
            "registration needs SimpleITK, which is not installed; "
            "install it with: pip install 'synthbrain[prepare]'"
        ) from None


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


def read_table(path: Path) -> pd.DataFrame:
    """Covariates by participant, without the participants whose row has gaps (``n/a``).

    Raises
    ------
    ManifestError
        As :func:`synthbrain.participants.read_participants`.
    """
    from synthbrain.participants import read_participants

    wanted = {name.lower() for own, others in ALIASES.items() for name in (own, *others)}
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8-sig").splitlines()]
    used = [i for i, cell in enumerate(lines[0]) if cell.strip().lower() in wanted] if lines else []
    cells = [[line[i].strip() if i < len(line) else "" for i in used] for line in lines]
    whole = [row for row in cells if not {"", "n/a", "nan"} & {cell.lower() for cell in row}]
    data = "\n".join("\t".join(row) for row in whole).encode()
    return read_participants(data, ALIASES, str(path))


def prepare_file(folder: Path, geometry: Geometry, scan: Scan) -> Record:
    """Prepare one file, or find its record; never raises for what is wrong with the file.

    Parameters
    ----------
    folder
        Where records are kept.
    geometry
        Grid of the volume.
    scan
        The file.
    """
    same: dict[str, Any] = {"id": scan.id, "source": str(scan.path)}
    try:
        data = scan.path.read_bytes()
    except OSError as error:
        return Record(**same, reason=f"cannot be read: {error.strerror}", measures={})
    key = _key(data, geometry)
    found = _recorded(folder / key)
    if found is None:
        found = _prepare(data, geometry, folder / key)
        _write(folder / f"{key}.json", json.dumps(found, indent=2).encode())
    return Record(**same, key=key, **found)


def _recorded(stem: Path) -> dict[str, Any] | None:
    """What is written of a scan; None where it is not done, or its volume is gone."""
    try:
        found = json.loads(stem.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return None
    return found if found["reason"] or stem.with_suffix(".shard").exists() else None


def _prepare(data: bytes, geometry: Geometry, stem: Path) -> dict[str, Any]:
    """Measures of a scan and why it is left out, if it is; its volume and picture are written."""
    try:
        done = prepare(*load(data), geometry.shape, geometry.affine)
    except ScanError as error:
        return {"reason": str(error), "measures": {}}
    except RuntimeError as error:  # ITK's own, of many lines
        return {"reason": f"cannot be registered: {str(error).split(':')[-1].strip()}",
                "measures": {}}  # fmt: skip
    _write(stem.with_suffix(".jpg"), picture(done.volume, geometry))
    reason = done.measures.problem()
    if reason is None:
        from synthbrain.shard import ShardLayout

        layout = ShardLayout(geometry.shape, geometry.chunks, geometry.dtype)
        _write(stem.with_suffix(".shard"), layout.encode(quantise(done.volume, geometry)))
    return {"reason": reason or "", "measures": asdict(done.measures)}


def load(data: bytes) -> tuple[Array, Array]:
    """Voxels and affine out of a NIfTI file's bytes, gzipped or not.

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


def picture(volume: Array, geometry: Geometry) -> bytes:
    """Three slices side by side with the outline of the template's brain, as a JPEG.

    Parameters
    ----------
    volume
        ``(x, y, z)`` intensities in [0, 1].
    geometry
        Its grid.
    """
    from PIL import Image
    from scipy import ndimage

    brain = template(geometry.shape, geometry.affine).brain.astype(np.uint8)
    strips = []
    for plane, position in zip(PLANES, _SLICES, strict=True):
        grey = (cut(volume, geometry.affine, plane, position) ** 0.8 * 255).astype(np.uint8)
        inside = cut(brain, geometry.affine, plane, position) > 0
        coloured = np.repeat(grey[..., None], 3, axis=2)
        coloured[inside & ~ndimage.binary_erosion(inside)] = _EDGE
        strips.append(np.pad(coloured, ((geometry.shape[1] - len(grey), 0), (0, 4), (0, 0))))
    out = io.BytesIO()
    Image.fromarray(np.concatenate(strips, axis=1)).save(out, "JPEG", quality=85)
    return out.getvalue()


def write_report(out: Path, records: Sequence[Record]) -> None:
    """Write ``report.json`` and ``report.html``, which needs nothing beside it."""
    found = {"version": VERSION, "scans": [asdict(record) for record in records]}
    _write(out / "report.json", (json.dumps(found, indent=2) + "\n").encode())
    used = sum(not record.reason for record in records)
    figures = sorted(records, key=lambda record: not record.reason)  # what is left out comes first
    body = "\n".join(_figure(out, record) for record in figures)
    title = f"{used:,} of {len(records):,} scans prepared"
    _write(out / "report.html", _PAGE.format(title=title, body=body).encode())


def _figure(out: Path, record: Record) -> str:
    path = out / "scans" / f"{record.key}.jpg"
    shown = ""
    if record.key and path.exists():
        data = base64.b64encode(path.read_bytes()).decode()
        shown = f'<img alt="{html.escape(record.id)}" src="data:image/jpeg;base64,{data}">'
    reason = f'<p class="out">left out: {html.escape(record.reason)}</p>' if record.reason else ""
    cells = (f"{html.escape(k)} {v:.4g}" for k, v in record.measures.items())
    return (
        f"<figure>{shown}<figcaption><b>{html.escape(record.id)}</b> "
        f"{html.escape(record.source)}{reason}<p>{' · '.join(cells)}</p></figcaption></figure>"
    )


def _key(data: bytes, geometry: Geometry) -> str:
    """Name of what comes of a file: a hash of its bytes, of the code and of the grid."""
    digest = hashlib.sha256(f"prepare {VERSION}\n{geometry.model_dump_json()}\n".encode())
    digest.update(data)
    return digest.hexdigest()[:32]


def _shard(out: Path, record: Record) -> Path:
    return out / "scans" / f"{record.key}.shard"


def _id(path: Path) -> str:
    """A file's name as an id: letters, digits, ``-`` and ``_``, a letter or digit first."""
    stem = re.sub(r"(_T1w)?\.nii(\.gz)?$", "", path.name)
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).lstrip("-_") or "scan"


def _write(path: Path, data: bytes) -> None:
    """Write a file in one step."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        scratch.write_bytes(data)
        os.replace(scratch, path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise StoreError(error.errno, f"cannot write {path}: {error.strerror}") from error


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ background: #090b0f; color: #eceef2; font: 14px system-ui, sans-serif; margin: 2em; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(32em, 1fr)); gap: 2em; }}
figure {{ margin: 0; }}
img {{ width: 100%; }}
p {{ color: #868f9d; margin: .3em 0; }}
p.out {{ color: #ff9d7a; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>Sagittal, coronal and axial; the line is the brain of the template.</p>
<main>
{body}
</main>
</body>
</html>
"""
