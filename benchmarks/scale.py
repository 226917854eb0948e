"""What 100,000 rows cost: opening them, keeping them in workers, finding one of them.

``python benchmarks/scale.py --out benchmarks/scale.md`` takes about 3 minutes on two cores. The
exit status is 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
from about import setting
from torch.utils.data import DataLoader, Dataset

from synthbrain import Manifest, SynthBrainDataset
from synthbrain.testing import TINY, TinyGenerator

Result = TypeVar("Result")

MANIFEST = "synthbrain-100k"
CONSTRUCTION, RESIDENT, OVERHEAD = 1.0, 300.0, 50.0
"""At most so many seconds to construct, MB of memory per worker, µs to find a row."""

METHODS = ("fork", "spawn", "forkserver")
NOTHING = "spawn, with a dataset of nothing"
WORKERS, BATCH = 4, 64
REPEATS = 5
"""The least of so many times is what a call takes when undisturbed."""

LINKS = 60_000
"""Names a file may have on common file systems."""

MB = 1e6


@dataclass(frozen=True)
class Construction:
    """Opening a dataset in a new process, its modules imported: seconds, and MB at most."""

    rows: int
    seconds: float
    imported: float
    peak: float


@dataclass(frozen=True)
class Memory:
    """The largest worker in MB, after a first batch and after all rows, and the main process.

    Parameters
    ----------
    method
        How workers were started, and what they held if not the dataset.
    rows
        How many all workers went over together.
    resident_first, resident
        Resident memory, which counts pages shared with other processes.
    unique_first, unique
        Memory that the worker alone has.
    main_peak
        Resident memory of the main process, at most.
    """

    method: str
    rows: int
    resident_first: float
    resident: float
    unique_first: float
    unique: float
    main_peak: float


@dataclass(frozen=True)
class Report:
    """All that a run found."""

    construction: list[Construction]
    memory: list[Memory]
    overhead: dict[str, float]
    """µs that ``ds[i]`` takes beyond reading the shard, by type of the image."""


def benchmark(
    folder: Path, manifest: Manifest, *, rows: int = 20_000, calls: int = 5, lookups: int = 2000
) -> Report:
    """Measure everything, each in processes of its own.

    Parameters
    ----------
    folder
        An empty folder for the store.
    manifest
        Its rows are the ones workers hold, with volumes of a few kilobytes.
    rows
        How many of them, all over the manifest, workers go over.
    calls
        How often a dataset is constructed.
    lookups
        How many rows are found.
    """
    construction = [_apart(construct, folder / "nothing") for _ in range(calls)]
    tiny = shrunk(manifest)
    tiny.save(folder / "manifest")
    chosen = np.random.default_rng(0).permutation(len(tiny))[:rows].tolist()
    fill(tiny, chosen, folder / "store")
    memory = [
        _apart(functools.partial(go_over, method, chosen), folder) for method in (*METHODS, NOTHING)
    ]
    overhead = {
        dtype: _apart(functools.partial(overhead_of, dtype, chosen[:lookups]), folder)
        for dtype in ("uint8", "float32")
    }
    return Report(construction, memory, overhead)


def _apart(task: Callable[[Path], Result], folder: Path) -> Result:
    """Run a task in a new interpreter, which has this module imported and nothing else done."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(task, folder).result()


def construct(store: Path) -> Construction:
    """Open the shipped manifest as a dataset, with what it needs for that imported before."""
    for name in ("pandas", "pyarrow.parquet", "platformdirs"):
        importlib.import_module(name)
    imported = _peak()
    started = time.perf_counter()
    ds = SynthBrainDataset(MANIFEST, generator=None, store=store)
    seconds = time.perf_counter() - started
    return Construction(len(ds), seconds, imported, _peak())


def shrunk(manifest: Manifest) -> Manifest:
    """The same rows with tiny volumes."""
    header = manifest.header.model_copy(update={"geometry": TINY})
    return Manifest.create(header, manifest.table)


def fill(manifest: Manifest, rows: Sequence[int], store: Path) -> None:
    """Store rows: one volume under many names, as only how many there are matters here."""
    resolver = SynthBrainDataset(manifest, generator=TinyGenerator(), store=store).resolver
    for number, row in enumerate(rows):
        path = resolver.path(row)
        if number % LINKS == 0:
            resolver.volumes([row])
            first = path
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(first, path)


def go_over(method: str, rows: Sequence[int], folder: Path) -> Memory:
    """Memory of workers that deliver rows of a dataset."""
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
    ds = _Nothing() if method == NOTHING else _opened(folder, "uint8")
    loader = DataLoader(
        ds, batch_size=BATCH, sampler=rows, num_workers=WORKERS, persistent_workers=True,
        multiprocessing_context=method.split(",")[0],
    )  # fmt: skip
    batches = iter(loader)
    seen = len(next(batches)["id"])
    first = _workers_memory()
    seen += sum(len(batch["id"]) for batch in batches)
    last = _workers_memory()  # they are persistent, so that they are still there
    return Memory(method, seen, first[0], last[0], first[1], last[1], _peak())


