"""Volumes as NIfTI files: a BIDS derivative dataset, or a plain folder.

Every volume becomes a ``.nii.gz`` and a ``.json`` beside it that says how it came to be. The
``.json`` is written last and both are written aside and renamed, so a volume counts as exported
when its ``.json`` is there, and an export that was killed goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

import synthbrain
from generation.covariates import COVARIATES, SEXES
from synthbrain.errors import MissingVolumeError, StoreError, UsageError
from synthbrain.progress import track
from synthbrain.quantise import Array, intensities
from synthbrain.rows import PUBLISHED, bids_label

if TYPE_CHECKING:
    from synthbrain.dataset import SynthBrainDataset
    from synthbrain.header import Geometry, Header

DType = Literal["uint8", "float32"]

BIDS_VERSION = "1.10.0"
DEVELOPERS = "The synthbrain developers"
UNNAMED = "Whoever made this export (unnamed)"

COLUMNS: dict[str, dict[str, Any]] = {
    "row_id": {"Description": "Id of the row in the manifest"},
    "age": {"Description": "Age asked of the generator; any number", "Units": "years"},
    "sex": {
        "Description": "Sex asked of the generator",
        "Levels": {word: word for word in SEXES},
    },
    "ventricular_volume": {
        "Description": "Ventricular CSF volume asked of the generator (UK Biobank field 25004)",
        "Units": "mm^3",
    },
    "brain_volume": {
        "Description": "Brain volume normalised for head size asked of the generator "
        "(UK Biobank field 25009)",
        "Units": "mm^3",
    },
    "split": {"Description": "Split the row belongs to"},
    "seed": {"Description": "Seed the volume was made from, n/a for published volumes"},
    "made_by": {"Description": "Generator that made the volume, or 'published'"},
}
"""Columns of ``participants.tsv`` after ``participant_id``, as ``participants.json`` has them."""

_DESCRIPTION = "Synthetic T1-weighted volume of a head that never existed, intensities in [0, 1]"
_DTYPES = ("uint8", "float32")
_BATCH = 8
_MAX_THREADS = 4
_SCRATCH = ".partial"
_STALE_SECONDS = 3600.0
_ALIGNED = 2  # NIfTI xform code: aligned to another space; rigidly, so not "MNI152" (4)


@dataclass(frozen=True)
class Layout:
    """Where things lie in an exported folder.

    Parameters
    ----------
    name
        What users call it.
    marker
        File, written first, that says whose export the folder holds.
    stem
        Path of a volume without its suffixes, with ``{label}``.
    reserved
        Labels no volume may have.
    """

    name: str
    marker: str
    stem: str
    reserved: tuple[str, ...] = ()

    def label(self, id: str) -> str:
        """What a row's files are called: in BIDS, letters and digits only."""
        return bids_label(id) if self.name == "bids" else id

    def participant(self, id: str) -> str:
        """The row's ``participant_id``."""
        return f"sub-{self.label(id)}" if self.name == "bids" else id


FORMATS: Mapping[str, Layout] = {
    "bids": Layout("bids", "dataset_description.json", "sub-{label}/anat/sub-{label}_T1w"),
    "nifti": Layout("nifti", "dataset.json", "{label}", ("dataset", "participants")),
}


def export_bids(
    dataset: SynthBrainDataset,
    out: str | os.PathLike[str],
    *,
    dtype: DType = "uint8",
    authors: Sequence[str] = (),
    progress: bool = True,
) -> int:
    """Write a dataset's volumes as a BIDS derivative dataset.

    Parameters
    ----------
    dataset
        Whose rows to export; what its patches, transform and units are does not matter. Volumes
        its generator or sources can give are had first, and kept in its store.
    out
        Folder to write: a new or empty one, or one that holds an export of the same manifest,
        which is then completed.
    dtype
        ``"uint8"`` with a scale in the NIfTI header, or ``"float32"`` in [0, 1].
    authors
        Names for ``dataset_description.json``, in place of the default ones.
    progress
        Show a progress bar on standard error.

    Returns
    -------
    int
        How many volumes were written; those already there are kept.

    Raises
    ------
    UsageError
        The folder holds something else, two ids give one label, or the type is unfit.
    MissingVolumeError
        Volumes are neither stored nor to be had.
    StoreError
        The folder cannot be written to.

    Examples
    --------
    >>> import tempfile
    >>> from synthbrain import SynthBrainDataset
    >>> from synthbrain.testing import TinyGenerator, tiny_manifest
    >>> out = tempfile.mkdtemp()
    >>> ds = SynthBrainDataset(tiny_manifest(3), generator=TinyGenerator(), store=out + "/store")
    >>> export_bids(ds, out + "/bids", progress=False)
    3
    """
    return Export(dataset, Path(out), FORMATS["bids"], dtype, tuple(authors)).run(progress=progress)


