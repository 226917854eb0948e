"""Progress for people: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

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


@contextlib.contextmanager
def stages(volumes: int) -> Iterator[Callable[[str, int, int], None]]:
    """Show what a generator does inside each of ``volumes`` volumes.

    Yields
    ------
    callable
        To be told the name of a stage, how much of it is done, and how much there is. What is
        shown where is as in :func:`track`.
    """
    if not sys.stderr.isatty():
        yield _stage_lines(volumes)
        return
    with _progress() as progress:
        task = progress.add_task("starting", total=None)
        made = 0

        def told(stage: str, done: int, total: int) -> None:
            nonlocal made
            made += stage == "decoding"
            what = f"{stage}, {made} of {volumes} volumes made"
            progress.update(task, description=what, completed=done, total=total)

        yield told


@contextlib.contextmanager
def measured(what: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Show how many of ``total`` bytes are done.

    Yields
    ------
    callable
        To be told how many there are now, and a note. What is shown where is as in :func:`track`,
        with the rate.
    """
    if not sys.stderr.isatty():
        yield _measured_lines(what, total)
        return
    from rich.progress import DownloadColumn, TransferSpeedColumn

    with _progress(DownloadColumn(), TransferSpeedColumn()) as progress:
        task = progress.add_task(what, total=total)

        def told(done: int, note: str) -> None:
            progress.update(task, description=f"{what}, {note}", completed=done)

        yield told


@contextlib.contextmanager
def counted(what: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
    """Show how many of ``total`` steps are done, ``done`` of them before.

    Yields
    ------
    callable
        To be told how many there are now, and a note. What is shown where is as in :func:`track`.
    """
    if not sys.stderr.isatty():
        yield _counted_lines(what, total)
        return
    with _progress() as progress:
        task = progress.add_task(what, total=total, completed=done)

        def told(done: int, note: str) -> None:
            progress.update(task, description=f"{what}, {note}" if note else what, completed=done)

        yield told


def _counted_lines(what: str, total: int) -> Callable[[int, str], None]:
    start = last = time.monotonic()

    def told(done: int, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= _LOG_SECONDS:
            last = now
            text = f"{what}: {done:,}/{total:,} in {now - start:.0f} s"
            print(f"{text}, {note}" if note else text, file=sys.stderr, flush=True)

    return told


def _measured_lines(what: str, total: int) -> Callable[[int, str], None]:
    start = last = time.monotonic()

    def told(done: int, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _LOG_SECONDS:
            last = now
            text = f"{what}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB in {now - start:.0f} s"
            print(f"{text}, {note}", file=sys.stderr, flush=True)

    return told


def _stage_lines(volumes: int) -> Callable[[str, int, int], None]:
    start = last = time.monotonic()
    made = 0

    def told(stage: str, done: int, total: int) -> None:
        nonlocal last, made
        made += stage == "decoding"
        now = time.monotonic()
        if now - last >= _LOG_SECONDS or (stage == "decoding" and made == volumes):
            last = now
            print(
                f"{stage}: {done}/{total}, {made} of {volumes} volumes made in {now - start:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    return told


def _bar(steps: Iterable[T], total: int, what: str) -> Iterator[T]:
    with _progress() as progress:
        task = progress.add_task(what, total=total)
        for step in steps:
            progress.advance(task)
            yield step


def _progress(*amount: ProgressColumn) -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class _Rate(ProgressColumn):
        """Steps a second, or seconds a step."""

        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            if not speed:
                return Text("")
            return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        *(amount or (MofNCompleteColumn(), _Rate())),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))


def _lines(steps: Iterable[T], total: int, what: str) -> Iterator[T]:
    start = last = time.monotonic()
    for count, step in enumerate(steps, 1):
        now = time.monotonic()
        if count == total or now - last >= _LOG_SECONDS:
            last = now
            print(f"{what}: {count}/{total} in {now - start:.0f} s", file=sys.stderr, flush=True)
        yield step
