"""How the command talks: data on stdout, chatter on stderr, one line an error."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import typer
from typer.core import TyperGroup

from synthbrain.errors import (
    CovariateError,
    EvaluationError,
    SynthBrainError,
    TrainingError,
    WeightsError,
)

OK, PROBLEMS, USAGE, INTERRUPTED = 0, 1, 2, 130
"""Exit codes."""

_LINE = "synthbrain.line"


_TOLD = (SynthBrainError, CovariateError, EvaluationError, TrainingError, WeightsError, OSError)
"""Errors of the user's world, told in one line."""


class Commands(TyperGroup):
    """A group whose errors are one line on stderr.

    Exit codes: 0 ok, 1 problems were found, 2 an error of the user or of the system, 3 a condition
    of ``evaluate`` is not met, 130 interrupted.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Remember the whole line, so that hints can repeat it."""
        ctx.meta[_LINE] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command with this house's manners."""
        try:
            with notes():
                return super().invoke(ctx)
        except _TOLD as error:
            if isinstance(error, BrokenPipeError):  # the reader of stdout left: Typer handles it
                raise
            if ctx.params.get("debug") or os.environ.get("SYNTHBRAIN_DEBUG", "0") not in ("", "0"):
                traceback.print_exc(file=sys.stderr)
            say(f"error: {_one_line(str(error))}")
            raise typer.Exit(USAGE) from None
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(INTERRUPTED) from None


def say(text: str) -> None:
    """Print chatter on stderr."""
    print(text, file=sys.stderr, flush=True)


def hint(*command: str) -> None:
    """Say which command comes next."""
    say(f"next: {shlex.join(command)}")


def again(option: str, value: object) -> tuple[str, ...]:
    """An option as it was given, for a hint."""
    return () if value is None else (option, str(value))


def same_command(ctx: typer.Context) -> str:
    """The command line being run, to be run again."""
    return shlex.join(["synthbrain", *ctx.meta[_LINE]])


def interrupted(ctx: typer.Context, kept: str) -> typer.Exit:
    """Say what an interrupt left and how to continue; the exit to raise."""
    say(f"interrupted: {kept}")
    say(f"to continue: {same_command(ctx)}")
    return typer.Exit(INTERRUPTED)


def show_json(value: Any) -> None:
    """Print a value as JSON on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def show_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, stream: TextIO | None = None
) -> None:
    """Print a table: with colour on a terminal, as aligned text elsewhere; stdout by default."""
    stream = stream or sys.stdout
    if stream.isatty():
        _rich_table(columns, rows, stream)
        return
    lines = [list(columns), *rows] if any(columns) else list(rows)
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip(), file=stream)


def examples(*commands: str) -> str:
    """Example commands as the end of a help page."""
    return "\n".join(["[bold]Examples[/bold]", "", *(f"  {command}" for command in commands)])


@contextlib.contextmanager
def notes() -> Iterator[None]:
    """Show warnings, and what the package logs, as one ``note:`` line each."""

    def show(message: Warning | str, *_: object) -> None:
        say(f"note: {_one_line(str(message))}")

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            show(record.getMessage())

    log, handler = logging.getLogger("synthbrain"), Handler(logging.WARNING)
    log.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show  # type: ignore[assignment]
            yield
    finally:
        log.removeHandler(handler)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _rich_table(columns: Sequence[str], rows: Sequence[Sequence[str]], stream: TextIO) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_header=any(columns), pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, style="cyan" if number == 0 else None)
    for row in rows:
        table.add_row(*map(Text, row))
    Console(file=stream).print(table)
