"""The rows of a manifest as a table: columns, checks, digests and their Parquet file.

The table is a pandas DataFrame indexed by ``id`` (text) with the columns of :data:`COLUMNS`:

==================  =======  ==============================================================
split               str      ``train``, ``validation`` or ``test`` in the shipped manifests
sex                 float64  normalised: 0 female, 1 male
age                 float64  normalised
ventricular_volume  float64  normalised
brain_volume        float64  normalised
seed                Int64    non-negative; missing for published rows
origin              str      ``recipe`` or ``published``
==================  =======  ==============================================================
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from generation.covariates import NAMES, conditioning
from synthbrain.errors import CovariateError, ManifestError

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

COLUMNS: tuple[str, ...] = ("split", *NAMES, "seed", "origin")
PUBLISHED = "published"
"""Origin of rows whose voxels exist; stands where a generator's identity does, too."""
ORIGINS = ("recipe", PUBLISHED)
POSITION = "position"
"""Extra column of a saved selection: the row's number in the parent, where its volume is kept."""
SHA256 = "sha256"
"""Extra column once contents are known: sha256 of each volume's shard, or missing."""

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_SPLITS = ((0.8, "train"), (0.9, "validation"), (1.0, "test"))


def make_table(columns: dict[str, Any], ids: Any, where: str = "these rows") -> pd.DataFrame:
    """A table of rows with the documented types, checked by :func:`check_table`."""
    import pandas as pd

    table = pd.DataFrame({name: columns[name] for name in COLUMNS})
    table.index = pd.Index(ids, name="id", dtype="str")
    table = table.astype(
        {"split": "str", "origin": "str", "seed": "Int64"} | dict.fromkeys(NAMES, "float64")
    )
    check_table(table, where)
    return table


def split_of(id: str) -> str:
    """The split a row belongs to: 80 / 10 / 10 by a hash of its id, for ever.

    Examples
    --------
    >>> split_of("sb000000")
    'train'
    """
    digest = hashlib.sha256(f"synthbrain split 1:{id}".encode()).digest()
    fraction = int.from_bytes(digest[:8], "big") / 2**64
    return next(name for bound, name in _SPLITS if fraction < bound)


def check_table(table: pd.DataFrame, where: str) -> None:
    """Refuse a table that no later step could trust.

    Raises
    ------
    ManifestError
        A column is missing, an id repeats, an id or a split is not a plain word, a covariate is
        not finite, a recipe has no seed, or an origin is unknown.
    """
    absent = [name for name in COLUMNS if name not in table.columns]
    if absent:
        raise ManifestError(
            f"{where}: column(s) {', '.join(absent)} missing; found {list(table.columns)}"
        )
    try:
        conditioning(table)
    except CovariateError as error:
        raise ManifestError(f"{where}: {error}") from None
    if table.index.has_duplicates:
        raise ManifestError(f"{where}: id {table.index[table.index.duplicated()][0]!r} repeats")
    for what, words in (("id", table.index.to_numpy(object)), ("split", table["split"].unique())):
        odd = [word for word in words if not (isinstance(word, str) and _WORD.fullmatch(word))]
        if odd:
            raise ManifestError(
                f"{where}: {what} {odd[0]!r} is not made of letters, digits, '-' and '_' only"
            )
    strange = set(table["origin"].unique()) - set(ORIGINS)
    if strange:
        raise ManifestError(
            f"{where}: unknown origin {sorted(strange)[0]!r}, expected one of {', '.join(ORIGINS)}"
        )
    seedless = table["seed"].isna() & (table["origin"] == "recipe")
    if seedless.any():
        raise ManifestError(f"{where}: recipe {table.index[seedless][0]!r} has no seed")
    if (table["seed"] < 0).any():
        raise ManifestError(f"{where}: seeds must not be negative")


def digest_rows(table: pd.DataFrame) -> str:
    """Identity of the rows: sha256 of ids, splits, covariates, seeds and origins, in order.

    Where volumes lie, and what bytes they turned into, does not enter.
    """
    digest = hashlib.sha256(b"synthbrain rows 1\n")
    for texts in (table.index, table["split"], table["origin"]):
        # As objects: going through pandas' own strings one by one takes ten times as long.
        digest.update("\n".join(texts.to_numpy(dtype=object)).encode() + b"\n\n")
    digest.update(table[list(NAMES)].to_numpy(dtype="<f8").tobytes())
    digest.update(table["seed"].fillna(-1).to_numpy(dtype="<i8").tobytes())
    return digest.hexdigest()


def digest_contents(sha256: pd.Series[str]) -> str | None:
    """Identity of the bytes: sha256 of all shard hashes, or None while any is unknown."""
    if len(sha256) == 0 or sha256.isna().any():
        return None
    return hashlib.sha256("\n".join(sha256).encode()).hexdigest()


def read_rows(path: Path) -> tuple[pd.DataFrame, NDArray[np.uint32] | None, pd.Series[str] | None]:
    """Read ``rows.parquet``: the table, the positions and the shard hashes, where present.

    Raises
    ------
    ManifestError
        The file is missing, not Parquet, or holds other columns or types.
    """
    import pandas as pd

    try:
        raw = pd.read_parquet(path)
    except FileNotFoundError:
        raise ManifestError(f"{path} is missing; restore it or save the manifest again") from None
    except Exception as error:
        raise ManifestError(
            f"{path} is not a readable Parquet file ({str(error).splitlines()[0]}); restore it"
        ) from None
    unknown = set(raw.columns) - {*COLUMNS, "id", POSITION, SHA256}
    if unknown or "id" not in raw.columns:
        raise ManifestError(
            f"{path}: expected the columns id, {', '.join(COLUMNS)}; found {list(raw.columns)}"
        )
    positions = _positions(raw.pop(POSITION), path) if POSITION in raw else None
    sha256 = raw.pop(SHA256) if SHA256 in raw else None
    ids = raw.pop("id")
    try:
        table = make_table({name: raw[name] for name in raw.columns}, ids.to_numpy())
    except KeyError as error:
        raise ManifestError(f"{path}: column {error} is missing; found {list(raw)}") from None
    except (TypeError, ValueError) as error:
        raise ManifestError(f"{path}: {error}") from None
    return table, positions, sha256


def _positions(column: pd.Series[Any], path: Path) -> NDArray[np.uint32]:
    if column.dtype != np.uint32 or column.duplicated().any():
        raise ManifestError(f"{path}: positions must be uint32 and unique, found {column.dtype}")
    return column.to_numpy()


def write_rows(
    path: Path,
    table: pd.DataFrame,
    positions: NDArray[np.uint32] | None,
    sha256: pd.Series[str] | None,
) -> None:
    """Write ``rows.parquet``, zstd-compressed."""
    out = table.reset_index()
    if positions is not None:
        out[POSITION] = positions
    if sha256 is not None:
        out[SHA256] = sha256.to_numpy()
    out.to_parquet(path, compression="zstd", index=False)


def bids_label(id: str) -> str:
    """A row's id as a BIDS label, which holds letters and digits only.

    Examples
    --------
    >>> bids_label("sub-000_12")
    '00012'
    """
    return "".join(letter for letter in id.removeprefix("sub-") if letter.isalnum())
