"""Real and synthetic volumes as one training set.

Which rows an epoch has, and where, is decided for the epoch as a whole: a pure function of seed
and epoch that every process computes for itself.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Number
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset

from generation.covariates import NAMES
from synthbrain.ahead import HasSupply
from synthbrain.dataset import Sample, Transform
from synthbrain.errors import UsageError
from synthbrain.mixing.landmarks import Landmarks
from synthbrain.mixing.rows import (
    REAL,
    STREAM,
    SYNTHETIC,
    Rule,
    chosen,
    counts,
    orders,
)
from synthbrain.mixing.tables import (
    Balance,
    bins_of,
    check_units,
    innermost,
    tables_of,
)

if TYPE_CHECKING:
    import pandas as pd
    import torchio
    from numpy.typing import NDArray

    from synthbrain.ahead import Supply

Match = Callable[[torch.Tensor], torch.Tensor]

_REFERENCES = 16


def mix(
    real: Dataset[Any],
    synthetic: Dataset[Any],
    *,
    ratio: float,
    seed: int = 0,
    balance: str | Balance | None = None,
    match: Literal["histogram"] | Match | None = None,
    length: int | None = None,
    keys: Mapping[str, str] | Sequence[str] | None = None,
    transform: Transform | None = None,
) -> Mixed:
    """Mix real and synthetic samples into one map-style dataset.

    Parameters
    ----------
    real, synthetic
        Map-style datasets of dictionaries; ``synthetic`` is a
        :class:`synthbrain.SynthBrainDataset`, or anything with its keys.
    ratio
        Share of synthetic samples, 0 to 1.
    seed
        Seed of every epoch's choice, in [0, 2**64).
    balance
        Draw synthetic rows so that this covariate becomes as evenly distributed over the whole
        mix as it can. Up to ten different values are a bin each, more are cut into ten bins of
        equal width. A callable gets a table of covariates and returns one label per row, its bin.
        Needs tables of both: a ``table`` attribute with a row per sample, or the list of
        dictionaries that MONAI's datasets have as ``data``; subsets and concatenations of
        such will do.
    match
        ``"histogram"`` gives every synthetic ``image`` the intensities of real ones: see
        :class:`Landmarks`, here of up to 16 real volumes that ``seed`` chooses, read now. Or a
        callable from image to image.
    length
        Samples of an epoch; by default as many as it takes to see every real row once.
    keys
        Which keys samples have, and what ``real`` calls them, as ``{"image": "T1w",
        "age": "age_years"}``; or a list, where it calls them the same. By default ``image`` and
        the four covariates.
    transform
        Called with each mixed sample.

    Returns
    -------
    Mixed
        An epoch has ``length`` samples, ``round(ratio * length)`` of them synthetic. By default
        all n real rows are there once, with ``round(n * ratio / (1 - ratio))`` synthetic ones; with
        ``ratio=1`` every synthetic row is there once. On either side no row comes back before
        all have been seen: what is asked for beyond the rows there are goes through them
        again in another order. With ``balance`` this holds within each bin of synthetic rows.

    Raises
    ------
    UsageError
        An argument makes no sense, a side that is needed has no rows, or ``balance`` needs
        covariates that are not known or in other units than the other side's.

    Examples
    --------
    >>> from synthbrain.testing import TinyGenerator, tiny_manifest
    >>> scans, extra = (
    ...     SynthBrainDataset(tiny_manifest(n), generator=TinyGenerator()) for n in (6, 50)
    ... )
    >>> mixed = mix(scans, extra, ratio=0.75)
    >>> len(mixed), int((mixed.table(0)["origin"] == "synthetic").sum())
    (24, 18)
    """
    sizes = (len(real), len(synthetic))  # type: ignore[arg-type]
    if not 0 <= seed < 2**64:
        raise UsageError(f"seed must lie in [0, 2**64), found {seed}")
    names = _names(keys)
    tables = tables_of(real, synthetic, names)
    units = getattr(innermost(synthetic), "units", None)
    bins = None if balance is None else bins_of(balance, tables, units)
    rule = Rule(seed, sizes, counts(sizes, ratio, length), bins)
    mixed = Mixed(real, synthetic, rule, names, tables, transform)
    if match is not None and "image" not in names:
        raise UsageError(f"match changes 'image', which is not in keys={list(names)}")
    if match == "histogram":
        mixed.match = _reference(mixed, seed)
    elif match is None or callable(match):
        mixed.match = match
    else:
        raise UsageError(f"match must be 'histogram' or a callable, found {match!r}")
    return mixed


class Mixed(Dataset[Any]):
    """Real and synthetic samples in one dataset; made by :func:`mix`.

    Notes
    -----
    A sample is a dict of the keys asked for, ``id`` (text; the row's number where a real sample
    has none) and ``origin``, ``"real"`` or ``"synthetic"``. Covariates are float32 scalars or text.
    Positions are in random order already; shuffling them again does no harm.
    """

    def __init__(
        self,
        real: Dataset[Any],
        synthetic: Dataset[Any],
        rule: Rule,
        names: Mapping[str, str],
        tables: tuple[pd.DataFrame | None, pd.DataFrame | None],
        transform: Transform | None,
    ) -> None:
        self.real, self.synthetic = real, synthetic
        self.transform = transform
        self.match: Match | None = None
        self._rule, self._names, self._tables = rule, names, tables
        self._units = getattr(innermost(synthetic), "units", None)
        self._seen: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {}
        # Shared memory, so that set_epoch also reaches workers that are already running.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return sum(self._rule.counts)

    def __getitem__(self, index: int) -> Any:
        """The sample at a position of the current epoch; negative ones count from the end.

        Raises
        ------
        IndexError
            There is no such position.
        UsageError
            A key is missing, or real and synthetic samples do not fit together.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The samples of a batch; each side is asked once, so missing rows are made together."""
        places = np.array([self._checked(index) for index in indices], dtype=np.int64)
        is_synthetic, rows = (array[places] for array in chosen(self._rule, int(self._epoch)))
        samples: list[Any] = [None] * len(places)
        for dataset, origin, mine in (
            (self.real, REAL, np.flatnonzero(~is_synthetic)),
            (self.synthetic, SYNTHETIC, np.flatnonzero(is_synthetic)),
        ):
            wanted = rows[mine].tolist()
            for place, row, sample in zip(mine, wanted, _fetched(dataset, wanted), strict=True):
                samples[place] = self._harmonised(sample, origin, row)
        return samples if self.transform is None else [self.transform(one) for one in samples]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch.share_memory_()  # a pickled copy has workers of its own

    def __repr__(self) -> str:
        real, synthetic = self._rule.counts
        return f"<Mixed: {real:,} real and {synthetic:,} synthetic samples an epoch>"

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, of both sides too; reaches running workers."""
        if not 0 <= epoch < 2**31:
            raise UsageError(f"epoch must lie in [0, 2**31), found {epoch}")
        self._epoch.fill_(epoch)
        for dataset in (self.real, self.synthetic):
            _set_epoch(dataset, epoch)

    def supply(self) -> Supply | None:
        """How :class:`synthbrain.SynthBrainSampler` has synthetic rows before they are asked for.

        Of the epoch that is set, and of synthetic datasets that can say what they miss.
        """
        inner = self.synthetic.supply() if isinstance(self.synthetic, HasSupply) else None
        return None if inner is None else _SyntheticSupply(inner, self)

    def table(self, epoch: int) -> pd.DataFrame:
        """The rows of an epoch, in order of position.

        Returns
        -------
        pandas.DataFrame
            ``origin``, ``row`` (number within its side), and what the sides' tables know of ``id``
            and covariates, in the units of samples.
        """
        import pandas as pd

        is_synthetic, rows = chosen(self._rule, epoch)
        table = pd.DataFrame({"origin": np.where(is_synthetic, SYNTHETIC, REAL), "row": rows})
        known = [
            part.iloc[rows[mask]].set_axis(np.flatnonzero(mask))
            for part, mask in zip(self._tables, (~is_synthetic, is_synthetic), strict=True)
            if part is not None and mask.any()
        ]
        return table.join(pd.concat(known)) if known else table

    def _checked(self, index: int) -> int:
        size, index = len(self), operator.index(index)
        if not -size <= index < size:
            raise IndexError(f"position {index} of a mix with {size} samples")
        return index % size

    def _harmonised(self, sample: Any, origin: str, row: int) -> Sample:
        """A sample of one side with the keys, types and units of both."""
        if not isinstance(sample, Mapping):
            raise UsageError(
                f"{origin} samples must be dictionaries, found {type(sample).__name__}; "
                "wrap the dataset in one that names its values"
            )
        id = str(sample.get(self._names.get("id", "id") if origin == REAL else "id", row))
        theirs = {name: alias if origin == REAL else name for name, alias in self._names.items()}
        mixed = {name: _plain(name, sample.get(alias)) for name, alias in theirs.items()}
        if absent := [theirs[name] for name, value in mixed.items() if _is_missing(value)]:
            raise UsageError(
                f"{origin} sample {id!r} lacks {', '.join(absent)}; keys= says which keys to mix "
                f"and what real samples call them, and this one has {', '.join(map(str, sample))}"
            )
        if origin == SYNTHETIC and self.match is not None:
            mixed["image"] = self.match(mixed["image"])
        for name, value in mixed.items():
            if torch.is_tensor(value):
                self._check_fit(name, value, origin)
            elif origin == REAL and name in NAMES:
                check_units(name, np.array([value]), self._units)
        return {**mixed, "id": id, "origin": origin}

    def _check_fit(self, name: str, value: torch.Tensor, origin: str) -> None:
        """Refuse what a batch could not hold beside the other side's."""
        seen = self._seen.setdefault(name, {})
        mine = (tuple(value.shape), value.dtype)
        seen.setdefault(origin, mine)
        other = seen.get(REAL if origin == SYNTHETIC else SYNTHETIC, mine)
        if mine != other:
            real, synthetic = (mine, other) if origin == REAL else (other, mine)
            raise UsageError(
                f"{name} of real samples is {real[0]} {real[1]}, of synthetic ones {synthetic[0]} "
                f"{synthetic[1]}; they must agree: `synthbrain prepare` brings scans to the "
                "synthetic volumes' grid and scale"
            )


