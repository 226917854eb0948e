"""``synthbrain info``: what is here, and what a manifest holds."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from synthbrain.cli.console import examples, show_json, show_table
from synthbrain.cli.options import Json, StoreFolder

if TYPE_CHECKING:
    from synthbrain.manifest import Manifest

_PACKAGES = ("torch", "monai", "numpy", "pandas", "zarr", "nibabel")


def info(
    manifest: Annotated[
        str | None, typer.Argument(metavar="MANIFEST", help="A manifest's name or folder.")
    ] = None,
    store: StoreFolder = None,
    json: Json = False,
) -> None:
    """Show what is installed and stored here, or what a manifest holds."""
    from synthbrain.home import home

    folder = store or home() / "store"
    facts = installation(folder) if manifest is None else about(manifest, folder)
    if json:
        show_json(facts)
    else:
        show_table(("", ""), _lines(facts))


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog=examples(
            "synthbrain info", "synthbrain info synthbrain-100k", "synthbrain info older --json"
        )
    )(info)


def installation(store: Path) -> dict[str, Any]:
    """Versions, folders, manifests, generators and the device of this machine."""
    from importlib.metadata import PackageNotFoundError, version

    import synthbrain
    from generation.weights import installed
    from synthbrain.generators import GENERATORS, weights_folder
    from synthbrain.home import home
    from synthbrain.manifest import saved_cohorts, shipped_manifests

    versions = {"python": platform.python_version(), "synthbrain": synthbrain.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "versions": versions,
        "home": str(home()),
        "store": str(store),
        "store_bytes": _size(store),
        "shipped manifests": shipped_manifests(),
        "saved cohorts": saved_cohorts(),
        "generators": [*GENERATORS, *installed(weights_folder())],
        "device": _device(),
    }


def about(name: str, store: Path) -> dict[str, Any]:
    """Header facts of a manifest, what its rows span, and how many of them are stored."""
    from synthbrain.manifest import Manifest

    manifest = Manifest.open(name)
    header = manifest.header
    parent = header.parent
    facts: dict[str, Any] = {
        "name": header.name,
        "version": header.version,
        "description": header.description,
        "rows": header.rows,
        "rows_digest": header.rows_digest,
        "selected from": f"{parent.name}: {', '.join(parent.selection)}" if parent else None,
        "licence": {"status": header.licence.status, "name": header.licence.name,
                    "note": header.licence.note},
        "citations": list(header.citations),
        "geometry": header.geometry.model_dump(),
        "archive": None if header.archive is None else header.archive.model_dump(),
        "sources": {key: source.model_dump() for key, source in header.sources.items()},
    }  # fmt: skip
    if header.rows_digest is not None:
        facts |= {
            "splits": {k: int(n) for k, n in manifest.table["split"].value_counts().items()},
            "women": int((manifest.table["sex"] < 0.5).sum()),
            "covariates": _spans(manifest),
            "stored": _stored(manifest, store),
        }
    return facts


def _spans(manifest: Manifest) -> dict[str, Any]:
    from generation.covariates import COVARIATES

    spans = {}
    for covariate in COVARIATES[1:]:
        values = manifest.table[covariate.name]
        ends = [float(values.min()), float(values.max())]
        natural = [float(covariate.denormalise(end)) for end in ends]
        spans[covariate.name] = {"normalised": ends, covariate.unit: natural}
    return spans


def _stored(manifest: Manifest, store: Path) -> dict[str, Any]:
    """Rows stored and missing, by who made them."""
    from synthbrain.resolver import Resolver
    from synthbrain.rows import PUBLISHED

    folder = store / manifest.store_key
    makers = sorted(path.parent.name for path in folder.glob("*/volumes") if path.is_dir())
    counts = {}
    for maker in [name for name in makers if name != PUBLISHED] or ["none"]:
        stored = int(Resolver(manifest, store, made_by=maker).stored().sum())
        counts[maker] = {"stored": stored, "missing": len(manifest) - stored}
    return counts


def _size(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:
                continue
    return total


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name()}"
    return f"cpu: {len(os.sched_getaffinity(0))} cores"


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Facts as (label, text) for people."""
    from synthbrain.sizes import size_text

    lines: list[tuple[str, str]] = []
    for key, value in facts.items():
        if key == "store_bytes":
            lines[-1] = (lines[-1][0], f"{lines[-1][1]} ({value / 1e9:.2f} GB)")
        elif key == "geometry":
            shape = " × ".join(map(str, value["shape"]))
            lines.append((key, f"{shape} {value['dtype']}, {value['orientation']}"))
        elif key == "covariates":
            lines += [(name.replace("_", " "), _span(span)) for name, span in value.items()]
        elif key == "stored":
            lines += [
                ("stored", f"{n['stored']:,}, missing {n['missing']:,}  (made by {maker})")
                for maker, n in value.items()
            ]
        elif key == "licence":
            lines.append((key, ": ".join(filter(None, (value["name"] or value["status"],
                                                       value["note"])))))  # fmt: skip
        elif key == "sources":
            lines += [(f"source {k}", s.get("url") or f"{s['kind']} {s['info_hash']}")
                      for k, s in value.items()]  # fmt: skip
        elif key == "archive" and value is not None:
            lines.append((key, f"{value['name']}, {size_text(value['size'])}"))
        elif isinstance(value, dict):
            lines.append((key, ", ".join(f"{k} {v}" for k, v in value.items())))
        elif isinstance(value, list):
            lines.append((key, ", ".join(value) or "none"))
        elif value not in (None, ""):
            lines.append((key, f"{value:,}" if isinstance(value, int) else str(value)))
    return lines


def _span(span: dict[str, list[float]]) -> str:
    (low, high), (unit, (first, last)) = span["normalised"], list(span.items())[1]
    if unit == "mm³":
        unit, first, last = "mL", first / 1000, last / 1000
    return f"{first:,.1f} to {last:,.1f} {unit}  ({low:.3g} to {high:.3g})"
