"""Time the ways to deliver volumes, side by side in one run: see README.md beside this file.

Usage: ``python benchmarks/loading.py --out benchmarks/loading.md``
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from about import setting
from readers import LIMIT, NIBABEL, OURS, READERS, Reader, open_readers
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from volumes import Volumes, prepare

from synthbrain import Manifest, draw_cohort
from synthbrain.generators import load_generator
from synthbrain.testing import TinyGenerator

Times = np.ndarray[Any, np.dtype[np.float64]]
Result = TypeVar("Result")

TOLERANCE = 1 / 510 + 1e-6
"""Half a level of 256: how far any method's voxels may be from the generator's."""

PACKAGES = (
    "numpy", "torch", "zarr", "zarrs", "numcodecs", "nibabel", "monai", "torchio", "simpleitk",
    "datasets", "pyarrow", "webdataset",
)  # fmt: skip

LOADER_OURS = "synthbrain, `ds.loader()` (uint8 hand-over)"
LOADER_FLOATS = "synthbrain, DataLoader (float32 hand-over)"


@dataclass(frozen=True)
class Row:
    """What is known of one method; times in seconds a volume, one for each round."""

    name: str
    stored: str
    compressed: bool
    how: str
    size: float
    whole: Times
    patch: Times


@dataclass(frozen=True)
class LoaderRow:
    """One DataLoader: volumes per second, one figure for each round."""

    name: str
    workers: int
    rates: Times


@dataclass(frozen=True)
class Report:
    """All that a run found."""

    rows: list[Row]
    """As each method runs by itself, with all cores."""
    pinned: list[Row]
    """The same, held to one core."""
    loaders: list[LoaderRow]
    absent: list[str]


def benchmark(
    manifest: Manifest,
    generator: Any,
    *,
    folder: Path,
    patch: int = 64,
    rounds: int = 6,
    loader_volumes: int = 24,
    seed: int = 0,
) -> Report:
    """Make the volumes, check that all methods deliver them, and time every method.

    Parameters
    ----------
    manifest
        Recipes of the volumes.
    generator
        Name of a generator, or one.
    folder
        An empty folder for all files.
    patch
        Edge of the patches.
    rounds
        How often each method delivers each volume.
    loader_volumes
        How many volumes a DataLoader delivers in one round.
    seed
        Seed of the order.
    """
    say("making volumes and writing every format")
    volumes = apart(_make, folder, manifest, generator, patch)
    say("timing on all cores")
    rows, absent = apart(time_readers, volumes, rounds, seed, False)
    say("timing on one core")
    pinned, _ = apart(time_readers, volumes, rounds, seed, True)
    say("timing DataLoaders")
    return Report(rows, pinned, apart(time_loaders, volumes, loader_volumes, rounds, seed), absent)


def named(rows: Iterable[Row], name: str) -> Row:
    """The row of that name."""
    return next(row for row in rows if row.name == name)


def apart(task: Callable[..., Result], *args: Any) -> Result:
    """Run a task in a process of its own: no thread or cache passes from one to the next."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(task, *args).result()


def _make(folder: Path, manifest: Manifest, generator: Any, patch: int) -> Volumes:
    made = load_generator(generator) if isinstance(generator, str) else generator
    volumes = prepare(folder, manifest, made, patch)
    open_readers(volumes)
    return replace(volumes)  # leaves behind what was opened here


def time_readers(
    volumes: Volumes, rounds: int, seed: int, pinned: bool
) -> tuple[list[Row], list[str]]:
    """Time every reader, in turns, after checking it once on every volume."""
    if pinned:
        torch.set_num_threads(1)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    opened = open_readers(volumes)
    readers = {name: reader for name, reader in opened.items() if reader is not None}
    for name, reader in readers.items():
        check(name, reader, volumes)
    order = random.Random(seed)
    wholes = in_turns(readers, volumes, rounds, order, patch=False)
    patches = in_turns(readers, volumes, rounds, order, patch=True)
    rows = [
        Row(
            name, reader.stored, reader.compressed, reader.how,
            sum(file.stat().st_size for file in reader.files) / volumes.count,
            wholes[name], patches[name],
        )
        for name, reader in readers.items()
    ]  # fmt: skip
    return rows, [name for name, reader in opened.items() if reader is None]


