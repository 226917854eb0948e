"""Data sets as command lines name them: cohorts, prepared scans, phantoms made on the way."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

from synthbrain.cohort import draw_cohort
from synthbrain.dataset import SynthBrainDataset
from synthbrain.errors import UsageError
from synthbrain.manifest import Manifest

PHANTOMS = "phantoms"
_PHANTOMS = 1000


def opener(
    data: str, *, generator: str | None = "auto", store: Path | None = None
) -> Callable[..., SynthBrainDataset]:
    """What opens the data set of that name; takes further arguments of the dataset.

    Parameters
    ----------
    data
        Name or folder of a manifest; a folder that `synthbrain prepare` wrote; or ``"phantoms"``,
        ``"phantoms:500"``, ``"phantoms:500:7"`` for heads made on the way: 1000 of seed 0 without
        numbers.
    generator, store
        As in :class:`synthbrain.SynthBrainDataset`; phantoms are made by ``"phantom"`` unless there
        is no generator, or another one than ``"auto"``.

    Raises
    ------
    UsageError
        Phantoms in another form.
    """
    make = functools.partial(SynthBrainDataset, generator=generator, store=store)
    if data.partition(":")[0] == PHANTOMS:
        maker = "phantom" if generator == "auto" else generator
        return functools.partial(make, _phantoms(data), generator=maker)
    folder = Path(data)
    if (folder / "manifest").is_dir():
        made = store or folder / "store"
        return functools.partial(make, folder / "manifest", generator=None, store=made)
    return functools.partial(make, data)


def _phantoms(data: str) -> Manifest:
    found = re.fullmatch(rf"{PHANTOMS}(?::([1-9]\d*))?(?::(\d+))?", data)
    if found is None:
        raise UsageError(f"write {PHANTOMS}, {PHANTOMS}:500 or {PHANTOMS}:500:7; found {data!r}")
    count, seed = int(found[1] or _PHANTOMS), int(found[2] or 0)
    return draw_cohort(count, name=PHANTOMS, seed=seed)