def export_nifti(
    dataset: SynthBrainDataset,
    out: str | os.PathLike[str],
    *,
    dtype: DType = "uint8",
    progress: bool = True,
) -> int:
    """Write a dataset's volumes as ``<id>.nii.gz`` in one folder, with ``participants.tsv``.

    Parameters, return value and errors as in :func:`export_bids`.
    """
    return Export(dataset, Path(out), FORMATS["nifti"], dtype).run(progress=progress)


def nifti_bytes(stored: Array, geometry: Geometry, dtype: DType = "uint8") -> bytes:
    """One volume as the bytes of a ``.nii.gz``, the same whenever they are made.

    Parameters
    ----------
    stored
        ``(x, y, z)`` stored values.
    geometry
        Their scale and affine, in mm.
    dtype
        As in :func:`export_bids`.
    """
    import nibabel

    values = stored if dtype == "uint8" else intensities(stored, geometry)
    image = nibabel.Nifti1Image(values, np.array(geometry.affine), dtype=dtype)
    image.header.set_slope_inter(geometry.scale if dtype == "uint8" else 1.0, 0.0)
    image.header.set_xyzt_units("mm")
    image.set_sform(geometry.affine, _ALIGNED)
    image.set_qform(geometry.affine, _ALIGNED)
    return gzip.compress(image.to_bytes(), 6, mtime=0)


