"""The report for people: one HTML file that needs nothing beside it and loads nothing."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from synthbrain.evaluation import figures
from synthbrain.publish.files import write
from synthbrain.sheet import PLANES, cut

if TYPE_CHECKING:
    from synthbrain.evaluation.run import Evaluation
    from synthbrain.evaluation.sets import VolumeSet

_SLICES = (2.0, -18.0, 16.0)
"""Where pictures cut the sagittal, coronal and axial plane, mm."""

_SHOWN = 6
_NONE = "–"

_NAMES = {
    "ventricular_volume": "ventricular volume",
    "brain_volume": "brain volume",
}


def write_page(path: Path, results: Mapping[str, Any], evaluation: Evaluation) -> None:
    """Write the report.

    Parameters
    ----------
    path
        Of the file.
    results
        As ``results.json`` holds them.
    evaluation
        Where they come from: its volumes are pictured.

    Raises
    ------
    StoreError
        The file cannot be written.
    """
    write(path, page(results, evaluation).encode())


def page(results: Mapping[str, Any], evaluation: Evaluation) -> str:
    """The report as HTML."""
    sets = results["sets"]
    title = f"{sets['synthetic']['name']}: {sets['synthetic']['volumes']:,} volumes evaluated"
    parts = {
        "fidelity": _fidelity,
        "diversity": _diversity,
        "conditioning": _conditioning,
        "utility": _utility,
    }
    body = [_head(results, title), _volumes(evaluation)]
    body += [show(results[name]) for name, show in parts.items() if name in results]
    if "memorisation" in results:
        body.append(_memorisation(results["memorisation"], evaluation))
    body += [_missing(results["not_measured"]), _metrics(results["metrics"]), _how(results)]
    return _PAGE.format(title=html.escape(title), style=_CSS, body="\n".join(body))


def _head(results: Mapping[str, Any], title: str) -> str:
    rows = [
        (role, one["name"], f"{one['volumes']:,}", one["made_by"] or "published",
         one["rows_digest"][:12])
        for role, one in results["sets"].items()
    ]  # fmt: skip
    table = _table(("", "cohort", "volumes", "made by", "rows digest"), rows)
    return f"<h1>{html.escape(title)}</h1>{table}"


def _volumes(evaluation: Evaluation) -> str:
    shown = [_strip(evaluation.synthetic, range(min(_SHOWN, len(evaluation.synthetic))))]
    if evaluation.real is not None:
        shown.append(_strip(evaluation.real, range(min(_SHOWN, len(evaluation.real)))))
    return _section("Volumes", "The first of each set, one intensity window.", "".join(shown))


def _strip(volumes: VolumeSet, places: Iterable[int]) -> str:
    pictures = "".join(
        f"<figure>{_picture(volumes, place)}<figcaption>{html.escape(volumes.ids[place])}"
        "</figcaption></figure>"
        for place in places
    )
    return f"<h3>{html.escape(volumes.name)}</h3><div class=strip>{pictures}</div>"


def _picture(volumes: VolumeSet, place: int) -> str:
    """Three slices side by side, as an image in the page."""
    from PIL import Image

    volume = volumes[place][0].numpy()
    cuts = [
        cut(volume, volumes.affine, plane, at) for plane, at in zip(PLANES, _SLICES, strict=True)
    ]
    height = max(len(one) for one in cuts)
    padded = [np.pad(one, ((height - len(one), 0), (0, 3))) for one in cuts]
    grey = (np.concatenate(padded, axis=1).clip(0, 1) ** 0.8 * 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(grey).save(out, "JPEG", quality=85)
    data = base64.b64encode(out.getvalue()).decode()
    return f'<img alt="{html.escape(volumes.ids[place])}" src="data:image/jpeg;base64,{data}">'


def _fidelity(part: Mapping[str, Any]) -> str:
    network = part["network"]
    columns = ("", "n", "FD", "FD∞", "KID", "density", "coverage", "clipped density",
               "clipped coverage", "precision", "recall")  # fmt: skip
    keys = ("density", "coverage", "clipped_density", "clipped_coverage", "precision", "recall")
    rows = [
        (row["compared"], f"{row['generated']} / {row['real']}", _estimate(row.get("fd")),
         _estimate(row.get("fd_infinity")), _estimate(row.get("kid")),
         *(_number(row.get(key)) for key in keys))
        for row in part["rows"]
    ]  # fmt: skip
    published = _table(("published", "FD"), [(n, f"{v:g}") for n, v in part["published"].items()])
    curve = part["rows"][0].get("fd_infinity")
    plot = ""
    if curve:
        steps = 1 / np.asarray(curve["shares"])
        fit = np.polynomial.Polynomial.fit(steps, curve["distances"], 1).convert().coef
        plot = figures.line(
            steps, curve["distances"], labels=("one over the share of the volumes", "FD"),
            fit=(float(fit[0]), float(fit[1])),
        )  # fmt: skip
    what = "" if network["pretrained"] else (
        "<p class=warn>These features are those of a network with random weights: they can tell "
        "sets apart, but their distances cannot be compared with published ones.</p>"
    )  # fmt: skip
    notes = _notes(f"{row['compared']}: {name}: {why}" for row in part["rows"]
                   for name, why in row["missing"].items())  # fmt: skip
    intro = (
        f"Features of {html.escape(network['name'])} ({network['size']} entries, digest "
        f"{network['digest'][:12]}). Distances fall as sets grow: compare them at one n, or take "
        "FD∞, which is extrapolated to sets without end. ± is one standard error."
    )
    return _section("Fidelity", intro, what + _table(columns, rows) + notes + plot + published)


def _diversity(part: Mapping[str, Any]) -> str:
    names = [name for name, value in part["rows"][0].items() if isinstance(value, Mapping)]
    rows = [(name, *(_mean(row[name]) for row in part["rows"])) for name in names]
    table = _table(("mean over pairs", *(row["set"] for row in part["rows"])), rows)
    published = _table(
        ("published", "MS-SSIM", "4-G-R-SSIM"),
        [(n, f"{v['ms-ssim']:g}", f"{v['4-g-r-ssim']:g}") for n, v in part["published"].items()],
    )
    first = part["rows"][0][names[0]]
    intro = (
        f"Similarity of {first['pairs']:,} pairs of {first['volumes']:,} volumes; the less alike, "
        "the more diverse. Intervals (95 %) know that pairs share volumes. Which variant of "
        "4-G-R-SSIM was published is not known: all are here."
    )
    return _section("Diversity", intro, table + published)


def _conditioning(part: Mapping[str, Any]) -> str:
    body, rows = [], []
    for name, found in part["covariates"].items():
        told = found.get("classification")
        words = _NAMES.get(name, name)
        if told is not None:
            rows.append((words, told["n"] - told["n_failed"], "AUC " + _interval(told["auc"]),
                         "accuracy " + _interval(told["accuracy"]), "", "", ""))  # fmt: skip
            continue
        for key, label in (("trained", words), ("extrapolated", f"{words}, extrapolated")):
            fit = found["agreement"][key]
            if fit is not None:
                rows.append((label, fit["n"], *(_interval(fit[k]) for k in ("r", "slope")),
                             f"{_interval(fit['intercept'])} {found['unit']}",
                             f"{fit['mean_absolute_error']:.3g} {found['unit']}",
                             f"{fit['mean_error']:+.3g} {found['unit']}"))  # fmt: skip
        plots = figures.agreement(found["asked"], [np.nan if v is None else v for v in
                                  found["measured"]], trained=tuple(found["trained"]),
                                  unit=found["unit"])  # fmt: skip
        fit = found["agreement"]["trained"]
        if fit is not None and len(fit["bias"]) > 1:
            groups = [dict(zip(("low", "high", "n", "mean_error"), b, strict=True))
                      for b in map(_values, fit["bias"])]  # fmt: skip
            plots += figures.bias(groups, unit=found["unit"])
        body.append(f"<h3>{html.escape(words)}</h3><div class=row>{plots}</div>")
    table = _table(("covariate", "n", "r", "slope", "intercept", "MAE", "mean error"), rows)
    body += [_leakage(part["leakage"]), _sweeps(part["sweeps"])]
    who = part["by"].get("volumes")
    failures = who["failures"] if who else {}
    notes = _notes(f"{id}: {why}" for id, why in list(failures.items())[:10])
    more = f"{len(failures):,} volumes could not be measured. " if failures else ""
    told = (
        f"Volumes by {html.escape(who['name'])} {html.escape(who.get('version', ''))}. "
        if who
        else ""
    )
    intro = (
        f"{told}{more}Intervals are at 95 %; published: r = 0.972 for ventricles, 0.692 for age."
    )
    return _section("Conditioning", intro, table + notes + "".join(body))


def _leakage(found: Mapping[str, Any]) -> str:
    if "missing" in found:
        return f"<p>No leakage matrix: {html.escape(found['missing'])}</p>"
    slopes = [[np.nan if v is None else v for v in row] for row in found["slopes"]]
    rows, columns = ([_NAMES.get(n, n) for n in found[key]] for key in ("measured", "asked"))
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
        (_NAMES.get(moved, moved), one["n"], _number(one["monotone"]),
         *(_interval(one["slopes"][name]) for name in names))
        for moved, one in found.items()
    ]  # fmt: skip
    columns = ("moved", "volumes", "steps that rose", *(_NAMES.get(n, n) for n in names))
    return (
        "<h3>sweeps</h3><p>Slopes of what is measured (columns) within seeds, as one covariate "
        "moves and the others stay, normalised: its own should be 1, the others 0.</p>"
        + _table(columns, rows)
    )


def _memorisation(part: Mapping[str, Any], evaluation: Evaluation) -> str:
    rows = [
        (one["space"], one["verdict"], _number(_p(one["finding"])), _share(one["finding"]["above"]),
         _share(one["control"]["above"]), f"{100 * one['expected']:.0f} %",
         _share(one["finding"]["nearer"]), _share(one["control"]["nearer"]))
        for one in part["spaces"]
    ]  # fmt: skip
    table = _table(("space", "verdict", "p", "above threshold", "in the control", "expected",
                    "nearer to training", "in the control"), rows)  # fmt: skip
    doses = list(part["spaces"][0]["power"])
    power = _table(
        ("share of planted copies found", *doses),
        [(one["space"], *(_share(one["power"][dose]["found"]) for dose in doses))
         for one in part["spaces"]],
    )  # fmt: skip
    twins = _table(
        ("space", "with a near-duplicate", "expected"),
        [(space, _share(one["share"]), f"{100 * one['expected']:.0f} %") if "share" in one
         else (space, one["missing"], "") for space, one in part["duplicates"].items()],
    )  # fmt: skip
    pairs = "".join(_pair(one, evaluation) for one in part["worst"][:_SHOWN])
    intro = (
        f"<b>{html.escape(part['verdict'])}</b> over all spaces (p = {part['p']:.2g}). To find "
        "nothing is worth as much as the power: the share of copies made on purpose that are found."
    )
    return _section(
        "Copies of training volumes",
        intro,
        f"{table}{power}<h3>among synthetic volumes</h3>{twins}"
        f"<h3>the pairs most alike</h3>{pairs}",
    )


def _pair(one: Mapping[str, Any], evaluation: Evaluation) -> str:
    training = evaluation.training
    assert training is not None
    members = training.part(np.flatnonzero(training.table["split"] == "train").tolist())
    made, known = one["places"]
    return (
        f"<figure class=pair>{_picture(evaluation.synthetic, made)}{_picture(members, known)}"
        f"<figcaption>{html.escape(one['synthetic'])} (synthetic) and "
        f"{html.escape(one['training'])} (training): correlation {one['similarity']:.3f}, found in "
        f"{html.escape(', '.join(one['found_in']))}</figcaption></figure>"
    )


def _utility(part: Mapping[str, Any]) -> str:
    scores = _table(
        ("target", "metric", "trained on", "mean over seeds", "each seed"),
        [(one["target"], one["metric"], one["arm"], _interval(one["estimate"]),
          ", ".join(f"{v:.3g}" for v in one["by_seed"])) for one in part["scores"]],
    )  # fmt: skip
    notes = _notes(one["told"] for one in part["differences"])
    intro = (
        f"Networks trained for {part['steps']:,} steps, {part['seeds']} seeds, tested on "
        f"{part['real_test']:,} real volumes."
    )
    hurt = (
        "<p class=warn>Synthetic data hurt: " + "; ".join(map(html.escape, part["hurts"])) + "</p>"
    )
    return _section("Use for training", intro, (hurt if part["hurts"] else "") + scores + notes)


def _missing(reasons: Mapping[str, str]) -> str:
    if not reasons:
        return ""
    rows = [(name, why) for name, why in reasons.items()]
    return _section("Not measured", "", _table(("part", "why"), rows))


def _metrics(values: Mapping[str, float]) -> str:
    rows = [(name, f"{value:.5g}") for name, value in values.items()]
    return _section("All figures", "As <code>--require</code> names them.",
                    _table(("name", "value"), rows))  # fmt: skip


def _how(results: Mapping[str, Any]) -> str:
    seconds = [(f"seconds for {part}", f"{value:,}") for part, value in results["seconds"].items()]
    volumes = results["sets"]["synthetic"]["volumes"]
    each = sum(results["seconds"].values()) / max(1, volumes)
    rows = [*results["settings"].items(), *results["versions"].items(), *seconds,
            ("seconds a synthetic volume", f"{each:.2f}")]  # fmt: skip
    return _section("Settings and versions", "", _table(("", ""), rows))


def _section(title: str, intro: str, body: str) -> str:
    return f"<section><h2>{title}</h2><p>{intro}</p>{body}</section>"


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{html.escape(str(column))}" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}" for cell in row) for row in rows
    )
    return f"<table><thead><tr>{head}</thead><tbody>{body}</tbody></table>"


def _notes(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{html.escape(line)}" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def _values(found: Any) -> Sequence[Any]:
    return list(found.values()) if isinstance(found, Mapping) else list(found)


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.3g}"


def _estimate(found: Mapping[str, Any] | None) -> str:
    return _NONE if found is None else f"{found['value']:.4g} ± {found['error']:.2g}"


def _interval(found: Sequence[float] | None) -> str:
    if found is None:
        return _NONE
    value, low, high = found
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def _mean(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['mean']:.4f} ({low:.4f} to {high:.4f})"


def _share(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{100 * found['count'] / found['of']:.0f} % ({100 * low:.0f} to {100 * high:.0f})"


def _p(finding: Mapping[str, Any]) -> float:
    return min(1.0, 2 * min(float(finding["p_above"]), float(finding["p_nearer"])))


_CSS = """
body { background: #090b0f; color: #eceef2; font: 14px/1.5 system-ui, sans-serif;
  margin: 2em auto; max-width: 76em; padding: 0 1.5em; }
h1 { font-size: 1.7em; } h2 { margin-top: 2em; border-bottom: 1px solid #222834; }
h3 { color: #868f9d; font-weight: 600; margin-bottom: .3em; }
p, figcaption, li { color: #aab2c0; } p.warn { color: #ff9d7a; } b { color: #eceef2; }
table { border-collapse: collapse; margin: .8em 0; display: block; overflow-x: auto; }
td, th { padding: .25em .9em .25em 0; text-align: left; font-variant-numeric: tabular-nums;
  border-bottom: 1px solid #161b24; }
th { color: #868f9d; font-weight: 600; }
figure { margin: 0; } img { width: 100%; } svg { max-width: 100%; height: auto; }
.strip { display: grid; grid-template-columns: repeat(3, 1fr); gap: .8em; }
.row { display: flex; flex-wrap: wrap; gap: 1em; align-items: flex-start; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .4em; margin: 0 0 1em; }
.pair figcaption { grid-column: 1 / 3; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