def check(name: str, reader: Reader, volumes: Volumes) -> None:
    """Deliver every volume and patch once; also warms every cache.

    Raises
    ------
    AssertionError
        Volumes are left out, or a tensor has another shape or type, or voxels that differ by more
        than quantisation.
    """
    everything, boxes = list(range(volumes.count)), volumes.boxes()
    for what, parts, delivered in (
        ("whole", [...] * volumes.count, reader.whole(everything)),
        ("patch", boxes, reader.crops(everything, boxes)),
    ):
        seen = []
        for i, image in delivered:
            expected = volumes.floats[i][parts[i]]
            seen.append(i)
            assert image.dtype == torch.float32, f"{name}, {what}: {image.dtype}"
            assert image.shape == (1, *expected.shape), f"{name}, {what}: {image.shape}"
            error = float(np.abs(image.numpy()[0] - expected).max())
            assert error <= TOLERANCE, f"{name}, {what} {i}: voxels differ by {error}"
        assert seen == everything, f"{name}, {what}: delivered {seen}"


def in_turns(
    readers: dict[str, Reader], volumes: Volumes, rounds: int, order: random.Random, *, patch: bool
) -> dict[str, Times]:
    """Seconds a volume takes, for each round.

    In a round every method delivers all volumes once. Volumes and methods come in a new random
    order, and patches lie elsewhere, in each round.
    """
    times: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(rounds):
        rows = order.sample(range(volumes.count), volumes.count)
        volumes.patches.set_epoch(number)
        boxes = volumes.boxes()
        for name in order.sample(list(readers), len(readers)):
            reader = readers[name]
            start = time.perf_counter()
            delivered = reader.crops(rows, boxes) if patch else reader.whole(rows)
            deque(delivered, maxlen=0)  # lets go of each volume at once, as training does
            times[name].append((time.perf_counter() - start) / volumes.count)
    return {name: np.array(values) for name, values in times.items()}


class _Volumes(Dataset[Tensor]):
    """A reader as a map-style dataset."""

    def __init__(self, reader: Reader, count: int) -> None:
        self.reader, self.count = reader, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Tensor:
        return next(image for _, image in self.reader.whole([i]))


def time_loaders(volumes: Volumes, length: int, rounds: int, seed: int) -> list[LoaderRow]:
    """Volumes per second of DataLoaders whose workers are already running, in turns."""
    sampler = [i % volumes.count for i in range(length)]
    ds, nifti = volumes.dataset(), _Volumes(READERS[NIBABEL](volumes), volumes.count)
    loaders: dict[tuple[str, int], Any] = {}
    for workers in (0, 2):
        options: dict[str, Any] = {"batch_size": 4, "sampler": sampler, "num_workers": workers}
        if workers:
            options |= {"persistent_workers": True, "multiprocessing_context": "fork"}
        loaders[LOADER_OURS, workers] = ds.loader(**options)
        loaders[LOADER_FLOATS, workers] = DataLoader(ds, **options)
        loaders[NIBABEL, workers] = DataLoader(nifti, **options)
    rates: dict[tuple[str, int], list[float]] = {key: [] for key in loaders}
    order = random.Random(seed)
    for key in loaders:
        _run_through(loaders[key])  # starts the workers
    for _ in range(rounds):
        for key in order.sample(list(loaders), len(loaders)):
            start = time.perf_counter()
            _run_through(loaders[key])
            rates[key].append(length / (time.perf_counter() - start))
    return [LoaderRow(*key, np.array(values)) for key, values in rates.items()]


def _run_through(loader: Any) -> None:
    for batch in loader:
        image = batch["image"] if isinstance(batch, dict) else batch
        assert image.dtype == torch.float32


def ratio(slow: Times, fast: Times) -> float:
    """How many times longer one method takes than another: the median over rounds."""
    return float(np.median(slow / fast))


def render(report: Report, heading: Sequence[str]) -> str:
    """The report as a Markdown page."""
    parts = {
        "Whole volumes": _table(report.rows, report.absent, "whole"),
        "Patches": _table(report.rows, report.absent, "patch"),
        "Whole volumes, held to one core": _table(report.pinned, report.absent, "whole"),
        "Patches, held to one core": _table(report.pinned, report.absent, "patch"),
        "DataLoader, batches of 4": _loader_table(report.loaders),
        "Targets": (f"- {line}" for line in targets(report)),
    }
    lines = list(heading)
    for title, part in parts.items():
        lines += ["", f"## {title}", "", *part]
    return "\n".join(lines) + "\n"


