"""What sampling costs a training that needs it, while it trains: see README.md beside this file.

``python benchmarks/overlap.py --phantoms 32 --out benchmarks/overlap.md`` takes about 16 minutes, 6
of them for phantoms. The exit status is 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from about import setting
from timed import BATCH
from torch.utils.data import DataLoader, Dataset

from synthbrain import Manifest, SynthBrainDataset, SynthBrainSampler, draw_cohort
from synthbrain.generators import geometry_of, load_generator
from synthbrain.sampling import SharedGenerator

OVERLAP, GAIN = 0.9, 1.7
"""At least so much of the speed of the slower part alone, and so many times the naive speed."""

WORKERS = 2
BALANCED = "training and sampling alike"
CASES = {"training takes longer": 4.0, BALANCED: 2.0, "sampling takes longer": 1.0}
"""Seconds of a step, for four volumes, over those of making a volume; half of them are made."""


@dataclass(frozen=True)
class Times:
    """Seconds that an epoch took in each round: its parts alone, and ways to have them together."""

    training: list[float]
    sampling: list[float]
    ours: list[float]
    unforeseen: list[float]
    naive: list[float]

    @property
    def bound(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The slower part alone: nothing that has to do both can be faster."""
        return np.maximum(self.training, self.sampling)

    @property
    def overlap(self) -> float:
        """Our speed over that of the slower part: the median over rounds."""
        return float(np.median(self.bound / self.ours))

    @property
    def gain(self) -> float:
        """Our speed over the naive one: the median over rounds."""
        return float(np.median(np.array(self.naive) / self.ours))

    @property
    def possible(self) -> float:
        """The largest gain that overlap alone can give."""
        return float(np.median(np.add(self.training, self.sampling) / self.bound))


