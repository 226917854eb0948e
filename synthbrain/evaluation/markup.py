"""Pieces of the report: sections, tables and lists, and figures as people read them."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NONE = "–"

_NAMES = {"ventricular_volume": "ventricular volume", "brain_volume": "brain volume"}


def section(title: str, intro: str, body: str) -> str:
    """A section with its heading; all three are HTML."""
    return f"<section><h2>{title}</h2><p>{intro}</p>{body}</section>"


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table of plain text, a sequence of cells a row."""
    head = "".join(f"<th>{html.escape(str(column))}" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}" for cell in row) for row in rows
    )
    return f"<table><thead><tr>{head}</thead><tbody>{body}</tbody></table>"


def notes(lines: Iterable[str]) -> str:
    """A list of plain text; nothing where there are no lines."""
    items = "".join(f"<li>{html.escape(line)}" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def words(name: str) -> str:
    """A covariate's name as people write it."""
    return _NAMES.get(name, name)


def number(value: float | None) -> str:
    """A figure, or a dash."""
    return NONE if value is None else f"{value:.3g}"


def estimate(found: Mapping[str, Any] | None) -> str:
    """A value with its standard error, or a dash."""
    return NONE if found is None else f"{found['value']:.4g} ± {found['error']:.2g}"


def interval(found: Sequence[float] | None) -> str:
    """A value with the ends of its interval, or a dash."""
    if found is None:
        return NONE
    value, low, high = found
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def mean(found: Mapping[str, Any]) -> str:
    """A mean with the ends of its interval."""
    low, high = found["interval"]
    return f"{found['mean']:.4f} ({low:.4f} to {high:.4f})"


def percent(value: float) -> str:
    """A share as whole percent."""
    return f"{100 * value:.0f} %"


def share(found: Mapping[str, Any]) -> str:
    """A counted share as percent, with the ends of its interval."""
    low, high = found["interval"]
    return f"{100 * found['count'] / found['of']:.0f} % ({100 * low:.0f} to {100 * high:.0f})"
