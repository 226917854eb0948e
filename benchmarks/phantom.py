"""Do phantoms have the volumes they were asked for? Measured from the images, 64 rows each.

``python benchmarks/phantom.py --out benchmarks/phantom.md`` takes about 6 minutes on two cores.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from about import setting
from rich.progress import track

from generation.covariates import BRAIN_VOLUME, NAMES, VENTRICULAR_VOLUME
from generation.phantom import PhantomGenerator
from generation.volumetry import measure
from synthbrain import draw_cohort
from synthbrain.home import home

MEASURED = (VENTRICULAR_VOLUME, BRAIN_VOLUME)


def main() -> None:
    """Make and measure rows of both kinds; print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64, help="rows of each kind (64)")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    generator = PhantomGenerator(cache=home() / "cache")
    kinds = {
        "drawn from the joint distribution": draw_cohort(options.rows, seed=3).table,
        "uniform over the whole range": uniform(options.rows),
    }
    generator.sample(kinds["uniform over the whole range"].iloc[:1])  # derives the atlas
    lines = [line for kind, rows in kinds.items() for line in judge(generator, kind, rows)]
    report = "\n".join([*heading(options.rows), *lines, ""])
    print(report)
    if options.out:
        options.out.write_text(report, encoding="utf-8")


def uniform(count: int) -> pd.DataFrame:
    """Rows spread over every range, combinations no cohort holds included."""
    draw = np.random.default_rng(5)
    columns = {name: draw.random(count) for name in NAMES}
    columns["sex"] = columns["sex"].round()
    return pd.DataFrame({**columns, "seed": draw.integers(0, 2**40, count)})


def judge(generator: PhantomGenerator, kind: str, rows: pd.DataFrame) -> list[str]:
    """Lines of the table for some rows."""
    measured, seconds = [], []
    for number in track(range(len(rows)), description=kind):
        started = time.perf_counter()
        image = generator.sample(rows.iloc[[number]])[0, 0].cpu().numpy()
        seconds.append(time.perf_counter() - started)
        found = measure((image * 255).round().astype(np.uint8) / np.float32(255))
        measured.append([c.normalise(getattr(found, c.name)) for c in MEASURED])
    errors = np.array(measured) - rows[[c.name for c in MEASURED]].to_numpy()
    lines = []
    for column, covariate in enumerate(MEASURED):
        error, asked = errors[:, column], rows[covariate.name].to_numpy()
        r = np.corrcoef(asked, asked + error)[0, 1]
        lines.append(
            f"| {kind} | {covariate.name} | {r:.5f} | {100 * abs(error).mean():.2f} % "
            f"| {100 * error.mean():+.2f} % | {100 * abs(error).max():.2f} % "
            f"| {np.median(seconds):.2f} |"
        )
    return lines


def heading(rows: int) -> list[str]:
    """What was measured and with what."""
    return [
        "# Phantoms: asked and measured volumes",
        "",
        f"{rows} rows of each kind, volumes measured by `generation.volumetry` from the images as "
        "stored; errors in percent of the covariate's range. "
        f"{setting(('torch', 'numpy', 'scipy', 'nilearn'))}; {torch.get_num_threads()} threads.",
        "",
        "| rows | covariate | Pearson r | mean absolute error | bias | largest | s per volume |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]


if __name__ == "__main__":
    main()