def _workers_memory() -> tuple[float, float]:
    """Resident and unique memory, MB, of whichever worker has most."""
    found = [process.memory_full_info() for process in psutil.Process().children(recursive=True)]
    return max(info.rss for info in found) / MB, max(info.uss for info in found) / MB


class _Nothing(Dataset[Any]):
    """What a worker costs that holds no rows."""

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"id": str(row)}


class _Lookups(Dataset[float]):
    """Times ``ds[i]`` and the reading within it, in the process that is asked."""

    def __init__(self, ds: SynthBrainDataset) -> None:
        self.ds = ds

    def __getitem__(self, row: int) -> float:
        store, position = self.ds.resolver.store_of(row), self.ds.manifest.positions[row]
        whole, read = [], []
        for _ in range(REPEATS):
            whole.append(_processor_time(lambda: self.ds[row]))
            read.append(_processor_time(lambda: store.read(position)))
        return 1e6 * (min(whole) - min(read))


def _processor_time(call: Callable[[], object]) -> float:
    """Seconds of this thread alone, whatever else the machine does."""
    started = time.thread_time()
    call()
    return time.thread_time() - started


def overhead_of(dtype: str, rows: Sequence[int], folder: Path) -> float:
    """µs that ``ds[i]`` takes in a worker beyond reading the shard: the median over rows."""
    lookups = _Lookups(_opened(folder, dtype))
    loader = DataLoader(lookups, sampler=rows, num_workers=1, batch_size=100)
    return float(np.median(np.concatenate([batch.numpy() for batch in loader])))


def _opened(folder: Path, dtype: Any) -> SynthBrainDataset:
    return SynthBrainDataset(
        folder / "manifest", generator=None, store=folder / "store", dtype=dtype
    )


def _peak() -> float:
    """Resident memory of this process so far, MB at most; getrusage counts its parent's, too."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / MB


def render(report: Report, heading: Sequence[str]) -> str:
    """The report as a Markdown page."""
    return "\n".join(
        [
            *heading, "", "## Construction", "",
            "| rows | s, median | s, least | MB after imports | MB at most |",
            "| --: | --: | --: | --: | --: |", _constructed(report.construction),
            "", f"## Memory of {WORKERS} workers", "",
            "| started by | rows | resident MB, first batch | resident MB, at the end "
            "| unique MB, first batch | unique MB, at the end | main process, MB at most |",
            f"| --- |{' --: |' * 6}", *map(_remembered, report.memory),
            "", "## Finding a row", "",
            "| image | processor µs beyond reading the shard |", "| --- | --: |",
            *(f"| {dtype} | {found:.0f} |" for dtype, found in report.overhead.items()),
            "", "## Targets", "", *(f"- {line}" for line in targets(report)), "",
        ]
    )  # fmt: skip


def _constructed(found: Sequence[Construction]) -> str:
    seconds = [one.seconds for one in found]
    imported, peak = max(one.imported for one in found), max(one.peak for one in found)
    return (
        f"| {found[0].rows:,} | {np.median(seconds):.2f} | {min(seconds):.2f} | {imported:.0f} "
        f"| {peak:.0f} |"
    )


def _remembered(found: Memory) -> str:
    figures = (found.resident_first, found.resident, found.unique_first, found.unique)
    cells = [found.method, f"{found.rows:,}", *(f"{x:.0f}" for x in (*figures, found.main_peak))]
    return f"| {' | '.join(cells)} |"


def targets(report: Report) -> Iterator[str]:
    """PASS or FAIL for each target."""
    seconds = float(np.median([one.seconds for one in report.construction]))
    yield _verdict("construction, s", seconds, CONSTRUCTION)
    for found in (each for each in report.memory if each.method != NOTHING):
        largest = max(found.resident_first, found.resident)
        yield _verdict(f"resident MB of a worker, {found.method}", largest, RESIDENT)
    yield _verdict("µs beyond reading the shard, uint8", report.overhead["uint8"], OVERHEAD)


def _verdict(what: str, found: float, bound: float) -> str:
    return f"{'PASS' if found <= bound else 'FAIL'}: {what}: {found:.3g} (at most {bound:g})"


def heading() -> list[str]:
    """Title, machine and versions."""
    return [
        "# Many rows, measured",
        "",
        "Written by `scale.py`; what the columns mean is in [README.md](README.md).",
        "",
        f"- `{MANIFEST}`, with volumes of {' × '.join(map(str, TINY.shape))} for workers",
        f"- {setting(('torch', 'numpy', 'pandas'))}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000, help="to go over (default: 20,000)")
    parser.add_argument("--calls", type=int, default=5, help="constructions (default: 5)")
    parser.add_argument("--lookups", type=int, default=2000, help="rows found (default: 2000)")
    parser.add_argument("--out", type=Path, help="also write the page here")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        report = benchmark(
            Path(folder), Manifest.open(MANIFEST), rows=args.rows, calls=args.calls,
            lookups=args.lookups,
        )  # fmt: skip
    page = render(report, heading())
    print(page)
    if args.out:
        args.out.write_text(page, encoding="utf-8")
    return int(any(line.startswith("FAIL") for line in targets(report)))


if __name__ == "__main__":
    sys.exit(main())
