"""The demonstration: a grid of brains drawn, made, stored, streamed and looked at."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from generation.covariates import BRAIN_VOLUME, NAMES
from synthbrain.cohort import draw_cohort, recipes
from synthbrain.dataset import SynthBrainDataset
from synthbrain.manifest import Manifest
from synthbrain.progress import track
from synthbrain.sheet import Sheet, contact_sheet

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from generation.generator import Generator

AGES = (48, 58, 68, 78)
"""Years, one a row."""

VENTRICLES = (10, 20, 40, 80, 150)
"""mL, one a column."""

_BATCH = 4


@dataclass(frozen=True)
class Demo:
    """What a demonstration left behind, and how long it took.

    Parameters
    ----------
    cohort
        Folder of the manifest.
    picture
        The contact sheet.
    store
        Folder of the volumes.
    made_by
        Identity of the generator.
    made, volumes
        How many volumes were made now, of how many.
    first_epoch, second_epoch
        Seconds each pass over the DataLoader took.
    bytes_stored
        Disk the volumes take.
    """

    cohort: Path
    picture: Path
    store: Path
    made_by: str
    made: int
    volumes: int
    first_epoch: float
    second_epoch: float
    bytes_stored: int


def grid_cohort(
    ages: Sequence[float] = AGES, ventricles: Sequence[float] = VENTRICLES, *, seed: int = 0
) -> Manifest:
    """A cohort with one brain for every age and ventricular volume, row by row.

    Parameters
    ----------
    ages
        Years.
    ventricles
        mL.
    seed
        Decides brain volumes, drawn from what is usual at that age and ventricular volume, and
        everything the covariates leave open. Women and men alternate.

    Examples
    --------
    >>> len(grid_cohort((50, 70), (20, 40, 60)))
    6
    """
    cells = [(age, volume) for age in ages for volume in ventricles]
    drawn: dict[str, list[float]] = {name: [] for name in NAMES}
    template = None
    for number, (age, volume) in enumerate(cells):
        template = draw_cohort(
            1,
            age_years=(age, age),
            ventricular_mm3=(volume * 1000.0, volume * 1000.0),
            sex=("female", "male")[sum(divmod(number, len(ventricles))) % 2],
            seed=seed * len(cells) + number,
            name="demo",
        )
        for name in NAMES:
            drawn[name].append(float(template.table[name].iloc[0]))
    assert template is not None
    columns: dict[str, NDArray[Any]] = {name: np.array(drawn[name]) for name in NAMES}
    about = {"drawn": f"synthbrain.demo.grid_cohort({ages}, {ventricles}, seed={seed})"}
    header = template.header.model_copy(
        update={"description": "a grid of ages and ventricular volumes", "provenance": about}
    )
    return Manifest.create(header, recipes(columns, stem="demo", seed=seed))


def run_demo(
    out: Path,
    *,
    ages: Sequence[float] = AGES,
    ventricles: Sequence[float] = VENTRICLES,
    generator: str | Generator = "auto",
    store: Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Demo:
    """Draw a grid of brains, have them made by a DataLoader, and lay them out.

    Parameters
    ----------
    out
        Folder for ``cohort/`` and ``contact-sheet.png``.
    ages, ventricles, seed
        As in :func:`grid_cohort`.
    generator, store
        As in :class:`synthbrain.SynthBrainDataset`.
    progress
        Show a progress bar on standard error.

    Raises
    ------
    SynthBrainError
        As in :class:`synthbrain.SynthBrainDataset`, and if ``out`` cannot be written to.
    """
    cohort = grid_cohort(ages, ventricles, seed=seed).save(out / "cohort", overwrite=True)
    dataset = SynthBrainDataset(cohort, generator=generator, store=store)
    made, resolver = len(dataset.missing()), dataset.resolver
    first = _epoch(dataset, "making" if made else "reading", show=progress)[0]
    second, volumes = _epoch(dataset, "reading", show=False)
    sheet = _sheet(dataset, ages, ventricles, f"seed {seed}")
    page = contact_sheet(volumes, dataset.manifest.header.geometry.affine, sheet)
    page.save(out / "contact-sheet.png", optimize=True)
    return Demo(
        cohort=cohort,
        picture=out / "contact-sheet.png",
        store=resolver.recipes.root,
        made_by=resolver.made_by or "",
        made=made,
        volumes=len(dataset),
        first_epoch=first,
        second_epoch=second,
        bytes_stored=sum(
            resolver.path(i).stat().st_size for i in np.flatnonzero(resolver.stored()).tolist()
        ),
    )


def _epoch(dataset: SynthBrainDataset, what: str, *, show: bool) -> tuple[float, list[Any]]:
    """One pass over the DataLoader: seconds, and the volumes, ``(x, y, z)`` each."""

    def volumes() -> Iterator[Any]:
        # Nothing is made ahead: this process is soon done.
        order = dataset.sampler(shuffle=False, ahead=0)
        for batch in dataset.loader(batch_size=_BATCH, sampler=order):
            yield from batch["image"][:, 0].numpy()

    start = time.perf_counter()
    found = list(track(volumes(), total=len(dataset), what=what, show=show))
    return time.perf_counter() - start, found


def _sheet(
    dataset: SynthBrainDataset, ages: Sequence[float], ventricles: Sequence[float], seed: str
) -> Sheet:
    table = dataset.table
    brains = BRAIN_VOLUME.denormalise(table["brain_volume"]) / 1000
    words = np.where(table["sex"] > 0.5, "male", "female")
    sheet = Sheet(
        title=f"{len(table)} heads that never existed",
        subtitle="Older from top to bottom, larger ventricles from left to right",
        rows=[f"age {age:g} y" for age in ages],
        columns=[f"{volume:g} mL" for volume in ventricles],
        column_title="ventricles",
        captions=[f"{w}, brain {b:,.0f} mL" for w, b in zip(words, brains, strict=True)],
    )
    where = f"{sheet.plane} slice at {sheet.position:g} mm, 1 mm voxels, one intensity window"
    footer = f"{dataset.resolver.made_by}   {seed}   {where}"
    return Sheet(**{**vars(sheet), "footer": footer})
