"""Time DataLoaders with workers beside those of other libraries: see README.md beside this file.

``python benchmarks/workers.py --out benchmarks/workers.md`` takes about 20 minutes on two cores and
4 GB in the temporary folder (``TMPDIR`` chooses which). The exit status is 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import psutil
import torch
from about import setting
from loaders import BATCH, LOADER, NAMED, SHARED, Batches, Way, ways
from volumes import Volumes, prepare

from synthbrain import Manifest, draw_cohort
from synthbrain.sampling import SharedGenerator
from synthbrain.sampling.spec import Spec

Result = TypeVar("Result")
Key = tuple[str, int, bool]
"""Row of the tables, number of workers, whether patches."""

WORKERS = (0, 2, 8)
WARM_EPOCHS = 2
SLACK = 0.85
"""With a generator that nothing is missing for, at least so much of the speed without one."""

PACKAGES = (
    "torch", "numpy", "mosaicml-streaming", "litdata", "webdataset", "datasets", "pyarrow",
)  # fmt: skip


@dataclass(frozen=True)
class Visit:
    """Epochs in a process of its own.

    Parameters
    ----------
    cold, warm
        Volumes per second of the first epoch, and of the faster one of those that follow.
    read
        MB per volume that the disk read for the first epoch.
    busy
        Milliseconds of processor time per volume in the epochs that follow, of all processes.
    """

    cold: float
    warm: float
    read: float
    busy: float


@dataclass(frozen=True)
class Report:
    """All that a run found: a visit for each round, and why rows are empty."""

    stored: dict[str, tuple[str, float]]
    """What lies on disk, and its MB a volume."""
    visits: dict[Key, list[Visit]] = field(default_factory=lambda: defaultdict(list))
    absent: dict[str, str] = field(default_factory=dict)


def benchmark(
    manifest: Manifest,
    generator: str,
    *,
    folder: Path,
    patch: int = 64,
    workers: Sequence[int] = WORKERS,
    rounds: int = 5,
    seed: int = 0,
) -> Report:
    """Make the volumes, check that all loaders deliver them, and time every loader in turns.

    Parameters
    ----------
    manifest
        Recipes of the volumes.
    generator
        Name of who makes them.
    folder
        An empty folder for all files.
    patch
        Edge of the patches.
    workers
        Numbers of workers.
    rounds
        Visits to each loader.
    seed
        Seed of the order of visits.
    """
    say("making volumes")
    volumes = forked(partial(_make, folder, manifest, generator, patch))
    service = SharedGenerator(generator, idle=5)
    service.facts  # noqa: B018 - it runs from here on, as beside a training that needs it
    opened, absent = _opened(volumes, generator)
    report = Report({name: (way.stored, _size(way, volumes)) for name, way in opened.items()})
    report.absent.update(absent)
    contests = [(n, patches) for n in workers for patches in (False, True)]
    order = random.Random(seed)
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        for contest in order.sample(contests, len(contests)):
            for name in order.sample(list(opened), len(opened)):
                found = forked(partial(visit, opened[name], volumes, *contest))
                report.visits[name, *contest].append(found)
    service.close()
    return report


def forked(task: Callable[[], Result], seconds: float = 600) -> Result:
    """Run a task in a process of its own: no thread, cache or open file passes to the next.

    Raises
    ------
    RuntimeError
        It failed, or took too long.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def run() -> None:
        try:
            there.send((True, task()))
        except BaseException as error:
            there.send((False, f"{type(error).__name__}: {error}"))

    process = context.Process(target=run)
    process.start()
    there.close()
    try:
        if not here.poll(seconds):
            raise RuntimeError(f"no end after {seconds:.0f} s")
        good, result = here.recv()
    except EOFError:
        raise RuntimeError("the process died") from None
    finally:
        _end(process)
    if not good:
        raise RuntimeError(result)
    return cast(Result, result)


