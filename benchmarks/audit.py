"""Is a model that learned 8 phantoms by heart told from one that learned from many?

Two small pixel-space models of the same design are trained for the same number of steps by the
package's own trainer, on phantoms at 8 mm: one on 8 of them, one on all; the audit then looks for
copies among what each makes.

``python benchmarks/audit.py --out benchmarks/audit.md`` takes about 15 minutes on two cores once
its phantoms are stored.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from generation import weights
from generation.evaluate.memorisation import Audit, audit
from generation.evaluate.planted import DOSES, altered
from generation.options import Options
from generation.pixel import PixelDiffusion
from generation.presets import load_preset
from generation.train import release
from generation.train.diffusion import DiffusionTask
from generation.train.loop import Run
from generation.train.settings import settings
from synthbrain.named import opener
from synthbrain.progress import track

SMALL = 8
UNET = {
    "channels": [16, 32, 32],
    "attention_levels": [False, False, True],
    "num_head_channels": 16,
    "num_res_blocks": 1,
}


class Coarse:
    """Phantoms at 8 mm, in memory."""

    def __init__(self, volumes: torch.Tensor) -> None:
        self.volumes = volumes

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"image": self.volumes[index]}


def main() -> None:
    """Train both models, look for copies, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--phantoms", type=int, default=300, help="how many are read (300)")
    parser.add_argument("--steps", type=int, default=600, help="of each training (600)")
    parser.add_argument("--store", type=Path, help="where phantoms are stored")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    known, held_out = coarse(options.phantoms, options.store)
    lines = []
    for name, training in (("8 phantoms", known[:SMALL]), (f"{len(known)} phantoms", known)):
        started = time.perf_counter()
        made = samples(training, options.steps, count=100)
        found = look(training, made, held_out)
        lines.append(row(name, found, time.perf_counter() - started))
        print(found.statement(), flush=True)
    report = "\n".join([*heading(options.steps, len(held_out)), *lines, ""])
    print(report)
    if options.out:
        options.out.write_text(report, encoding="utf-8")


def coarse(count: int, store: Path | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Phantoms to learn from and phantoms held out, ``(n, 1, 20, 28, 20)`` each."""
    dataset = opener("phantoms:1200", store=store)(limit=count)
    volumes = torch.stack(
        [
            torch.nn.functional.avg_pool3d(dataset[index]["image"], 8)
            for index in track(range(count), total=count, what="phantoms")
        ]
    )
    inside = torch.tensor((dataset.table["split"] == "train").to_numpy())
    return volumes[inside], volumes[~inside]


def samples(training: torch.Tensor, steps: int, count: int) -> torch.Tensor:
    """What a model makes that was trained on some volumes, ``(count, 1, 20, 28, 20)``."""
    preset = load_preset("medforj").model_dump(mode="json")
    preset |= {"shape": [20, 28, 20], "target": "velocity"}
    preset["networks"]["unet"] |= UNET
    how = settings(
        {
            "kind": "pixel", "system": preset, "steps": steps, "batch": 4, "learning_rate": 2e-3,
            "half_life": steps / 4, "average": 0.99, "precision": "float32", "keep_every": 0,
            "log_every": 100, "sheet_every": 0, "validate_every": 0,
        }
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        data: Any = Coarse(training)
        run = Run(DiffusionTask(how, data), data, how, Path(folder, "run"))
        for _ in track(run.advance(), total=steps // 100, what=f"training on {len(training)}"):
            pass
        release.add("audited", {"unet": run.folder}, Path(folder, "weights"))
        generator = PixelDiffusion(weights.load("audited", Path(folder, "weights")), Options())
        rows = pd.DataFrame({"seed": range(count)})
        return torch.cat([generator.sample(rows[at : at + 10]) for at in range(0, count, 10)])


def look(training: torch.Tensor, made: torch.Tensor, held_out: torch.Tensor) -> Audit:
    """The audit of coarse voxels, with planted copies of every training volume."""
    planted = {
        str(dose): (
            torch.stack([altered(volume, dose) for volume in training[:20]]).flatten(1),
            range(len(training[:20])),
        )
        for dose in DOSES
        if dose.kind == "noise"
    }
    return audit(
        training.flatten(1), made.flatten(1), held_out.flatten(1), space="voxels of 8 mm",
        planted=planted,
    )  # fmt: skip


def row(name: str, found: Audit, seconds: float) -> str:
    """One line of the table."""
    power = ", ".join(f"{100 * p.found.share:.0f} % at {dose}" for dose, p in found.power.items())
    shares = (
        f"{100 * share.share:.0f} %"
        for share in (found.finding.above, found.control.above, found.finding.nearer,
                      found.control.nearer)
    )  # fmt: skip
    cells = [
        name, found.verdict, f"{found.finding.p:.2g}", f"{found.control.p:.2g}", *shares, power,
        f"{seconds:.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def heading(steps: int, held_out: int) -> list[str]:
    """What was run on what, and the head of the table."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("synthbrain", "torch", "monai")
    )
    return [
        "# A model that learned its data by heart",
        "",
        f"`python benchmarks/audit.py`, {platform.machine()}, {os.cpu_count()} cores, {versions}.",
        "",
        f"Models of one design, {steps:,} steps each, on phantoms at 8 mm; 100 volumes of each are "
        f"audited against {held_out} phantoms held out. Only the first row's verdict should be "
        "“copies found”. Where nothing was copied, shares above the threshold are expected at 5 %, "
        "nearer to training at 50 %; “control” is the same test between halves of the known ones.",
        "",
        "| trained on | verdict | p | p of the control | above the threshold | in the control | "
        "nearer to training | in the control | planted copies found | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]


if __name__ == "__main__":
    main()
