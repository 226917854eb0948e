"""Figures of the report: SVG text that stands in a page without anything beside it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from synthbrain.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

TEXT, QUIET, BLUE, ORANGE = "#eceef2", "#868f9d", "#7abeff", "#ff9d7a"

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "synthbrain",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": TEXT,
    "axes.labelcolor": QUIET,
    "axes.edgecolor": QUIET,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "legend.frameon": False,
}


def require() -> None:
    """See that figures can be drawn.

    Raises
    ------
    UsageError
        matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(
            'matplotlib, which draws reports, is not here; pip install "synthbrain[evaluate]"'
        ) from None


def agreement(
    asked: ArrayLike, measured: ArrayLike, *, trained: tuple[float, float], unit: str
) -> str:
    """Asked against measured: the identity, and the range a generator was trained on.

    Parameters
    ----------
    asked, measured
        ``(n,)``; pairs with a missing measurement are not drawn.
    trained
        Ends of that range, drawn where something was asked beyond it.
    unit
        Of both.
    """
    x, y = np.asarray(asked, float), np.asarray(measured, float)
    there = np.isfinite(x) & np.isfinite(y)
    x, y = x[there], y[there]
    figure, axes = _axes(3.4, 3.4)
    ends = (min(x.min(), y.min()), max(x.max(), y.max())) if len(x) else (0.0, 1.0)
    axes.plot(ends, ends, color=QUIET, linewidth=0.8)
    axes.scatter(x, y, s=9, color=BLUE, alpha=0.7, linewidths=0)
    for end in trained:
        if ends[0] < end < ends[1] and ((x < trained[0]) | (x > trained[1])).any():
            axes.axvline(end, color=ORANGE, linewidth=0.8, linestyle=":")
    axes.set(xlabel=f"asked ({unit})", ylabel=f"measured ({unit})")
    return _text(figure)


def bias(groups: Sequence[Sequence[float]], *, unit: str) -> str:
    """Mean error by decile of what was asked.

    Parameters
    ----------
    groups
        Lowest and highest value asked, how many, and their mean error; as
        :class:`generation.evaluate.conditioning.Bias`.
    unit
        Of them.
    """
    figure, axes = _axes(3.4, 2.2)
    middles = [(low + high) / 2 for low, high, _, _ in groups]
    axes.axhline(0, color=QUIET, linewidth=0.8)
    axes.plot(middles, [error for *_, error in groups], "o-", color=BLUE, markersize=3)
    axes.set(xlabel=f"asked ({unit})", ylabel=f"mean error ({unit})")
    return _text(figure)


def matrix(values: ArrayLike, rows: Sequence[str], columns: Sequence[str]) -> str:
    """A matrix of slopes in colours, each with its number.

    Parameters
    ----------
    values
        ``(len(rows), len(columns))``, about -1 to 1; NaN where there is none.
    rows, columns
        Their names.
    """
    table = np.asarray(values, float)
    figure, axes = _axes(1.8 + 0.85 * len(columns), 1.0 + 0.45 * len(rows))
    axes.imshow(table, cmap="RdBu_r", vmin=-1.2, vmax=1.2, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        dark = abs(value) < 0.7
        told = "–" if np.isnan(value) else f"{value:.2f}"
        axes.text(column, row, told, ha="center", va="center", color="#090b0f" if dark else TEXT)
    axes.set_xticks(range(len(columns)), [name.replace(" ", "\n") for name in columns])
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel="asked", ylabel="measured")
    axes.tick_params(length=0)
    return _text(figure)


def histogram(
    groups: Mapping[str, ArrayLike], *, label: str, mark: tuple[str, float] | None = None
) -> str:
    """Distributions over each other, on common bins.

    Parameters
    ----------
    groups
        Values ``(n,)`` by name, two at most.
    label
        What they are.
    mark
        Name and place of a line.
    """
    figure, axes = _axes(4.6, 2.4)
    everything = np.concatenate([np.ravel(values) for values in groups.values()])
    edges = np.histogram_bin_edges(everything, bins=40).tolist()
    for colour, (name, values) in zip((BLUE, ORANGE), groups.items(), strict=False):
        shares = np.full(np.size(values), 1 / max(1, np.size(values)))
        axes.hist(np.ravel(values), edges, weights=shares, color=colour, alpha=0.6, label=name)
    if mark is not None:
        axes.axvline(mark[1], color=TEXT, linewidth=0.8, linestyle="--", label=mark[0])
    axes.set(xlabel=label, ylabel="share")
    axes.legend(fontsize=8)
    return _text(figure)


def line(
    x: ArrayLike, y: ArrayLike, *, labels: tuple[str, str], fit: tuple[float, float] | None = None
) -> str:
    """Points, and a straight line through them.

    Parameters
    ----------
    x, y
        ``(n,)``.
    labels
        Of the axes.
    fit
        The line's value at 0, and its slope.
    """
    figure, axes = _axes(3.4, 2.4)
    x = np.asarray(x, float)
    axes.plot(x, np.asarray(y, float), "o", color=BLUE, markersize=4)
    if fit is not None:
        ends = np.array((0.0, x.max()))
        axes.plot(ends, fit[0] + fit[1] * ends, color=ORANGE, linewidth=1)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    return _text(figure)


def intervals(rows: Mapping[str, tuple[float, float, float]], *, label: str) -> str:
    """Values with their intervals, one below the other.

    Parameters
    ----------
    rows
        Value, low and high by name.
    label
        What they are.
    """
    figure, axes = _axes(5.2, 0.8 + 0.32 * len(rows))
    for place, (value, low, high) in enumerate(rows.values()):
        axes.plot((low, high), (place, place), color=QUIET, linewidth=1.2)
        axes.plot(value, place, "o", color=BLUE, markersize=5)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set(xlabel=label)
    return _text(figure)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
        return figure, figure.subplots()


def _text(figure: Any) -> str:
    """The figure as an ``<svg>`` element; the same for the same figure."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