def _end(process: multiprocessing.process.BaseProcess) -> None:
    """Let a process finish, or kill it and its workers."""
    process.join(10)
    if process.is_alive():
        parent = psutil.Process(process.pid)
        for each in (*parent.children(recursive=True), parent):
            each.kill()
        process.join()


def _make(folder: Path, manifest: Manifest, generator: str, patch: int) -> Volumes:
    made = prepare(folder, manifest, Spec(generator).load(), patch)
    return Volumes(made.folder, made.manifest, made.maker, made.patch)


def _opened(volumes: Volumes, generator: str) -> tuple[dict[str, Way], dict[str, str]]:
    """Every way that works here, its files written, and why the others do not."""
    opened, absent = {}, {}
    for name, factory in ways(generator).items():
        say(f"writing and checking: {name}")
        try:
            forked(partial(_check, factory, volumes))
            opened[name] = factory(volumes)  # imports its library, so that visits need not
        except ImportError:
            absent[name] = "not installed"
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            missing = reason.startswith(("ModuleNotFoundError", "ImportError"))
            absent[name] = "not installed" if missing else reason[:120].replace("|", "/")
    return opened, absent


def _check(factory: Callable[[Volumes], Way], volumes: Volumes) -> None:
    way = factory(volumes)
    for workers in (0, 2):
        for patches in (False, True):
            check(way.loader(workers, patches), volumes, patches)


def check(loader: Batches, volumes: Volumes, patches: bool) -> None:
    """Deliver an epoch, and hold it against the volumes.

    Raises
    ------
    AssertionError
        A volume is left out or comes twice, or voxels differ from the stored ones.
    """
    boxes, seen = volumes.boxes() if patches else None, []
    for batch in loader:
        assert batch["image"].dtype == torch.float32, f"{batch['image'].dtype}"
        for row, image in zip(batch["row"].tolist(), batch["image"], strict=True):
            expected = volumes.codes[row][... if boxes is None else boxes[row]]
            assert image.shape == (1, *expected.shape), f"shape {tuple(image.shape)}"
            error = float(np.abs(image.numpy()[0] * 255 - expected).max())
            assert error < 0.01, f"voxels of {row} differ by {error} levels"
            seen.append(row)
    assert sorted(seen) == list(range(volumes.count)), f"delivered {sorted(seen)}"


def visit(way: Way, volumes: Volumes, workers: int, patches: bool) -> Visit:
    """An epoch from cold files by new workers, and more from the page cache by the same."""
    way.forget()
    loader = way.loader(workers, patches)
    drop(way.files)
    read_before = bytes_read()
    first = _epoch(loader)
    read = (bytes_read() - read_before) / volumes.count
    busy_before = processor_time()
    warm = [_epoch(loader) for _ in range(WARM_EPOCHS)]
    busy = (processor_time() - busy_before) / WARM_EPOCHS / volumes.count
    return Visit(volumes.count / first, volumes.count / min(warm), read / 1e6, 1e3 * busy)


def _epoch(loader: Batches) -> float:
    start = time.perf_counter()
    for batch in loader:
        assert batch["image"].dtype == torch.float32
    return time.perf_counter() - start


def drop(files: Iterable[Path]) -> None:
    """Take files out of the page cache; written first, as only clean pages can go."""
    for path in files:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def bytes_read() -> int:
    """What this process and its children had the disk read: read_bytes of /proc/PID/io."""
    me = psutil.Process()
    return sum(process.io_counters().read_bytes for process in (me, *me.children(recursive=True)))


