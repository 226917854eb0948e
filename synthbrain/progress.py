"""Progress for people: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

_LOG_SECONDS = 30.0


def track(steps: Iterable[T], *, total: int, what: str, show: bool = True) -> Iterator[T]:
    """Pass ``steps`` through, showing how many of ``total`` are done on standard error.

    On a terminal this is a bar with the rate and the time left; elsewhere, as in a batch job's
    log, one line every 30 s and one at the end.
    """
    if not show or total == 0:
        yield from steps
    elif sys.stderr.isatty():
        yield from _bar(steps, total, what)
    else:
        yield from _lines(steps, total, what)


def _bar(steps: Iterable[T], total: int, what: str) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        for step in steps:
            progress.advance(task)
            yield step


def _lines(steps: Iterable[T], total: int, what: str) -> Iterator[T]:
    start = last = time.monotonic()
    for count, step in enumerate(steps, 1):
        now = time.monotonic()
        if count == total or now - last >= _LOG_SECONDS:
            last = now
            print(f"{what}: {count}/{total} in {now - start:.0f} s", file=sys.stderr, flush=True)
        yield step
