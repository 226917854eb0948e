"""Manifests: which brains there are, apart from where their voxels lie.

On disk a manifest is a folder: ``manifest.json`` (the header, :class:`synthbrain.header.Header`)
and ``rows.parquet`` (:mod:`synthbrain.rows`). A cohort is a manifest somebody selected or drew.
"""

from __future__ import annotations

import difflib
import os
import pickle
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from generation.covariates import (
    AGE,
    BRAIN_VOLUME,
    VENTRICULAR_VOLUME,
    Covariate,
    check_range,
    parse_sex,
)
from synthbrain.errors import ManifestError, UsageError
from synthbrain.header import NAME_LENGTH, NAME_PATTERN, Header, ParentRef
from synthbrain.home import home
from synthbrain.rows import COLUMNS, digest_contents, digest_rows, read_rows, write_rows

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

Range = tuple[float, float]

NATURAL_COLUMNS = {
    "age_years": AGE,
    "ventricular_mm3": VENTRICULAR_VOLUME,
    "brain_mm3": BRAIN_VOLUME,
}


@dataclass(frozen=True, eq=False)
class Manifest:
    """A header and its rows.

    Use :meth:`open`, :meth:`select` and :func:`synthbrain.draw_cohort` rather than the
    constructor.

    Parameters
    ----------
    header
        Everything but the rows.
    table
        The rows, as described in :mod:`synthbrain.rows`.
    positions
        ``(n,)`` each row's number in the manifest whose store it reads: its own, or its parent's.
    sha256
        Hash of each row's shard where known, indexed as ``table``.

    Examples
    --------
    >>> manifest = Manifest.open("synthbrain-100k")
    >>> older_men = manifest.select(sex="male", age_years=(75, 82), limit=20)
    >>> len(older_men)
    20
    """

    header: Header
    table: pd.DataFrame
    positions: NDArray[np.uint32]
    sha256: pd.Series[str] | None = None

    @classmethod
    def open(cls, name_or_path: str | os.PathLike[str]) -> Manifest:
        """Open a shipped manifest or a saved cohort by name, or any manifest by path.

        Parameters
        ----------
        name_or_path
            A shipped name, the name of a cohort saved in the package's home, a manifest folder,
            the path of its ``manifest.json``, or the address of a published one:
            ``hf://datasets/ORG/NAME[@REVISION]``, ``https://…``, ``s3://…``.

        Raises
        ------
        ManifestError
            Unknown, damaged, or written by a newer version.
        SourceError
            An address that cannot be reached, or where nothing is published.
        """
        folder = _locate(name_or_path)
        header = _read_header(folder)
        if "://" in os.fspath(name_or_path):
            from synthbrain.remote import pinned

            header = pinned(header, folder)
        if header.rows_digest is None:
            import pandas as pd

            empty = pd.DataFrame(columns=list(COLUMNS), index=pd.Index([], name="id", dtype="str"))
            return cls(header, empty, np.zeros(0, np.uint32))
        path = folder / "rows.parquet"
        table, positions, sha256 = read_rows(path)
        found = digest_rows(table)
        if found != header.rows_digest or len(table) != header.rows:
            raise ManifestError(
                f"{path} does not belong to its header: {len(table)} rows with digest "
                f"{found[:12]}, expected {header.rows} with {header.rows_digest[:12]}; "
                "restore the folder or save the manifest again"
            )
        if sha256 is not None and digest_contents(sha256) != header.content_digest:
            raise ManifestError(f"{path}: shard hashes do not match the header's content digest")
        if (positions is None) == (header.parent is not None):
            raise ManifestError(f"{path}: positions and parent must come together")
        return cls(header, table, _own_positions(table) if positions is None else positions, sha256)

    @classmethod
    def create(cls, header: Header, table: pd.DataFrame) -> Manifest:
        """A new root manifest: ``header`` with the count and digest of ``table`` filled in."""
        filled = header.model_copy(
            update={"rows": len(table), "rows_digest": digest_rows(table), "parent": None}
        )
        return cls(filled, table, _own_positions(table))

    def __len__(self) -> int:
        return len(self.positions)

    def __getstate__(self) -> dict[str, Any]:
        """With the table packed: workers that only read volumes need neither it nor pandas."""
        state = dict(self.__dict__)
        table = state.pop("table", None)
        return state if table is None else {**state, "_packed": pickle.dumps(table)}

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name == "table" and (packed := self.__dict__.get("_packed")) is not None:
                self.__dict__.setdefault(name, pickle.loads(packed))
                self.__dict__.pop("_packed", None)
            if name != "table" or name not in self.__dict__:  # another thread may have unpacked it
                raise AttributeError(f"a manifest has no {name!r}")
            return self.__dict__[name]

    def __repr__(self) -> str:
        origin = f", selected from {self.header.parent.name}" if self.header.parent else ""
        return f"<Manifest {self.name}: {len(self):,} rows{origin}>"

    @property
    def name(self) -> str:
        """The manifest's name."""
        return self.header.name

    @cached_property
    def store_key(self) -> str:
        """Folder name of the store this manifest reads: the root's name and rows digest."""
        root = self.header.parent or self.header
        self.require_rows()
        return f"{root.name}-{(root.rows_digest or '')[:8]}"

    def rows_of(self, ids: Iterable[str]) -> NDArray[np.intp]:
        """Where each id is in the table, ``(n,)``; -1 for ids that are not."""
        import pandas as pd

        return self.table.index.get_indexer(pd.Index(list(ids), dtype="str"))

    def require_rows(self) -> None:
        """Raise unless the rows are known.

        Raises
        ------
        ManifestError
            This manifest's rows have yet to be read from its source.
        """
        if self.header.rows_digest is None:
            raise ManifestError(
                f"the rows of {self.name!r} lie in its archive; read them with "
                f"`synthbrain pull {self.name}`, which fetches no more than asked for"
            )

    def select(
        self,
        *,
        split: str | Sequence[str] | None = None,
        age_range: Range | None = None,
        age_years: Range | None = None,
        sex: str | float | None = None,
        ventricular_range: Range | None = None,
        ventricular_mm3: Range | None = None,
        brain_range: Range | None = None,
        brain_mm3: Range | None = None,
        where: str | None = None,
        ids: Iterable[str] | None = None,
        limit: int | None = None,
        extrapolate: bool = False,
    ) -> Manifest:
        """The rows that satisfy every condition given, in this manifest's order.

        Parameters
        ----------
        split
            One split or several.
        age_range, ventricular_range, brain_range
            Normalised ``(low, high)``, both ends included.
        age_years, ventricular_mm3, brain_mm3
            The same in natural units.
        sex
            ``"female"`` or ``"male"``.
        where
            A pandas query over the table's columns, and over ``age_years``, ``ventricular_mm3``
            and ``brain_mm3``: ``"age_years > 70 and ventricular_volume < 0.2"``.
        ids
            Only these rows; an unknown id is an error.
        limit
            At most this many rows.
        extrapolate
            Allow ranges beyond the trained ones, [0, 1].

        Returns
        -------
        Manifest
            Remembers its parent and reads the parent's store.

        Raises
        ------
        UsageError, CovariateError
            A condition makes no sense, or no row satisfies them all.
        """
        self.require_rows()
        conditions: list[str] = []
        keep = np.ones(len(self), dtype=bool)
        if split is not None:
            wanted = self._known_splits([split] if isinstance(split, str) else list(split))
            keep &= self.table["split"].isin(wanted).to_numpy()
            conditions.append(f"split in {wanted}")
        ranges = (
            ("age", age_range, "age_range", age_years, "age_years"),
            ("ventricular_volume", ventricular_range, "ventricular_range",
             ventricular_mm3, "ventricular_mm3"),
            ("brain_volume", brain_range, "brain_range", brain_mm3, "brain_mm3"),
        )  # fmt: skip
        for name, normalised, argument, natural, natural_argument in ranges:
            bounds = resolve_range(
                NATURAL_COLUMNS[natural_argument], normalised, argument, natural, natural_argument,
                extrapolate=extrapolate,
            )  # fmt: skip
            if bounds is not None:
                keep &= self.table[name].between(*bounds).to_numpy()
                conditions.append(f"{name} in [{bounds[0]:.4g}, {bounds[1]:.4g}]")
        if sex is not None:
            keep &= (self.table["sex"] == parse_sex(sex)).to_numpy()
            conditions.append(f"sex == {sex}")
        if where is not None:
            keep &= self._query(where)
            conditions.append(where)
        if ids is not None:
            if isinstance(ids, str):
                raise UsageError(f"ids must be a list of ids, found {ids!r}; write [{ids!r}]")
            keep &= self._known_ids(list(ids))
            conditions.append("ids")
        chosen = np.flatnonzero(keep)
        if len(chosen) == 0:
            raise UsageError(self._nothing_left(conditions))
        if limit is not None:
            if not isinstance(limit, Integral) or limit < 1:
                raise UsageError(f"limit must be at least 1, a whole number, found {limit!r}")
            chosen = chosen[:limit]
            conditions.append(f"first {limit}")
        return self._take(chosen, tuple(conditions)) if conditions else self

    def save(self, path: str | os.PathLike[str] | None = None, *, overwrite: bool = False) -> Path:
        """Write the manifest as a folder, all of it or nothing.

        Parameters
        ----------
        path
            Folder to write; by default ``cohorts/<name>`` in the package's home, where
            :meth:`open` finds it by name. A selection takes the folder's name; other manifests
            keep theirs, which is part of their store's path.
        overwrite
            Replace a manifest that is already there.

        Returns
        -------
        Path
            The folder.

        Raises
        ------
        UsageError
            The folder exists, or its name cannot name a manifest.
        """
        self.require_rows()
        folder = Path(path).absolute() if path is not None else home() / "cohorts" / self.name
        name, folder = folder.name, check_folder(folder, overwrite=overwrite)
        # A root's name is part of its store's path, so renaming one would lose its volumes.
        header = self.header.model_copy(update={"name": name} if self.header.parent else {})
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = folder.with_name(f".{name}.{secrets.token_hex(4)}")
        scratch.mkdir()  # not mkdtemp, whose folders nobody else may read
        try:
            positions = self.positions if self.header.parent else None
            write_rows(scratch / "rows.parquet", self.table, positions, self.sha256)
            (scratch / "manifest.json").write_text(header.text(), encoding="utf-8")
            _swap_in(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return folder

    def _take(self, chosen: NDArray[np.intp], conditions: tuple[str, ...]) -> Manifest:
        table = self.table.iloc[chosen]
        sha256 = None if self.sha256 is None else self.sha256.iloc[chosen]
        parent = self.header.parent or ParentRef(
            name=self.name, rows_digest=self.header.rows_digest or ""
        )
        parent = parent.model_copy(update={"selection": (*parent.selection, *conditions)})
        header = self.header.model_copy(
            update={
                "rows": len(table),
                "rows_digest": digest_rows(table),
                "content_digest": None if sha256 is None else digest_contents(sha256),
                "parent": parent,
            }
        )
        return Manifest(header, table, self.positions[chosen], sha256)

    def _known_splits(self, wanted: list[str]) -> list[str]:
        known = sorted(self.table["split"].unique())
        for name in wanted:
            if name not in known:
                near = difflib.get_close_matches(str(name).lower(), known, n=1)
                raise UsageError(
                    f"{self.name} has no split {name!r}; it has {', '.join(map(repr, known))}"
                    + (f"; did you mean {near[0]!r}?" if near else "")
                )
        return wanted

    def _known_ids(self, wanted: list[str]) -> NDArray[np.bool_]:
        unknown = [id for id in wanted if id not in self.table.index]
        if unknown:
            raise UsageError(
                f"{len(unknown)} of {len(wanted)} ids are not in {self.name}, the first is "
                f"{unknown[0]!r}; its ids look like {self.table.index[0]!r}"
            )
        return self.table.index.isin(wanted)

    def _query(self, where: str) -> NDArray[np.bool_]:
        natural = {
            name: covariate.denormalise(self.table[covariate.name])
            for name, covariate in NATURAL_COLUMNS.items()
        }
        table = self.table.assign(**natural)
        try:
            keep = table.eval(where)
        except Exception as error:
            raise UsageError(
                f"where={where!r} is not a query over the rows ({error}); "
                f"columns are {', '.join(table.columns)}"
            ) from None
        import pandas as pd

        if not (isinstance(keep, pd.Series) and pd.api.types.is_bool_dtype(keep.dtype)):
            raise UsageError(f"where={where!r} must be a condition, such as 'age_years > 70'")
        return keep.to_numpy(dtype=bool, na_value=False)

    def _nothing_left(self, conditions: list[str]) -> str:
        spans = ", ".join(
            f"{name} {self.table[name].min():.3g} to {self.table[name].max():.3g}"
            for name in ("age", "ventricular_volume", "brain_volume")
        )
        return (
            f"none of the {len(self):,} rows of {self.name} has {' and '.join(conditions)}; "
            f"it spans {spans}. Widen the conditions, or draw such brains with draw_cohort()"
        )


def check_folder(folder: Path, *, overwrite: bool) -> Path:
    """Where a manifest can be saved: the folder, or what it leads to if it is a link.

    Raises
    ------
    UsageError
        Its name cannot name a manifest, or there is something else.
    """
    check_name(folder.name)
    folder = folder.resolve()
    replaceable = overwrite and (folder / "manifest.json").exists()
    occupied = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    if occupied and not replaceable:
        raise UsageError(f"{folder} already exists; choose another folder or overwrite it")
    return folder


def check_name(name: str) -> str:
    """The name, if it can be a manifest's.

    Raises
    ------
    UsageError
        It cannot.
    """
    if not re.fullmatch(NAME_PATTERN, name) or len(name) > NAME_LENGTH:
        raise UsageError(
            f"{name!r} cannot name a manifest: use up to {NAME_LENGTH} lower-case letters, "
            "digits, '.', '_' and '-', a letter or digit first"
        )
    return name


def resolve_range(
    covariate: Covariate,
    normalised: Range | None,
    argument: str,
    natural: Range | None,
    natural_argument: str,
    *,
    extrapolate: bool,
) -> Range | None:
    """One normalised range from either form, checked; None when neither is given."""
    if natural is None:
        if normalised is None:
            return None
        return check_range(covariate.name, normalised, extrapolate=extrapolate, argument=argument)
    if normalised is not None:
        raise UsageError(f"give {argument} or {natural_argument}, not both")
    return check_range(
        covariate.name, natural, extrapolate=extrapolate, argument=natural_argument, natural=True
    )


def shipped_manifests() -> list[str]:
    """Names of the manifests that come with the package."""
    return sorted(path.parent.name for path in _shipped().glob("*/manifest.json"))


def saved_cohorts() -> list[str]:
    """Names of the manifests saved in the package's home."""
    return sorted(path.parent.name for path in (home() / "cohorts").glob("*/manifest.json"))


def _shipped() -> Path:
    package = Path(__file__).parent
    installed = package / "manifests"
    return installed if installed.is_dir() else package.parent / "manifests"


def _locate(name_or_path: str | os.PathLike[str]) -> Path:
    text = os.fspath(name_or_path)
    if "://" in text:
        from synthbrain.remote import fetch_manifest

        return fetch_manifest(text)
    if re.fullmatch(NAME_PATTERN, text):
        # Rows that were read out of an archive come before the shipped header that lacks them.
        for folder in (home() / "manifests" / text, _shipped() / text, home() / "cohorts" / text):
            if (folder / "manifest.json").is_file():
                return folder
    path = Path(text)
    folder = path.parent if path.name == "manifest.json" else path
    if (folder / "manifest.json").is_file():
        return folder
    known = [*shipped_manifests(), *saved_cohorts()]
    raise ManifestError(
        f"no manifest {text!r}: neither a folder with a manifest.json nor one of {', '.join(known)}"
    )


def _read_header(folder: Path) -> Header:
    path = folder / "manifest.json"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"cannot read {path}: {error}") from None
    return Header.parse(text, str(path))


def _own_positions(table: pd.DataFrame) -> NDArray[np.uint32]:
    return np.arange(len(table), dtype=np.uint32)


def _swap_in(scratch: Path, folder: Path) -> None:
    """Put a finished folder in the place of an old one."""
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
        os.replace(folder, old)
        os.replace(scratch, folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(scratch, folder)