def processor_time() -> float:
    """Seconds that processors worked for this process and its children."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum((spent.user + spent.system for spent in times), 0.0)


def _size(way: Way, volumes: Volumes) -> float:
    """MB a volume; unpacked copies count, as they stay."""
    return sum(path.stat().st_size for path in way.files) / volumes.count / 1e6


def rates(report: Report, key: Key, what: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """One figure of a loader for each round."""
    return np.array([getattr(visit, what) for visit in report.visits[key]])


def ratio(report: Report, key: Key, what: str) -> float:
    """How many times as fast as ``ds.loader()``: the median over rounds."""
    base = rates(report, (LOADER, *key[1:]), what)
    return float(np.median(rates(report, key, what) / base))


def render(report: Report, heading: Sequence[str], workers: Sequence[int] = WORKERS) -> str:
    """The report as a Markdown page."""
    lines = list(heading)
    for what, epoch in (("warm", "later epochs, page cache"), ("cold", "first epoch, cold")):
        for patches, noun in ((False, "Whole volumes"), (True, "Patches")):
            lines += ["", f"## {noun}, {epoch}", "", *_table(report, what, patches, workers)]
    lines += ["", "## Targets", "", *(f"- {line}" for line in targets(report, workers)), ""]
    return "\n".join(lines)


def _table(report: Report, what: str, patches: bool, workers: Sequence[int]) -> Iterator[str]:
    names = ["loader", "on disk", "MB a volume"]
    names += [f"{n} workers: volumes/s, × `ds.loader()`" for n in workers]
    extra, title = ("read", "MB read a volume") if what == "cold" else ("busy", "CPU ms a volume")
    names.append(title)
    yield _line(names)
    yield _line(["---", "---", *["--:"] * (len(names) - 2)])
    for name, (stored, size) in report.stored.items():
        keys = [(name, n, patches) for n in workers]
        cells = [name, stored, f"{size:.2f}"]
        cells += [
            f"{np.median(rates(report, key, what)):.1f}, {ratio(report, key, what):.2f}"
            for key in keys
        ]
        figures = np.concatenate([rates(report, key, extra) for key in keys])
        yield _line([*cells, f"{np.median(figures):.2f}"])
    for name, reason in report.absent.items():
        yield _line([name, reason, *[""] * (len(names) - 2)])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def targets(report: Report, workers: Sequence[int] = WORKERS) -> Iterator[str]:
    """PASS or FAIL for each target."""
    for name in (NAMED, SHARED):
        for n in workers if name in report.stored else ():
            for patches in (False, True):
                found = ratio(report, (name, n, patches), "warm")
                what = f"{name}, {'patches' if patches else 'whole volumes'}, {n} workers"
                verdict = "PASS" if found >= SLACK else "FAIL"
                yield f"{verdict}: {what}: {found:.2f} of the speed without (at least {SLACK:g})"


def heading(args: argparse.Namespace) -> list[str]:
    """Title, machine, versions and the command of this run."""
    command = f"--volumes {args.volumes} --rounds {args.rounds} --seed {args.seed}"
    return [
        "# Loading with workers, measured",
        "",
        "Written by `workers.py`; what the columns mean is in [README.md](README.md).",
        "",
        f"- Command: `python benchmarks/workers.py {command}`",
        f"- {args.volumes} volumes of 160 × 224 × 160 made by `{args.generator}`, batches of "
        f"{BATCH}, patches of 64³",
        f"- {setting(PACKAGES)}",
    ]


def say(text: str) -> None:
    """Tell how far the run is."""
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--volumes", type=int, default=64, help="how many volumes (default: 64)")
    parser.add_argument("--rounds", type=int, default=5, help="visits to each loader (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of rows and order (default: 0)")
    parser.add_argument("--out", type=Path, help="also write the page here")
    parser.add_argument("--generator", default="phantom", help="who makes them (default: phantom)")
    args = parser.parse_args(argv)
    manifest = draw_cohort(args.volumes, seed=args.seed, name="workers")
    with tempfile.TemporaryDirectory(prefix="workers-") as folder:
        report = benchmark(
            manifest, args.generator, folder=Path(folder), rounds=args.rounds, seed=args.seed
        )
    page = render(report, heading(args))
    print(page)
    if args.out:
        args.out.write_text(page, encoding="utf-8")
    return int(any(line.startswith("FAIL") for line in targets(report)))


if __name__ == "__main__":
    sys.exit(main())
