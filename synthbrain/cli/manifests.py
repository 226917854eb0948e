"""``synthbrain select`` and ``synthbrain draw``: cohorts, without their voxels."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from synthbrain.cli.console import examples, hint, say, show_json, show_table
from synthbrain.cli.options import (
    Age,
    Brain,
    Cohort,
    Extrapolate,
    Json,
    Overwrite,
    Selection,
    Ventricles,
    ranges,
    selecting,
)
from synthbrain.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd

    from synthbrain.manifest import Manifest

_SHOWN = 10


@selecting
def select(
    manifest: Cohort,
    selection: Selection,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Save the rows as a cohort, whose volumes they share."),
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", metavar=" ", help="Print the rows as CSV.")] = False,
    json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Choose rows of a manifest.

    Prints a table on a terminal and one id a line into a pipe; --csv, --json and --out change that.
    """
    from synthbrain.manifest import Manifest

    if sum((out is not None, csv, json)) > 1:
        raise UsageError("--out, --csv and --json exclude one another")
    chosen = Manifest.open(manifest).select(**selection.keywords())
    say(f"{len(chosen):,} rows of {chosen.name}")
    if out is not None:
        print(chosen.save(out, overwrite=overwrite))
        hint("synthbrain", "fill", str(out))
    elif csv:
        natural_table(chosen).to_csv(sys.stdout)
    elif json:
        show_json(natural_table(chosen).reset_index().to_dict("records"))
    elif sys.stdout.isatty():
        _show_rows(chosen)
    else:
        print("\n".join(chosen.table.index))


def draw(
    n: Annotated[int, typer.Option("-n", metavar="N", help="How many brains.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the new cohort.")],
    age: Age = None,
    sex: Annotated[
        str | None,
        typer.Option(metavar="female|male|balanced", help="By default as they occur.",
                     rich_help_panel="Which rows"),
    ] = None,
    ventricles: Ventricles = None,
    brain: Brain = None,
    like: Annotated[
        str | None,
        typer.Option(metavar="MANIFEST", help="Draw from the distribution of these rows.",
                     rich_help_panel="Which rows"),
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="S", help="The same seed, the same cohort.")
    ] = 0,
    extrapolate: Extrapolate = False,
    overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Draw a cohort of brains nobody has listed yet.

    A single value, such as --age 70y, fixes the covariate.
    """
    from synthbrain.cohort import draw_cohort

    cohort = draw_cohort(
        n,
        like=like,
        sex=sex,
        seed=seed,
        extrapolate=extrapolate,
        name=out.absolute().name,
        **ranges(age=age, ventricles=ventricles, brain=brain),
    )
    folder = cohort.save(out, overwrite=overwrite)
    say(f"{len(cohort):,} recipes drawn")
    show_table(("", "mean", "lowest", "highest"), summary(cohort), stream=sys.stderr)
    print(folder)
    hint("synthbrain", "fill", str(out))


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(
        epilog=examples(
            "synthbrain select synthbrain-100k --age 60y:75y --sex male --limit 50",
            "synthbrain select synthbrain-100k --ventricles 60mL:150mL --csv > large.csv",
            "synthbrain select synthbrain-100k --split test --limit 100 --out test-100",
        )
    )(select)
    app.command(
        epilog=examples(
            "synthbrain draw -n 200 --age 60y:75y --sex balanced --out older",
            "synthbrain draw -n 50 --ventricles 0.6:1.0 --seed 1 --out large",
        )
    )(draw)


def natural_table(manifest: Manifest) -> pd.DataFrame:
    """Rows with sex as a word and covariates in years and mm³, beside the normalised ones."""
    import pandas as pd

    from generation.covariates import COVARIATES, SEXES

    table = manifest.table
    columns: dict[str, pd.Series[Any]] = {"split": table["split"]}
    columns["sex"] = (table["sex"] > 0.5).map(dict(zip((False, True), SEXES, strict=True)))
    for covariate in COVARIATES[1:]:
        unit = covariate.unit.replace("mm³", "mm3")
        natural = covariate.denormalise(table[covariate.name])
        columns[f"{covariate.name}_{unit}"] = pd.Series(natural, table.index)
        columns[covariate.name] = table[covariate.name]
    columns["seed"] = table["seed"].astype(object).where(table["seed"].notna(), None)
    columns["origin"] = table["origin"]
    return pd.DataFrame(columns)


def summary(manifest: Manifest) -> list[tuple[str, ...]]:
    """What the rows of a manifest are like: label, mean, lowest, highest, in natural units."""
    from generation.covariates import COVARIATES

    women = int((manifest.table["sex"] < 0.5).sum())
    lines: list[tuple[str, ...]] = [("women", f"{women:,} of {len(manifest):,}", "", "")]
    for covariate in COVARIATES[1:]:
        values = covariate.denormalise(manifest.table[covariate.name])
        scale, unit = (1000.0, "mL") if covariate.unit == "mm³" else (1.0, "y")
        numbers = [values.mean() / scale, values.min() / scale, values.max() / scale]
        label = covariate.name.replace("_", " ")
        lines.append((label, *(f"{number:,.1f} {unit}" for number in numbers)))
    return lines


def _show_rows(manifest: Manifest) -> None:
    rows = [
        (
            row["id"],
            row["split"],
            row["sex"],
            f"{row['age_years']:.1f} y",
            f"{row['ventricular_volume_mm3'] / 1000:,.1f} mL",
            f"{row['brain_volume_mm3'] / 1000:,.0f} mL",
        )
        for row in natural_table(manifest).head(_SHOWN).reset_index().to_dict("records")
    ]
    if len(manifest) > _SHOWN:
        rows.append((f"… {len(manifest) - _SHOWN:,} more", "", "", "", "", ""))
    show_table(("id", "split", "sex", "age", "ventricles", "brain"), rows)
