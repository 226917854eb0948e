"""What is known of the rows of datasets before any of their volumes is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import ConcatDataset, Dataset, Subset

from generation.covariates import NAMES, SEXES, by_name
from synthbrain.dataset import SynthBrainDataset
from synthbrain.errors import UsageError
from synthbrain.mixing.rows import REAL, SYNTHETIC, Ints

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike, NDArray

Balance = Callable[["pd.DataFrame"], "ArrayLike"]

_BINS = 10
_LARGEST_NORMALISED = 5.0
"""No head measured in normalised covariates gets here, and none in mm³ stays below."""


def check_units(name: str, values: NDArray[Any], units: str | None) -> None:
    """Refuse real covariates that are plainly in other units than the synthetic ones."""
    words = values.dtype.kind not in "biuf"
    large = words or bool(np.abs(values).max(initial=0) > _LARGEST_NORMALISED)
    small = name != "age" and not large  # an infant's age is small in years too
    if (units == "normalised" and large) or (units == "natural" and small):
        raise UsageError(
            f"real samples have {name} = {values.flat[0]} and the synthetic ones' are {units}; "
            "build the synthetic dataset with units='natural' for years, mm³ and words, or "
            "'normalised', whichever the real ones are in"
        )


def _table(dataset: Dataset[Any]) -> pd.DataFrame | None:
    """What a dataset's rows are, in the units of its samples, where that is known."""
    import pandas as pd

    if isinstance(dataset, Subset):
        table = _table(dataset.dataset)
        return None if table is None else table.iloc[list(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        tables = [_table(part) for part in dataset.datasets]
        known = [table for table in tables if table is not None]
        return pd.concat(known) if len(known) == len(tables) else None
    table, data = getattr(dataset, "table", None), getattr(dataset, "data", None)
    if isinstance(dataset, SynthBrainDataset):
        return _in_units(dataset)
    if isinstance(table, pd.DataFrame):
        return table
    if isinstance(data, Sequence) and all(isinstance(row, Mapping) for row in data):
        return pd.DataFrame(list(data))
    return None


def _in_units(dataset: SynthBrainDataset) -> pd.DataFrame:
    table = dataset.table.reset_index(names="id")
    if dataset.units == "natural":
        for name in NAMES:
            table[name] = by_name(name).denormalise(table[name])
        table["sex"] = np.array(list(SEXES), dtype=object)[(table["sex"] > 0.5).astype(int)]
    return table


def tables_of(
    real: Dataset[Any], synthetic: Dataset[Any], names: Mapping[str, str]
) -> tuple[pd.DataFrame | None, pd.DataFrame | None]:
    """Ids and covariates of both sides, under the names mixed samples have."""
    theirs, ours = _table(real), _table(synthetic)
    for table, dataset, origin in ((theirs, real, REAL), (ours, synthetic, SYNTHETIC)):
        if table is not None and len(table) != len(dataset):  # type: ignore[arg-type]
            raise UsageError(
                f"the {origin} dataset has a table of {len(table)} rows for "
                f"{len(dataset)} samples; expected a row per sample"  # type: ignore[arg-type]
            )
    return _columns(theirs, names), _columns(ours, {name: name for name in names})


def _columns(table: pd.DataFrame | None, names: Mapping[str, str]) -> pd.DataFrame | None:
    """Columns by the names mixed samples have, where a table has them."""
    if table is None:
        return None
    found = {name: alias for name, alias in {"id": "id", **names}.items() if alias in table}
    return table[list(found.values())].set_axis(list(found), axis=1)


def bins_of(
    balance: str | Balance,
    tables: tuple[pd.DataFrame | None, pd.DataFrame | None],
    units: str | None,
) -> tuple[Ints, Ints]:
    """The bin of every row of both sides, numbered from 0."""
    real, synthetic = (
        _labels(balance, table, origin)
        for table, origin in zip(tables, (REAL, SYNTHETIC), strict=True)
    )
    if balance in NAMES:
        check_units(str(balance), real, units)
    labels = np.concatenate([real, synthetic])
    bins = np.unique(labels, return_inverse=True)[1]
    if not callable(balance) and labels.dtype.kind in "iuf" and bins.max(initial=0) >= _BINS:
        bins = np.digitize(labels, np.linspace(labels.min(), labels.max(), _BINS + 1)[1:-1])
    return bins[: len(real)], bins[len(real) :]


def _labels(balance: str | Balance, table: pd.DataFrame | None, origin: str) -> NDArray[Any]:
    """What decides each row's bin."""
    import pandas as pd

    if table is None or (isinstance(balance, str) and balance not in table):
        known = "no table" if table is None else f"one of {list(table)}"
        raise UsageError(
            f"balance={balance!r} takes a table of the {origin} rows that has it; this dataset has "
            f"{known}: give it an attribute `table` with a row per sample, and name in keys= what "
            "it has"
        )
    labels = np.asarray(balance(table) if callable(balance) else table[balance])
    if labels.shape != (len(table),):
        raise UsageError(
            f"balance must give one label per row, shape ({len(table)},), found {labels.shape}"
        )
    if unknown := int(pd.isna(labels).sum()):
        raise UsageError(
            f"{unknown} {origin} rows have no value for balance={balance!r}; leave them out, "
            "as with torch.utils.data.Subset"
        )
    return labels


def innermost(dataset: Dataset[Any]) -> Dataset[Any]:
    """What a subset, or a subset of one, is of."""
    return innermost(dataset.dataset) if isinstance(dataset, Subset) else dataset