@dataclass(frozen=True, eq=False)
class Export:
    """An export: what is done, what is to do, and the doing.

    Parameters
    ----------
    dataset, out, dtype, authors
        As in :func:`export_bids`.
    layout
        One of :data:`FORMATS`.
    """

    dataset: SynthBrainDataset
    out: Path
    layout: Layout
    dtype: DType = "uint8"
    authors: tuple[str, ...] = ()
    _new: set[int] = field(init=False, default_factory=set, repr=False)
    """Rows whose volumes this export had made."""

    def __post_init__(self) -> None:
        if self.dataset.representation != "image":
            raise UsageError(
                f"exports are of volumes, not of {self.dataset.representation}s; open the dataset "
                "with representation='image'"
            )
        if self.dtype not in _DTYPES:
            raise UsageError(f"dtype must be one of {', '.join(_DTYPES)}; found {self.dtype!r}")
        stored_as = self._header.geometry.dtype
        if self.dtype == "uint8" and stored_as != "uint8":
            raise UsageError(f"volumes are stored as {stored_as}; export them as float32")
        self._check_folder()
        _refuse_collisions([*self._exported_ids(), *self._ids], self.layout)

    def todo(self) -> list[int]:
        """Rows of the dataset that are not exported yet."""
        return [i for i, id in enumerate(self._ids) if not self._is_done(id)]

    def run(self, *, progress: bool = True) -> int:
        """Export what is not exported yet; returns how many volumes were written.

        Raises
        ------
        MissingVolumeError, StoreError
            As in :func:`export_bids`.
        """
        todo = self.todo()
        self._refuse_unavailable(todo)
        self._sweep()
        # Rows to come are listed, too: after a kill, the next export knows whose volumes lie here.
        self._write_all(self._descriptions() | {"participants.tsv": self._participants(self._ids)})
        try:
            done = track(self._export(todo), total=len(todo), what="exporting", show=progress)
            return sum(1 for _ in done)
        finally:
            done_ids = filter(self._is_done, self._ids)
            self._write_all({"participants.tsv": self._participants(done_ids)})
            with contextlib.suppress(OSError):
                (self.out / _SCRATCH).rmdir()

    @property
    def _header(self) -> Header:
        return self.dataset.manifest.header

    @cached_property
    def _ids(self) -> list[str]:
        return self.dataset.manifest.table.index.tolist()

    @cached_property
    def _source(self) -> dict[str, Any]:
        """What this folder is an export of: one manifest, one generator, one type."""
        root = self._header.parent or self._header
        return {
            "Manifest": root.name,
            "RowsDigest": root.rows_digest,
            "MadeBy": self.dataset.resolver.made_by or PUBLISHED,
            "DataType": self.dtype,
        }

    def _check_folder(self) -> None:
        marker = self.out / self.layout.marker
        try:
            found = json.loads(marker.read_text()).get("Synthbrain")
        except FileNotFoundError:
            if self.out.is_dir() and any(p.name != _SCRATCH for p in self.out.iterdir()):
                raise UsageError(
                    f"{self.out} is not empty and holds no {self.layout.name} export; "
                    "choose another folder"
                ) from None
            return
        except NotADirectoryError:
            raise UsageError(f"{self.out} is not a folder; choose another path") from None
        except (ValueError, AttributeError):
            found = None
        if found != self._source:
            raise UsageError(
                f"{self.out} holds {_told(found)}, this would be {_told(self._source)}; "
                "choose another folder"
            )

    def _refuse_unavailable(self, todo: list[int]) -> None:
        plan = self.dataset.resolver.plan(todo)
        lost = plan.unavailable
        self._new.update(plan.sample.tolist())
        if len(lost):
            raise MissingVolumeError(
                f"{len(lost):,} of {len(self._ids):,} volumes are not stored, "
                f"{self._ids[lost[0]]!r} first, and nothing given here can make them; "
                "fill the cohort first, or pass a generator (--generator)"
            )

    def _export(self, todo: list[int]) -> Iterator[str]:
        threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(threads, thread_name_prefix="synthbrain-export") as pool:
            for start in range(0, len(todo), _BATCH):
                batch = todo[start : start + _BATCH]
                volumes = self.dataset.resolver.volumes(batch, threads=pool)
                yield from pool.map(self._export_one, batch, volumes)

    def _export_one(self, index: int, stored: Array) -> str:
        id = self._ids[index]
        image = nifti_bytes(stored, self._header.geometry, self.dtype)
        self._write(self._path(id, ".nii.gz"), image)
        self._write(self._path(id, ".json"), _json(self._provenance(index)))
        return id

    def _provenance(self, index: int) -> dict[str, Any]:
        resolver, row = self.dataset.resolver, self.dataset.manifest.table.iloc[index]
        about = resolver.store_of(index).about(self.dataset.manifest.positions[index])
        cost = getattr(resolver.generator, "report", None) if index in self._new else None
        facts = {
            "Description": _DESCRIPTION,
            "Row": self._ids[index],
            "Manifest": self._source["Manifest"],
            "ManifestRowsDigest": self._source["RowsDigest"],
            "Generator": resolver.maker_of(index),
            "GeneratedWith": about.get("provenance") or None,
            "GenerationCost": cost,
            "Seed": None if row["origin"] == PUBLISHED else int(row["seed"]),
            "NormalisedCovariates": {c.name: float(row[c.name]) for c in COVARIATES}
            if self._header.conditional
            else None,
            "ExportedBy": f"synthbrain {synthbrain.__version__}",
        }
        return {name: value for name, value in facts.items() if value is not None}

    def _descriptions(self) -> dict[str, bytes]:
        about = {"Description": "One synthetic head a row; covariates are those asked for"}
        files = {"participants.json": _json({**about, **COLUMNS}), "README.md": self._readme()}
        if self.layout.name == "bids":
            files["T1w.json"] = _json({"Description": _DESCRIPTION, "SkullStripped": False})
        return {self.layout.marker: _json(self._description()), **files}

    def _description(self) -> dict[str, Any]:
        licence = self._header.licence
        terms = licence.name or licence.status
        cited = [citation.split(",")[0] for citation in self._header.citations]
        authors = self.authors or (DEVELOPERS, *(cited or [UNNAMED]))
        return {
            "Name": f"{self._source['Manifest']}: synthetic brain MRI",
            "BIDSVersion": BIDS_VERSION,
            "DatasetType": "derivative",
            "License": f"{terms} ({licence.note})" if licence.note else terms,
            "Authors": list(authors),
            "ReferencesAndLinks": list(self._header.citations),
            "GeneratedBy": [
                {"Name": "synthbrain", "Version": synthbrain.__version__},
                {"Name": self._source["MadeBy"], "Description": "made the volumes"},
            ],
            "Synthbrain": self._source,
        }

    def _readme(self) -> bytes:
        header, source = self._header, self._source
        cited = "".join(f"\nPlease cite: {citation}\n" for citation in header.citations)
        licence = self._description()["License"]
        return _README.format(**source, licence=licence, cited=cited).encode()

    def _participants(self, ids: Iterable[str]) -> bytes:
        """``participants.tsv``: some rows of the dataset, and all volumes of earlier exports."""
        chosen = set(ids)
        lines = self._earlier_lines() | {
            self.layout.participant(id): self._line(index)
            for index, id in enumerate(self._ids)
            if id in chosen
        }
        header = "\t".join(["participant_id", *COLUMNS])
        body = [lines[participant] for participant in sorted(lines)]
        return ("\n".join([header, *body]) + "\n").encode()

    def _earlier_lines(self) -> dict[str, str]:
        """Lines of ``participants.tsv`` by participant, of volumes that are still there."""
        path = self.out / "participants.tsv"
        lines = path.read_text().splitlines()[1:] if path.is_file() else []
        cells = [line.split("\t", 2) for line in lines]
        return {cell[0]: "\t".join(cell) for cell in cells if self._is_done(cell[1])}

    def _exported_ids(self) -> list[str]:
        return [line.split("\t", 2)[1] for line in self._earlier_lines().values()]

    def _line(self, index: int) -> str:
        row = self.dataset.manifest.table.iloc[index]
        natural = {c.name: repr(float(c.denormalise(row[c.name]))) for c in COVARIATES}
        natural["sex"] = list(SEXES)[int(row["sex"] > 0.5)]
        if not self._header.conditional:
            natural = dict.fromkeys(natural, "n/a")
        published = row["origin"] == PUBLISHED
        cells = natural | {
            "row_id": self._ids[index],
            "split": row["split"],
            "seed": "n/a" if published else str(int(row["seed"])),
            "made_by": self.dataset.resolver.maker_of(index),
        }
        participant = self.layout.participant(self._ids[index])
        return "\t".join([participant, *(cells[name] for name in COLUMNS)])

    def _is_done(self, id: str) -> bool:
        return all(self._path(id, suffix).is_file() for suffix in (".json", ".nii.gz"))

    def _path(self, id: str, suffix: str) -> Path:
        return self.out / (self.layout.stem.format(label=self.layout.label(id)) + suffix)

    def _write_all(self, files: Mapping[str, bytes]) -> None:
        for name, data in files.items():
            self._write(self.out / name, data)

    def _write(self, path: Path, data: bytes) -> None:
        """Write aside, then rename: no reader ever sees half a file under its name."""
        scratch = self.out / _SCRATCH / f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}"
        try:
            scratch.parent.mkdir(parents=True, exist_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_bytes(data)
            os.replace(scratch, path)
        except OSError as error:
            scratch.unlink(missing_ok=True)
            raise StoreError(
                error.errno,
                f"cannot write {path} ({error.strerror}); what is exported is intact: "
                "make room or choose another folder, and run again",
            ) from None

    def _sweep(self) -> None:
        """Delete what killed exports left behind."""
        for path in (self.out / _SCRATCH).glob("*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()


_README = """# {Manifest}: synthetic brain MRI

Every head in this dataset is synthetic: made by `{MadeBy}` from the rows of the manifest
`{Manifest}` and exported with synthbrain. No volume is a scan of a person. For research only; not
for clinical use.

`participants.tsv` holds the covariates each volume was asked to have, which is not the same as
what a segmentation would measure in it. The `.json` file beside each volume says how it came to
be: generator, seed and normalised covariates.

Licence: {licence}
{cited}"""


def _refuse_collisions(ids: Sequence[str], layout: Layout) -> None:
    seen = dict.fromkeys(layout.reserved, "a file of the dataset's own")
    for id in ids:
        # Case is folded because file systems that fold it would make two rows one file.
        label = layout.label(id).casefold()
        if not label:
            raise UsageError(f"id {id!r} has no letter or digit to make a BIDS label of")
        other = seen.setdefault(label, id)
        if other != id:
            raise UsageError(
                f"{id!r} and {other!r} would both become {layout.participant(id)!r}; "
                "export them into separate folders"
            )


def _told(source: Mapping[str, Any] | None) -> str:
    if not isinstance(source, Mapping):
        return "something else"
    made_by, dtype, digest = (source.get(key) for key in ("MadeBy", "DataType", "RowsDigest"))
    return f"{dtype} volumes of {source.get('Manifest')} ({str(digest)[:8]}) made by {made_by}"


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