def _table(rows: list[Row], absent: list[str], what: str) -> Iterator[str]:
    names = ["method", "on disk", "compressed", "MB a volume"]
    names += ["ms, median", "ms, least", "× nibabel's speed", "× the limit's time"]
    names += ["patches"] if what == "patch" else []
    yield _line(names)
    yield _line("--:" if name[:2] in ("MB", "ms", "× ") else "---" for name in names)
    nibabel, limit = (getattr(named(rows, name), what) for name in (NIBABEL, LIMIT))
    for row in rows:
        times = getattr(row, what)
        cells = [
            row.name, row.stored, "yes" if row.compressed else "no", f"{row.size / 1e6:.1f}",
            f"{1e3 * np.median(times):.2f}", f"{1e3 * times.min():.2f}",
            f"{ratio(nibabel, times):.2f}", f"{ratio(times, limit):.2f}", row.how,
        ]  # fmt: skip
        yield _line(cells[: len(names)])
    for name in absent:
        yield _line([name, "not installed", *[""] * (len(names) - 2)])


def _loader_table(rows: Sequence[LoaderRow]) -> Iterator[str]:
    yield _line(["loader", "workers", "volumes/s, median", "volumes/s, best", "× nibabel's speed"])
    yield _line(["---", *["--:"] * 4])
    for row in rows:
        peer = next(r for r in rows if r.name == NIBABEL and r.workers == row.workers)
        yield _line(
            [
                row.name, str(row.workers), f"{np.median(row.rates):.1f}", f"{row.rates.max():.1f}",
                f"{ratio(row.rates, peer.rates):.1f}",
            ]
        )  # fmt: skip


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def targets(report: Report) -> Iterator[str]:
    """PASS or FAIL for each target of our loading, each method running as it does by itself."""
    ours, nibabel, limit = (named(report.rows, name) for name in (OURS, NIBABEL, LIMIT))
    yield _verdict("whole volumes, times as fast as nibabel", ratio(nibabel.whole, ours.whole), 12)
    yield _verdict("patches, times as fast as nibabel", ratio(nibabel.patch, ours.patch), 25)
    for what in ("whole", "patch"):
        rivals = {
            row.name: ratio(getattr(row, what), getattr(ours, what))
            for row in report.rows
            if row.compressed and "synthbrain" not in row.name
        }
        name = min(rivals, key=rivals.__getitem__)
        title = {"whole": "whole volumes", "patch": "patches"}[what]
        yield _verdict(f"{title}, times as fast as the best compressed peer ({name})", rivals[name])
    yield _verdict(
        "whole volumes, times the copy-and-cast limit", ratio(ours.whole, limit.whole), 4, most=True
    )


def _verdict(what: str, found: float, bound: float = 1, *, most: bool = False) -> str:
    good = found <= bound if most else found >= bound
    wanted = f"at {'most' if most else 'least'} {bound:g}"
    return f"{'PASS' if good else 'FAIL'}: {what}: {found:.2f} ({wanted})"


def heading(args: argparse.Namespace) -> list[str]:
    """Title, machine, versions and the command of this run."""
    command = (
        f"python benchmarks/loading.py --volumes {args.volumes} --rounds {args.rounds} "
        f"--loader-volumes {args.loader_volumes} --seed {args.seed}"
    )
    return [
        "# Loading, measured",
        "",
        "Written by `loading.py`; what the columns mean is in [README.md](README.md).",
        "",
        f"- Command: `{command}`",
        f"- {args.volumes} volumes of 160 × 224 × 160 made by `{args.generator}`; warm page cache",
        "- Noise decides how well float32 .nii.gz compress, so files of 256 levels are timed too; "
        "the released set (5.9 MB a volume) lies between the two",
        f"- {setting(PACKAGES)}",
    ]


def say(text: str) -> None:
    """Tell how far the run is."""
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--volumes", type=int, default=8, help="how many volumes (default: 8)")
    parser.add_argument("--rounds", type=int, default=6, help="deliveries of each (default: 6)")
    parser.add_argument("--loader-volumes", type=int, default=24, help="length of an epoch")
    parser.add_argument("--seed", type=int, default=0, help="seed of rows and order (default: 0)")
    parser.add_argument("--out", type=Path, help="also write the page here")
    parser.add_argument("--generator", default="phantom", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    manifest = draw_cohort(args.volumes, seed=args.seed, name="loading")
    generator = args.generator
    if generator == "tiny":
        generator = TinyGenerator(shape=manifest.header.geometry.shape)
    with tempfile.TemporaryDirectory(prefix="loading-") as folder:
        report = benchmark(
            manifest, generator, folder=Path(folder), rounds=args.rounds,
            loader_volumes=args.loader_volumes, seed=args.seed,
        )  # fmt: skip
    page = render(report, heading(args))
    print(page)
    if args.out:
        args.out.write_text(page)
    return int(any(line.startswith("FAIL") for line in targets(report)))


if __name__ == "__main__":
    sys.exit(main())
