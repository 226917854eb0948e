"""The figures of an evaluation as one flat table, for gates and for plots over time."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from synthbrain.errors import UsageError

_SHORT = {"ventricular_volume": "ventricles", "brain_volume": "brain"}

_FITTED = ("r", "slope", "intercept", "mae", "bias")
_KERNELS = ("fd", "fd_infinity", "kid")
_NEIGHBOURS = ("density", "coverage", "clipped_density", "clipped_coverage", "precision", "recall")
_SIMILARITIES = (
    "ssim",
    "ms-ssim",
    *map("/".join, product(["4-g-r-ssim"], ["single", "multi"], ["kcl-star", "star", "r"])),
)
_NAMES: Mapping[str, tuple[str, ...]] = {
    "fidelity": tuple(map("".join, product(["", "real."], [*_KERNELS, *_NEIGHBOURS]))),
    "diversity": tuple(map("".join, product(["", "real."], _SIMILARITIES))),
    "conditioning": (
        "sex.accuracy",
        "sex.auc",
        *map("".join, product(
            ["age.", "ventricles.", "brain."],
            ["failed", *_FITTED, *(f"extrapolated.{name}" for name in _FITTED)],
        )),
        *map("".join, product(
            ["age.", "sex.", "ventricles.", "brain."], ["sweep.monotone", "sweep.slope"]
        )),
    ),
    "memorisation": ("copies.p",),
}  # fmt: skip
_FAMILIES = {"copies.above.": "memorisation", "utility.": "utility"}
"""Figures named after what the user names: spaces, targets, arms."""


def part_of(name: str) -> str:
    """The part of an evaluation that a figure is of.

    Parameters
    ----------
    name
        As :func:`metrics` calls it.

    Raises
    ------
    UsageError
        No part has such a figure; the message names the nearest.
    """
    for part, names in _NAMES.items():
        if name in names:
            return part
    for start, part in _FAMILIES.items():
        if name.startswith(start):
            return part
    every = [known for names in _NAMES.values() for known in names]
    near = difflib.get_close_matches(name, every, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else "the report lists them, with their names"
    raise UsageError(f"no evaluation has a figure called {name!r}; {hint}")


def metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """Figures by name: ``fd``, ``ms-ssim``, ``ventricles.r``, ``age.mae``, ``copies.p`` and others.

    Parameters
    ----------
    results
        As :class:`synthbrain.evaluation.run.Evaluation` returns them. Those of real volumes among
        themselves have ``real.`` before their name.

    Returns
    -------
    dict
        What was measured, and nothing else.
    """
    found = (
        *_fidelity(results.get("fidelity", {})),
        *_diversity(results.get("diversity", {})),
        *_conditioning(results.get("conditioning", {})),
        *_memorisation(results.get("memorisation", {})),
        *_utility(results.get("utility", {})),
    )
    return {name: float(value) for name, value in found if value is not None}


def _fidelity(part: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for prefix, row in zip(("", "real."), part.get("rows", ()), strict=False):
        for name, value in row.items():
            if isinstance(value, Mapping) and "value" in value:
                yield f"{prefix}{name}", value["value"]
            elif isinstance(value, float):
                yield f"{prefix}{name}", value


def _diversity(part: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for prefix, row in zip(("", "real."), part.get("rows", ()), strict=False):
        for name, value in row.items():
            if isinstance(value, Mapping):
                yield f"{prefix}{name}", value["mean"]


def _conditioning(part: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for covariate, found in part.get("covariates", {}).items():
        name = _SHORT.get(covariate, covariate)
        told = found.get("classification")
        if told is not None:
            yield f"{name}.accuracy", told["accuracy"][0]
            if told["auc"] is not None:
                yield f"{name}.auc", told["auc"][0]
            continue
        yield f"{name}.failed", found["agreement"]["n_failed"]
        for prefix, key in (("", "trained"), ("extrapolated.", "extrapolated")):
            fit = found["agreement"][key]
            if fit is None:
                continue
            for figure in ("r", "slope", "intercept"):
                if fit[figure] is not None:
                    yield f"{name}.{prefix}{figure}", fit[figure][0]
            yield f"{name}.{prefix}mae", fit["mean_absolute_error"]
            yield f"{name}.{prefix}bias", fit["mean_error"]

    for covariate, moved in part.get("sweeps", {}).items():
        own = moved["slopes"][covariate]
        name = _SHORT.get(covariate, covariate)
        yield f"{name}.sweep.monotone", moved["monotone"]
        yield f"{name}.sweep.slope", None if own is None else own[0]


def _memorisation(part: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    if "p" in part:
        yield "copies.p", part["p"]
    for audit in part.get("spaces", ()):
        above = audit["finding"]["above"]
        yield f"copies.above.{audit['space']}", above["count"] / above["of"]


def _utility(part: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for score in part.get("scores", ()):
        name = _SHORT.get(score["target"], score["target"])
        yield f"utility.{name}.{score['arm']}.{score['metric']}", score["estimate"][0]
