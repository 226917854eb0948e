"""The table of covariates that comes with published volumes, as rows of a manifest."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from generation.covariates import COVARIATES, NAMES, CovariateError, parse_sex
from synthbrain.errors import ManifestError
from synthbrain.rows import make_table, split_of

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

_LIMIT = 2**28
"""No table of covariates takes 256 MB."""

_NORMALISED = 10.0
"""Ages, in years, and volumes, in mm³, all lie above this; normalised values all below."""


def read_participants(
    data: bytes, aliases: Mapping[str, tuple[str, ...]], where: str
) -> pd.DataFrame:
    """Rows out of ``participants.tsv``.

    Parameters
    ----------
    data
        The file: tab-separated text with a header line (BIDS 1.10, participants file).
    aliases
        Accepted headers for each column of ours; letter case does not matter.
    where
        Names the file in errors.

    Returns
    -------
    pandas.DataFrame
        As :mod:`synthbrain.rows` describes, origin ``published``. Ages in years and volumes in
        mm³ are normalised; columns that are normalised already are kept.

    Raises
    ------
    ManifestError
        A column is missing or ambiguous, or a value is not one.
    """
    import pandas as pd

    if len(data) > _LIMIT:
        raise ManifestError(f"{where} has {len(data):,} bytes: no table of covariates")
    try:
        raw = pd.read_csv(io.BytesIO(data), sep="\t", dtype=str, keep_default_na=False)
    except (ValueError, UnicodeDecodeError) as error:
        raise ManifestError(f"{where} is not tab-separated text ({error})") from None
    found = _columns(raw, aliases, where)
    ids = [_id(text) for text in raw[found["id"]]]
    columns: dict[str, Any] = {"sex": _sexes(raw[found["sex"]], where)}
    for covariate in COVARIATES[1:]:
        values = _numbers(raw[found[covariate.name]], where)
        natural = bool(len(values)) and float(np.abs(values).max()) > _NORMALISED
        columns[covariate.name] = covariate.normalise(values) if natural else values
    columns |= {
        "split": [split_of(id) for id in ids],
        "seed": pd.array([pd.NA] * len(ids), dtype="Int64"),
        "origin": np.full(len(ids), "published", dtype=object),
    }
    return make_table(columns, ids, where)


def _columns(
    raw: pd.DataFrame, aliases: Mapping[str, tuple[str, ...]], where: str
) -> dict[str, str]:
    found = {}
    for name in ("id", *NAMES):
        accepted = {alias.lower() for alias in (name, *aliases.get(name, ()))}
        fitting = [column for column in raw.columns if column.strip().lower() in accepted]
        if len(fitting) != 1:
            raise ManifestError(
                f"{where} has {len(fitting) or 'no'} columns for {name}, expected one of "
                f"{', '.join(sorted(accepted))}; found {', '.join(raw.columns)}"
            )
        found[name] = fitting[0]
    return found


def _id(text: str) -> str:
    label = text.strip()
    return label if label.startswith("sub-") else f"sub-{label}"


def _sexes(column: pd.Series[str], where: str) -> list[float]:
    try:
        known = {text: float(parse_sex(_sex(text))) for text in column.unique()}
    except CovariateError as error:
        raise ManifestError(f"{where}: {error}") from None
    return [known[text] for text in column]


def _sex(text: str) -> str | float:
    word = text.strip()
    return float(word) if re.fullmatch(r"[01](\.0*)?", word) else word


def _numbers(column: pd.Series[str], where: str) -> NDArray[np.float64]:
    try:
        return column.to_numpy(dtype=np.float64)
    except ValueError as error:
        raise ManifestError(f"{where}, column {column.name}: {error}") from None