@dataclass(frozen=True)
class Bench:
    """Trains on the rows of a manifest, every other one of which is missing at first.

    Parameters
    ----------
    manifest
        Recipes of the volumes.
    generator
        Name of who makes them.
    folder
        For the stores.
    """

    manifest: Manifest
    generator: str
    folder: Path

    def prepare(self) -> float:
        """Fill the store that has everything and the one that has half; seconds a volume takes."""
        half = self.manifest.select(ids=self.manifest.table.index[::2].tolist())
        for rows, name in ((half, "half"), (self.manifest, "full")):
            ds = SynthBrainDataset(rows, generator=self.generator, store=self.folder / name)
            started = time.perf_counter()
            ds.fill(progress=False)
        return (time.perf_counter() - started) / len(self.manifest)

    def measure(self, step: float, rounds: int, seed: int) -> Times:
        """Epochs whose steps take ``step`` seconds, of all kinds in turns."""
        kinds: dict[str, Callable[[float, int], float]] = {
            "training": self.training,
            "sampling": self.filling,
            "ours": self.ours,
            "unforeseen": self.unforeseen,
            "naive": self.naive,
        }
        times: dict[str, list[float]] = defaultdict(list)
        order = random.Random(seed)
        for number in range(rounds):
            for kind in order.sample(list(kinds), len(kinds)):
                times[kind].append(kinds[kind](step, number))
        return Times(**times)

    def training(self, step: float, number: int) -> float:
        """Nothing is missing."""
        ds = self._dataset(self.folder / "full")
        return train(self._loader(ds, SynthBrainSampler(ds, seed=number)), step)

    def filling(self, step: float, number: int) -> float:
        """The missing half is made, and nothing else is done."""
        with self.half_full() as store:
            ds = self._dataset(store)
            started = time.perf_counter()
            ds.fill(progress=False)
            return time.perf_counter() - started

    def ours(self, step: float, number: int) -> float:
        """Workers, the sampling service, and the sampler that looks ahead."""
        with self.half_full() as store:
            ds = self._dataset(store)
            return train(self._loader(ds, SynthBrainSampler(ds, seed=number)), step)

    def unforeseen(self, step: float, number: int) -> float:
        """The same without looking ahead: workers ask for what their batches lack."""
        with self.half_full() as store:
            ds = self._dataset(store)
            return train(self._loader(ds, SynthBrainSampler(ds, seed=number, ahead=0)), step)

    def naive(self, step: float, number: int) -> float:
        """What one writes first: ``ds[i]`` of the process that trains makes what is missing."""
        with self.half_full() as store:
            ds = self._dataset(store, load_generator(self.generator))
            order = SynthBrainSampler(len(ds), seed=number)
            return train(DataLoader(_RowByRow(ds), batch_size=BATCH, sampler=order), step)

    @contextlib.contextmanager
    def half_full(self) -> Iterator[Path]:
        """A store that lacks every other row; its files are links, which takes no time."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            store = Path(folder) / "store"
            shutil.copytree(self.folder / "half", store, copy_function=os.link)
            yield store

    def _dataset(self, store: Path, generator: Any = None) -> SynthBrainDataset:
        made_by = generator or self.generator
        return SynthBrainDataset(self.manifest, generator=made_by, store=store)

    def _loader(self, ds: SynthBrainDataset, sampler: SynthBrainSampler) -> Iterable[Any]:
        return ds.loader(
            batch_size=BATCH, sampler=sampler, num_workers=WORKERS, multiprocessing_context="fork"
        )


class _RowByRow(Dataset[Any]):
    """Hides that a dataset can give the rows of a batch together."""

    def __init__(self, ds: SynthBrainDataset) -> None:
        self.ds = ds

    def __len__(self) -> int:
        return len(self.ds)

    def __getitem__(self, index: int) -> Any:
        return self.ds[index]


def train(loader: Iterable[Any], step: float) -> float:
    """Seconds an epoch takes whose steps sleep, as a process does that waits for its GPU."""
    started = time.perf_counter()
    for _ in loader:
        time.sleep(step)
    return time.perf_counter() - started


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    case: str
    made_by: str
    step: float
    volume: float
    times: Times

    @property
    def balanced(self) -> bool:
        """Whether both parts take as long; otherwise no overlap could be worth the target."""
        return self.case == BALANCED


def benchmark(
    folder: Path, generator: str, cases: Iterable[str], *, rows: int, rounds: int, seed: int
) -> Iterator[Row]:
    """Measure some of the cases.

    Parameters
    ----------
    folder
        For the stores; made if need be.
    generator
        Name of who makes the volumes.
    cases
        Some of :data:`CASES`.
    rows
        How many rows an epoch has.
    rounds
        How often everything is measured.
    seed
        Seed of the rows and the order.
    """
    service: Any = SharedGenerator(generator, idle=5)
    manifest = draw_cohort(rows, seed=seed, name="overlap")
    # Asking keeps the service there all the time, so that no epoch pays for its start.
    header = manifest.header.model_copy(update={"geometry": geometry_of(service)})
    bench = Bench(Manifest.create(header, manifest.table), generator, folder)
    seconds = bench.prepare()
    for case in cases:
        step = CASES[case] * seconds
        yield Row(case, generator, step, seconds, bench.measure(step, rounds, seed))
    service.close()


def render(rows: Sequence[Row], heading: Sequence[str]) -> str:
    """The rows as a Markdown page."""
    names = ["case", "made by", "step, ms", "volume, ms", "training alone, s", "sampling alone, s"]
    names += ["ours, s", "ours without looking ahead, s", "naive, s"]
    names += ["× the slower alone", "× naive", "× naive, at most"]
    table = [f"| {' | '.join(names)} |", f"| --- | --- |{' --: |' * 10}", *map(_line, rows)]
    verdicts = [f"- {line}" for line in targets(rows)]
    return "\n".join([*heading, "", *table, "", "## Targets", "", *verdicts, ""])


def _line(row: Row) -> str:
    times = row.times
    parts = (times.training, times.sampling, times.ours, times.unforeseen, times.naive)
    cells = [row.case, row.made_by, f"{1e3 * row.step:.0f}", f"{1e3 * row.volume:.0f}"]
    cells += [f"{np.median(part):.2f}" for part in parts]
    cells += [f"{times.overlap:.2f}", f"{times.gain:.2f}", f"{times.possible:.2f}"]
    return f"| {' | '.join(cells)} |"


def targets(rows: Sequence[Row]) -> Iterator[str]:
    """PASS or FAIL for each target."""
    for row in rows:
        what = f"{row.case} ({row.made_by})"
        yield _verdict(f"{what}, × the speed of the slower part alone", row.times.overlap, OVERLAP)
        if row.balanced:
            yield _verdict(f"{what}, × the naive speed", row.times.gain, GAIN)


def _verdict(what: str, found: float, bound: float) -> str:
    return f"{'PASS' if found >= bound else 'FAIL'}: {what}: {found:.2f} (at least {bound:g})"


def heading(args: argparse.Namespace) -> list[str]:
    """Title, machine, versions and the command of this run."""
    command = f"--rows {args.rows} --rounds {args.rounds} --seed {args.seed}"
    command += f" --phantoms {args.phantoms}" if args.phantoms else ""
    return [
        "# Sampling while training, measured",
        "",
        "Written by `overlap.py`; what the columns mean is in [README.md](README.md).",
        "",
        f"- Command: `python benchmarks/overlap.py {command}`",
        f"- {args.rows} rows an epoch, {args.phantoms} of phantoms; half of them missing, batches "
        f"of {BATCH}, {WORKERS} workers; medians over {args.rounds} rounds",
        f"- {setting(['torch'])}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=192, help="rows of an epoch (default: 192)")
    parser.add_argument("--rounds", type=int, default=3, help="of everything (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of rows and order (default: 0)")
    parser.add_argument("--phantoms", type=int, default=0, help="rows of phantoms too (none)")
    parser.add_argument("--out", type=Path, help="also write the page here")
    parser.add_argument("--generator", default="timed:make", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    how = {"rounds": args.rounds, "seed": args.seed}
    with tempfile.TemporaryDirectory(prefix="overlap-") as name:
        folder = Path(name)
        rows = [*benchmark(folder / "timed", args.generator, CASES, rows=args.rows, **how)]
        if args.phantoms:
            real = folder / "phantoms"
            rows += benchmark(real, "phantom", [BALANCED], rows=args.phantoms, **how)
    page = render(rows, heading(args))
    print(page)
    if args.out:
        args.out.write_text(page, encoding="utf-8")
    return int(any(line.startswith("FAIL") for line in targets(rows)))


if __name__ == "__main__":
    sys.exit(main())
