"""The report's section on each part of an evaluation, from what ``results.json`` holds of it."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from synthbrain.evaluation import figures
from synthbrain.evaluation.markup import (
    estimate,
    interval,
    mean,
    notes,
    number,
    percent,
    section,
    share,
    table,
    words,
)
from synthbrain.evaluation.pictures import SHOWN, pair

if TYPE_CHECKING:
    from synthbrain.evaluation.sets import VolumeSet

_FAILURES = 10
"""Volumes that could not be measured and are named."""


def fidelity(part: Mapping[str, Any]) -> str:
    """Distances on features, the curve FD∞ comes from, and published distances."""
    network = part["network"]
    scores = ("density", "coverage", "clipped_density", "clipped_coverage", "precision", "recall")
    rows = [
        (row["compared"], f"{row['generated']} / {row['real']}",
         *(estimate(row.get(name)) for name in ("fd", "fd_infinity", "kid")),
         *(number(row.get(name)) for name in scores))
        for row in part["rows"]
    ]  # fmt: skip
    columns = ("", "n", "FD", "FD∞", "KID", *(name.replace("_", " ") for name in scores))
    published = table(("published", "FD"), [(n, f"{v:g}") for n, v in part["published"].items()])
    warning = "" if network["pretrained"] else (
        "<p class=warn>These features are those of a network with random weights: they can tell "
        "sets apart, but their distances cannot be compared with published ones.</p>"
    )  # fmt: skip
    missing = notes(
        f"{row['compared']}: {name}: {why}"
        for row in part["rows"]
        for name, why in row["missing"].items()
    )
    intro = (
        f"Features of {html.escape(network['name'])} ({network['size']} entries, digest "
        f"{network['digest'][:12]}). Distances fall as sets grow: compare them at one n, or take "
        "FD∞, which is extrapolated to sets without end. ± is one standard error."
    )
    curve = _curve(part["rows"][0].get("fd_infinity"))
    return section("Fidelity", intro, warning + table(columns, rows) + missing + curve + published)


def _curve(found: Mapping[str, Any] | None) -> str:
    """The Fréchet distance as sets grow, with the line that is extrapolated."""
    if not found:
        return ""
    steps = 1 / np.asarray(found["shares"])
    at_zero, slope = np.polynomial.Polynomial.fit(steps, found["distances"], 1).convert().coef
    return figures.line(
        steps, found["distances"], labels=("one over the share of the volumes", "FD"),
        fit=(float(at_zero), float(slope)),
    )  # fmt: skip


def diversity(part: Mapping[str, Any]) -> str:
    """Mean similarity of pairs, beside published means."""
    names = [name for name, value in part["rows"][0].items() if isinstance(value, Mapping)]
    rows = [(name, *(mean(row[name]) for row in part["rows"])) for name in names]
    means = table(("mean over pairs", *(row["set"] for row in part["rows"])), rows)
    published = table(
        ("published", "MS-SSIM", "4-G-R-SSIM"),
        [(n, f"{v['ms-ssim']:g}", f"{v['4-g-r-ssim']:g}") for n, v in part["published"].items()],
    )
    first = part["rows"][0][names[0]]
    intro = (
        f"Similarity of {first['pairs']:,} pairs of {first['volumes']:,} volumes; the less alike, "
        "the more diverse. Intervals (95 %) know that pairs share volumes. Which variant of "
        "4-G-R-SSIM was published is not known: all are here."
    )
    return section("Diversity", intro, means + published)


def conditioning(part: Mapping[str, Any]) -> str:
    """Asked against measured covariates, leakage, and sweeps."""
    rows = [row for name, found in part["covariates"].items() for row in _fits(name, found)]
    fits = table(("covariate", "n", "r", "slope", "intercept", "MAE", "mean error"), rows)
    plots = "".join(
        _plots(name, found)
        for name, found in part["covariates"].items()
        if "classification" not in found
    )
    who = part["by"].get("volumes")
    failures = who["failures"] if who else {}
    failed = notes(f"{id}: {why}" for id, why in list(failures.items())[:_FAILURES])
    more = f"{len(failures):,} volumes could not be measured. " if failures else ""
    measurer = (
        f"Volumes by {html.escape(who['name'])} {html.escape(who.get('version', ''))}. "
        if who
        else ""
    )
    intro = (
        f"{measurer}{more}Intervals are at 95 %; published: r = 0.972 for ventricles, 0.692 for "
        "age."
    )
    body = fits + failed + plots + _leakage(part["leakage"]) + _sweeps(part["sweeps"])
    return section("Conditioning", intro, body)


def _fits(name: str, found: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """The table's rows on one covariate."""
    told = found.get("classification")
    if told is not None:
        return [(words(name), told["n"] - told["n_failed"], "AUC " + interval(told["auc"]),
                 "accuracy " + interval(told["accuracy"]), "", "", "")]  # fmt: skip
    unit = found["unit"]
    fits = {
        words(name): found["agreement"]["trained"],
        f"{words(name)}, extrapolated": found["agreement"]["extrapolated"],
    }
    return [
        (label, fit["n"], interval(fit["r"]), interval(fit["slope"]),
         f"{interval(fit['intercept'])} {unit}", f"{fit['mean_absolute_error']:.3g} {unit}",
         f"{fit['mean_error']:+.3g} {unit}")
        for label, fit in fits.items() if fit is not None
    ]  # fmt: skip


