"""The report for people: one HTML file that needs nothing beside it and loads nothing."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from synthbrain.evaluation import sections
from synthbrain.evaluation.markup import section, table
from synthbrain.evaluation.pictures import strip
from synthbrain.evaluation.sets import VolumeSet
from synthbrain.files import write


def write_page(path: Path, results: Mapping[str, Any], sets: Mapping[str, VolumeSet]) -> None:
    """Write the report.

    Parameters
    ----------
    path
        Of the file.
    results
        As ``results.json`` holds them.
    sets
        The volumes that are pictured: ``synthetic`` and, where there are, ``real`` and ``members``.

    Raises
    ------
    StoreError
        The file cannot be written.
    """
    write(path, page(results, sets).encode())


def page(results: Mapping[str, Any], sets: Mapping[str, VolumeSet]) -> str:
    """The report as HTML."""
    synthetic = results["sets"]["synthetic"]
    title = f"{synthetic['name']}: {synthetic['volumes']:,} volumes evaluated"
    body = [_head(results, title), _volumes(sets)]
    body += [show(results[name]) for name, show in sections.SECTIONS.items() if name in results]
    if "memorisation" in results:
        found = results["memorisation"]
        body.append(sections.memorisation(found, sets["synthetic"], sets["members"]))
    body += [_missing(results["not_measured"]), _metrics(results["metrics"]), _how(results)]
    return _PAGE.format(title=html.escape(title), style=_CSS, body="\n".join(body))


def _head(results: Mapping[str, Any], title: str) -> str:
    columns = ("", "cohort", "volumes", "made by", "rows digest")
    rows = [
        (role, one["name"], f"{one['volumes']:,}", one["made_by"] or "published",
         one["rows_digest"][:12])
        for role, one in results["sets"].items()
    ]  # fmt: skip
    return f"<h1>{html.escape(title)}</h1>{table(columns, rows)}"


def _volumes(sets: Mapping[str, VolumeSet]) -> str:
    strips = "".join(strip(sets[role]) for role in ("synthetic", "real") if role in sets)
    return section("Volumes", "The first of each set, one intensity window.", strips)


def _missing(reasons: Mapping[str, str]) -> str:
    if not reasons:
        return ""
    return section("Not measured", "", table(("part", "why"), list(reasons.items())))


def _metrics(values: Mapping[str, float]) -> str:
    rows = [(name, f"{value:.5g}") for name, value in values.items()]
    named = "As <code>--require</code> names them."
    return section("All figures", named, table(("name", "value"), rows))


def _how(results: Mapping[str, Any]) -> str:
    seconds = [(f"seconds for {part}", f"{value:,}") for part, value in results["seconds"].items()]
    volumes = results["sets"]["synthetic"]["volumes"]
    each = sum(results["seconds"].values()) / max(1, volumes)
    rows = [*results["settings"].items(), *results["versions"].items(), *seconds,
            ("seconds a synthetic volume", f"{each:.2f}")]  # fmt: skip
    return section("Settings and versions", "", table(("", ""), rows))


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
