"""From a folder of raw T1w scans to a manifest and its stored volumes.

What is done is kept in ``scans/``, see :mod:`synthbrain.scans`; manifest, store and report are put
together from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from generation.covariates import NAMES
from generation.preprocess import VERSION
from generation.unires import version
from synthbrain.errors import ManifestError, SynthBrainError, UsageError
from synthbrain.header import Geometry, Header, Licence
from synthbrain.progress import track
from synthbrain.rows import PUBLISHED, make_table, split_of
from synthbrain.scan_report import Record, write_report
from synthbrain.scans import Scan, find_scans, is_done, prepare_file

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
    unires
        Reconstruct scans at 1 mm with UniRes first; by default where it is installed.

    Raises
    ------
    UsageError
        Nothing to prepare, no table of covariates, ``out`` lies inside ``raw``, or UniRes is asked
        for and not installed.
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
    unires: bool | None = None

    def __post_init__(self) -> None:
        if not self.raw.is_dir():
            raise UsageError(f"{self.raw} is not a folder; give the folder of the raw scans")
        if self.out.resolve().is_relative_to(self.raw.resolve()):
            raise UsageError(f"{self.out} lies inside {self.raw}; choose a folder outside of it")
        if self.unconditional and self.participants:
            raise UsageError("give --participants or --unconditional, not both")
        if self.unires and version() is None:
            raise UsageError(
                "UniRes is not installed; `pip install git+https://github.com/brudfors/UniRes`, or "
                "do without it"
            )
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
        return [
            s for s in self._usable() if not is_done(self._kept, self.geometry, self._unires, s)
        ]

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
        self._kept.mkdir(parents=True, exist_ok=True)
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

    @property
    def _kept(self) -> Path:
        """Where finished scans are."""
        return self.out / "scans"

    @property
    def _unires(self) -> str:
        """Version of UniRes to use; empty for none."""
        return "" if self.unires is False else version() or ""

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

    def _records(self, scans: list[Scan], jobs: int) -> Iterator[Record]:
        work = partial(prepare_file, self._kept, self.geometry, self._unires)
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
            shard = record.kept(self._kept, ".shard").read_bytes()
            if not store.has(position) or store.path(position).read_bytes() != shard:
                store.path(position).unlink(missing_ok=True)  # of a scan that was since corrected
                store.write_shard(position, shard)
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
            provenance={
                "prepared": f"synthbrain prepare, version {VERSION}",
                "reconstructed": f"UniRes {self._unires}" if self._unires else "no",
            },
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


def read_table(path: Path) -> pd.DataFrame:
    """Covariates by participant, without the participants whose row has gaps (``n/a``).

    Raises
    ------
    ManifestError
        No UTF-8 text, or as :func:`synthbrain.participants.read_participants`.
    """
    from synthbrain.participants import read_participants

    wanted = {name.lower() for own, others in ALIASES.items() for name in (own, *others)}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path} is not UTF-8 text ({error}); save it as one") from None
    lines = [line.split("\t") for line in text.splitlines()]
    used = [i for i, cell in enumerate(lines[0]) if cell.strip().lower() in wanted] if lines else []
    cells = [[line[i].strip() if i < len(line) else "" for i in used] for line in lines]
    whole = [row for row in cells if not {"", "n/a", "nan"} & {cell.lower() for cell in row}]
    data = "\n".join("\t".join(row) for row in whole).encode()
    return read_participants(data, ALIASES, str(path))