def _plots(name: str, found: Mapping[str, Any]) -> str:
    """Asked against measured, and the error by decile."""
    unit = found["unit"]
    plots = figures.agreement(
        found["asked"], _with_nan(found["measured"]), trained=tuple(found["trained"]), unit=unit
    )
    fit = found["agreement"]["trained"]
    if fit is not None and len(fit["bias"]) > 1:
        plots += figures.bias(fit["bias"], unit=unit)
    return f"<h3>{html.escape(words(name))}</h3><div class=row>{plots}</div>"


def _leakage(found: Mapping[str, Any]) -> str:
    if "missing" in found:
        return f"<p>No leakage matrix: {html.escape(found['missing'])}</p>"
    slopes = [_with_nan(row) for row in found["slopes"]]
    rows, columns = ([words(name) for name in found[key]] for key in ("measured", "asked"))
    return (
        "<h3>leakage</h3><p>Standardised partial slopes: how far a measured covariate (row) moves "
        "as an asked one (column) does. Off the diagonal they should be 0.</p>"
        + figures.matrix(slopes, rows, columns)
    )


def _sweeps(found: Mapping[str, Any]) -> str:
    if not found:
        return ""
    names = list(next(iter(found.values()))["slopes"])
    rows = [
        (words(moved), one["n"], number(one["monotone"]),
         *(interval(one["slopes"][name]) for name in names))
        for moved, one in found.items()
    ]  # fmt: skip
    columns = ("moved", "volumes", "steps that rose", *(words(name) for name in names))
    return (
        "<h3>sweeps</h3><p>Slopes of what is measured (columns) within seeds, as one covariate "
        "moves and the others stay, normalised: its own should be 1, the others 0.</p>"
        + table(columns, rows)
    )


def memorisation(part: Mapping[str, Any], synthetic: VolumeSet, training: VolumeSet) -> str:
    """The audit of each space, its power, near-duplicates, and the pairs most alike.

    Parameters
    ----------
    part
        What was found.
    synthetic, training
        The volumes it was found in, to be pictured.
    """
    pairs = "".join(pair(match, synthetic, training) for match in part["worst"][:SHOWN])
    intro = (
        f"<b>{html.escape(part['verdict'])}</b> over all spaces (p = {part['p']:.2g}). To find "
        "nothing is worth as much as the power: the share of copies made on purpose that are found."
    )
    return section(
        "Copies of training volumes",
        intro,
        f"{_audits(part)}{_power(part)}<h3>among synthetic volumes</h3>{_duplicates(part)}"
        f"<h3>the pairs most alike</h3>{pairs}",
    )


def _audits(part: Mapping[str, Any]) -> str:
    columns = ("space", "verdict", "p", "above threshold", "in the control", "expected",
               "nearer to training", "in the control")  # fmt: skip
    rows = [
        (one["space"], one["verdict"], number(_p(one["finding"])), share(one["finding"]["above"]),
         share(one["control"]["above"]), percent(one["expected"]), share(one["finding"]["nearer"]),
         share(one["control"]["nearer"]))
        for one in part["spaces"]
    ]  # fmt: skip
    return table(columns, rows)


def _power(part: Mapping[str, Any]) -> str:
    doses = list(part["spaces"][0]["power"])
    rows = [
        (one["space"], *(share(one["power"][dose]["found"]) for dose in doses))
        for one in part["spaces"]
    ]
    return table(("share of planted copies found", *doses), rows)


def _duplicates(part: Mapping[str, Any]) -> str:
    rows = [
        (space, share(one["share"]), percent(one["expected"]))
        if "share" in one
        else (space, one["missing"], "")
        for space, one in part["duplicates"].items()
    ]
    return table(("space", "with a near-duplicate", "expected"), rows)


def utility(part: Mapping[str, Any]) -> str:
    """How well networks do that were trained on real, on synthetic and on both."""
    scores = table(
        ("target", "metric", "trained on", "mean over seeds", "each seed"),
        [(one["target"], one["metric"], one["arm"], interval(one["estimate"]),
          ", ".join(f"{v:.3g}" for v in one["by_seed"])) for one in part["scores"]],
    )  # fmt: skip
    differences = notes(one["told"] for one in part["differences"])
    intro = (
        f"Networks trained for {part['steps']:,} steps, {part['seeds']} seeds, tested on "
        f"{part['real_test']:,} real volumes."
    )
    hurts = "; ".join(map(html.escape, part["hurts"]))
    warning = f"<p class=warn>Synthetic data hurt: {hurts}</p>" if hurts else ""
    return section("Use for training", intro, warning + scores + differences)


SECTIONS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "fidelity": fidelity,
    "diversity": diversity,
    "conditioning": conditioning,
    "utility": utility,
}
"""Sections that need no volumes, in the report's order."""


def _with_nan(values: list[float | None]) -> list[float]:
    """What was written as JSON, which knows no NaN, as numbers."""
    return [np.nan if value is None else value for value in values]


def _p(finding: Mapping[str, Any]) -> float:
    """Of both tests together, as :attr:`generation.evaluate.memorisation.Finding.p`."""
    return min(1.0, 2 * min(float(finding["p_above"]), float(finding["p_nearer"])))