@dataclass
class _SyntheticSupply:
    """The synthetic side's supply, by position in the mix."""

    inner: Supply
    mixed: Mixed

    @property
    def batch(self) -> int:
        return self.inner.batch

    def missing(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        is_synthetic, mine = self._rows(rows)
        missing = is_synthetic.copy()
        missing[is_synthetic] = self.inner.missing(mine)
        return missing

    def prepare(self, rows: NDArray[np.int64]) -> bool:
        return self.inner.prepare(np.unique(self._rows(rows)[1]))

    def _rows(self, places: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Which positions hold synthetic samples, and the rows of those."""
        synthetic, rows = chosen(self.mixed._rule, int(self.mixed._epoch))
        return synthetic[places], rows[places][synthetic[places]]


def _names(keys: Mapping[str, str] | Sequence[str] | None) -> dict[str, str]:
    """What mixed samples call each value, and what real ones do."""
    if isinstance(keys, str):
        raise UsageError(f"keys must be a list or mapping of names, found {keys!r}")
    if keys is None:
        keys = ("image", *NAMES)
    return dict(keys) if isinstance(keys, Mapping) else {key: key for key in keys}


def _fetched(dataset: Dataset[Any], rows: list[int]) -> Iterable[Any]:
    together = getattr(dataset, "__getitems__", None)
    return together(rows) if rows and together else [dataset[row] for row in rows]


def _set_epoch(dataset: Dataset[Any], epoch: int) -> None:
    dataset = innermost(dataset)
    if isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            _set_epoch(part, epoch)
    elif hasattr(dataset, "set_epoch"):
        dataset.set_epoch(epoch)


def _is_missing(value: Any) -> bool:
    if isinstance(value, Number):
        return bool(value != value)
    pandas = sys.modules.get("pandas")  # whose NA is no number, and nobody's who did not import it
    return value is None or (pandas is not None and value is pandas.NA)


def _plain(name: str, value: Any) -> Any:
    """Text, a scalar or a tensor: one type per kind, as collating takes the first sample's."""
    if isinstance(value, np.ndarray) and value.ndim:
        value = torch.from_numpy(value)
    if torch.is_tensor(value) and value.ndim:
        return value.float() if value.dtype == torch.float64 else value
    if hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, Number) or (isinstance(value, Integral) and name not in NAMES):
        return value
    return np.float32(value)  # type: ignore[arg-type]


def _reference(mixed: Mixed, seed: int) -> Landmarks:
    """Landmarks of some real volumes; the synthetic ones must be whole, too."""
    if getattr(innermost(mixed.synthetic), "patch_size", None) is not None:
        raise UsageError(
            "match='histogram' takes whole volumes, a patch's histogram is that of its place; "
            "leave out patch_size and crop in transform="
        )
    stream = np.random.Philox(key=np.array([seed, STREAM], np.uint64))
    size = len(mixed.real)  # type: ignore[arg-type]
    rows = orders(stream, 1, size)[0][:_REFERENCES].tolist()
    return Landmarks.of(mixed._harmonised(mixed.real[row], REAL, row)["image"] for row in rows)


def as_subject(sample: Mapping[str, Any]) -> torchio.Subject:
    """A sample as TorchIO's transforms take it.

    Parameters
    ----------
    sample
        With an ``image``, ``(1, x, y, z)``.

    Returns
    -------
    torchio.Subject
        ``image`` as a :class:`torchio.ScalarImage`, with its affine if it is a
        :class:`monai.data.MetaTensor` and the identity otherwise; all else as it is.
    """
    import torchio

    image = sample["image"]
    affine = getattr(image, "affine", None)
    tensor = image if affine is None else image.as_tensor()
    rest = {name: value for name, value in sample.items() if name != "image"}
    return torchio.Subject(image=torchio.ScalarImage(tensor=tensor, affine=affine), **rest)
