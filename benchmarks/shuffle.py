"""How well a stream's order mixes rows, against a full shuffle, and what it costs to fetch.

``python benchmarks/shuffle.py --out benchmarks/shuffle.md`` takes some seconds; no volume is read.
"""

from __future__ import annotations

import argparse
import platform
import timeit
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from synthbrain import Manifest
from synthbrain.sampler import epoch_order
from synthbrain.sizes import size_text
from synthbrain.sources.url import LIMIT
from synthbrain.store import BLOCK
from synthbrain.stream.order import RUN, WINDOW, runs_of, stream_order

Array = np.ndarray[Any, np.dtype[Any]]

EPOCHS = 4
VOLUME = 2.75e6
"""Bytes of an average volume; see loading.md."""

ORDERS = [
    (BLOCK, 1024), (BLOCK, 4096), (BLOCK, 16384),
    (50, 1024), (50, 4096), (20, 512), (20, 1024), (20, 2048), (20, 4096),
    (10, 256), (10, 512), (10, 1024), (10, 2048), (10, 4096), (5, 1024),
]  # fmt: skip


@dataclass(frozen=True)
class Figures:
    """What is known of one order, averaged over epochs."""

    name: str
    correlation: float
    apart: float
    together: float
    packs_of_8: float
    packs_of_32: float
    least_of_32: float
    requests: str
    held: str
    packs: str

    def text(self) -> str:
        """Itself in Markdown."""
        return (
            f"| {self.name} | {self.correlation:.3f} | {self.apart:,.0f} | {self.together:.2%} | "
            f"{self.packs_of_8:.2f} | {self.packs_of_32:.1f} | {self.least_of_32:.0f} | "
            f"{self.requests} | {self.held} | {self.packs} |"
        )


def main() -> None:
    """Measure, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--manifest", default="synthbrain-100k", help="whose rows")
    options = parser.parse_args()
    positions = Manifest.open(options.manifest).positions.astype(np.int64)
    rows = [figures.text() for figures in measure(positions)]
    report = "\n".join([*heading(options.manifest, positions), *rows, ""])
    print(report)
    if options.out:
        options.out.write_text(report, encoding="utf-8")


def heading(name: str, positions: Array) -> list[str]:
    """What stands above the rows of the table."""
    runs = runs_of(positions)
    seconds = min(timeit.repeat(lambda: stream_order(runs, 0, 0), number=1))
    return [
        "# The order of a stream, against a full shuffle",
        "",
        f"The {len(positions):,} rows of `{name}` in {len(np.unique(positions // BLOCK))} packs of "
        f"{BLOCK}, {EPOCHS} epochs; volumes of {size_text(VOLUME)}. NumPy {np.__version__}, Python "
        f"{platform.python_version()}. The order of an epoch takes {seconds * 1e3:.0f} ms.",
        "",
        "- **run**: neighbours fetched by one request. Runs are shuffled over the whole set; a run "
        f"of {BLOCK} is a whole pack, which is what streams of shards usually shuffle.",
        "- **window**: over how many rows of the order those of a run are spread.",
        "- **correlation** of place in the epoch with place in the manifest, largest of the epochs;"
        f" chance gives {1 / np.sqrt(len(positions)):.3f}.",
        "- **neighbours apart**: median distance in the epoch of rows that are neighbours; **in a "
        "batch**: how many of them meet in a batch of 32.",
        "- **packs in a batch**: different packs among 8 and 32 rows, on average, and the fewest "
        "in any batch of 32 of an epoch.",
        "- **held**: volumes that are fetched and not yet asked for; about half a window.",
        "- **packs at once**: packs that the rows of one window come from.",
        "",
        f"Runs of {RUN} in a window of {WINDOW} are the default: batches of 32 hold nine tenths of "
        "the packs of a full shuffle, a run still shares one request, and two windows are 5.6 GB.",
        "",
        "| order | correlation | neighbours apart | in a batch | packs in 8 | packs in 32 | fewest "
        "| requests a volume | held | packs at once |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]


def measure(positions: Array) -> Iterator[Figures]:
    """The figures of every order."""
    count = len(positions)
    yield judge("as they lie", positions, [np.arange(count)], cost(BLOCK), "0", "1")
    full = [epoch_order(count, 0, epoch) for epoch in range(EPOCHS)]
    yield judge("full shuffle", positions, full, "1", "0", "all")
    for run, window in ORDERS:
        runs = runs_of(positions, run)
        orders = [stream_order(runs, 0, epoch, window) for epoch in range(EPOCHS)]
        chosen = (run, window) == (RUN, WINDOW)
        name = f"runs of {run}, window {window:,}"
        packs = np.mean([different(o, positions, window).mean() for o in orders])
        yield judge(
            f"**{name}**" if chosen else name,
            positions,
            orders,
            cost(run),
            size_text(np.mean([held(order, runs) for order in orders]) * VOLUME),
            f"{packs:.0f}",
        )


def judge(
    name: str, positions: Array, orders: list[Array], requests: str, held: str, packs: str
) -> Figures:
    """How well some epochs of an order mix the rows."""
    places = [np.argsort(order, kind="stable") for order in orders]
    return Figures(
        name=name,
        correlation=max(abs(np.corrcoef(place, positions)[0, 1]) for place in places),
        apart=float(np.mean([np.median(np.abs(np.diff(place))) for place in places])),
        together=float(np.mean([np.diff(place // 32) == 0 for place in places])),
        packs_of_8=float(np.mean([different(order, positions, 8) for order in orders])),
        packs_of_32=float(np.mean([different(order, positions, 32) for order in orders])),
        least_of_32=min(different(order, positions, 32).min() for order in orders),
        requests=requests,
        held=held,
        packs=packs,
    )


def cost(run: int) -> str:
    """Requests a volume: one a run, or as many as the largest request makes of it."""
    return f"{max(1 / run, VOLUME / LIMIT):.2g}"


def different(order: Array, positions: Array, size: int) -> Array:
    """Packs among each ``size`` rows of an order."""
    whole = len(order) // size * size
    packs = np.sort((positions[order[:whole]] // BLOCK).reshape(-1, size), axis=1)
    return 1 + (np.diff(packs, axis=1) != 0).sum(axis=1)


def held(order: Array, runs: Array) -> float:
    """Most rows that are fetched with their run and not yet asked for."""
    place = np.argsort(order, kind="stable")
    first = np.full(runs.max() + 1, len(order))
    np.minimum.at(first, runs, place)
    arriving = np.bincount(first[runs], minlength=len(order))
    return float((np.cumsum(arriving) - np.arange(1, len(order) + 1)).max())


if __name__ == "__main__":
    main()
