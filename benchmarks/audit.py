"""Is a model that learned 8 phantoms by heart told from one that learned from many?

Two small diffusion models of one design are trained for as many steps by the package's own trainer,
on what phantoms look like around the ventricles at 8 mm: one on 8 of them, one on all. The audit
then looks for copies among what each makes.

``python benchmarks/audit.py --out benchmarks/audit.md`` takes about half an hour on two cores
once its phantoms are stored.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from about import setting

from generation.covariates import NAMES
from generation.evaluate.memorisation import Audit, audit
from generation.latent import LatentDiffusion
from generation.options import Options
from generation.presets import load_preset
from generation.testing import random_network
from generation.train import release
from generation.train.diffusion import DiffusionTask
from generation.train.loop import Run
from generation.train.settings import settings
from synthbrain.named import opener
from synthbrain.progress import track

SMALL = 8
SPACING = 8
BOX = (slice(4, 16), slice(6, 22), slice(4, 16))
"""Of the volumes at that spacing: what lies around the ventricles."""

SHAPE = (1, 12, 16, 12)
NOISE = (0.1, 0.3, 1.0)
"""Of planted copies, in standard deviations."""

UNET = {"channels": [32] * 3, "num_res_blocks": 1, "num_head_channels": [0, 32, 32]}
AUTOENCODER = {"latent_channels": 1, "channels": [2] * 4, "norm_num_groups": 1, "num_res_blocks": 1}


class Arrays:
    """What models learn from: arrays of unit variance, and the covariates they belong to."""

    def __init__(self, values: torch.Tensor, conditions: torch.Tensor) -> None:
        self.values, self.conditions = values, conditions

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        mean = self.values[index]
        sigma = torch.full_like(mean, 0.01)
        return {"mean": mean, "sigma": sigma, "condition": self.conditions[index]}

    def first(self, count: int) -> Arrays:
        """Some of them."""
        return Arrays(self.values[:count], self.conditions[:count])


def main() -> None:
    """Train both models, look for copies, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--phantoms", type=int, default=300, help="how many are read (300)")
    parser.add_argument("--steps", type=int, default=1200, help="of each training (1200)")
    parser.add_argument("--store", type=Path, help="where phantoms are stored")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    known, held_out = coarse(options.phantoms, options.store)
    lines = []
    for name, training in (("8 phantoms", known.first(SMALL)), (f"{len(known)} phantoms", known)):
        started = time.perf_counter()
        made = samples(training, options.steps, count=100)
        found = look(training.values, made, held_out.values)
        lines.append(row(name, found, time.perf_counter() - started))
        print(found.statement(), flush=True)
    report = "\n".join([*heading(options.steps, len(held_out)), *lines, ""])
    print(report)
    if options.out:
        options.out.write_text(report, encoding="utf-8")


def coarse(count: int, store: Path | None) -> tuple[Arrays, Arrays]:
    """Phantoms to learn from and phantoms held out: ``(n, 1, 12, 16, 12)`` each."""
    dataset = opener("phantoms:1200", store=store)(limit=count)
    values, conditions = [], []
    for index in track(range(count), total=count, what="phantoms"):
        sample = dataset[index]
        pooled = torch.nn.functional.avg_pool3d(sample["image"], SPACING)
        values.append(pooled[(slice(None), *BOX)])
        conditions.append(torch.tensor([float(sample[name]) for name in NAMES]))
    stacked, labels = torch.stack(values), torch.stack(conditions)
    stacked = (stacked - stacked.mean(0)) / (stacked - stacked.mean(0)).std()
    inside = torch.tensor((dataset.table["split"] == "train").to_numpy())
    return Arrays(stacked[inside], labels[inside]), Arrays(stacked[~inside], labels[~inside])


def samples(training: Arrays, steps: int, count: int) -> torch.Tensor:
    """What a model trained on some arrays makes of their covariates, ``(count, 1, 12, 16, 12)``."""
    preset = load_preset("ukb-ldm").model_dump(mode="json")
    preset |= {"target": "velocity", "shape": [8 * n for n in SHAPE[1:]], "latent_shape": SHAPE}
    preset["networks"]["unet"] |= UNET | {"in_channels": 5, "out_channels": 1}
    preset["networks"]["autoencoder"] |= AUTOENCODER
    how = settings(
        {
            "kind": "diffusion", "system": preset, "latent_scale": 1.0, "steps": steps,
            "batch": 8, "learning_rate": 2e-3, "half_life": steps / 4, "average": 0.98,
            "precision": "float32", "keep_every": 0, "log_every": 100, "sheet_every": 0,
            "validate_every": 0,
        }
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        data: Any = training
        run = Run(DiffusionTask(how, data), data, how, Path(folder, "run"))
        for _ in track(run.advance(), total=steps // 100, what=f"training on {len(training)}"):
            pass
        decoder = Path(folder, "autoencoder.pt")
        torch.save(random_network(how.system, "autoencoder").state_dict(), decoder)
        networks = {"unet": run.folder, "autoencoder": decoder}
        known = release.add("audited", networks, Path(folder, "weights"))
        rows = pd.DataFrame(training.conditions.numpy(), columns=list(NAMES))
        rows = rows.iloc[[n % len(rows) for n in range(count)]].reset_index(drop=True)
        rows["seed"] = range(count)
        return LatentDiffusion(known, Options(solver="ddim", steps=25)).sample_latents(rows)


def look(training: torch.Tensor, made: torch.Tensor, held_out: torch.Tensor) -> Audit:
    """The audit of arrays, with copies of some training ones planted at rising noise."""
    originals = training[:20].flatten(1)
    noise = torch.randn(originals.shape, generator=torch.Generator().manual_seed(0))
    planted = {f"noise of {dose}": (originals + dose * noise, range(len(originals)))
               for dose in NOISE}  # fmt: skip
    return audit(
        training.flatten(1), made.flatten(1), held_out.flatten(1), space="voxels", planted=planted
    )


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
    return [
        "# A model that learned its data by heart",
        "",
        f"`python benchmarks/audit.py`; {setting(('torch', 'monai'))}.",
        "",
        f"Diffusion models of one design, {steps:,} steps each, on the box of 12 × 16 × 12 voxels "
        f"of 8 mm around the ventricles, less the mean phantom; 100 samples of each are audited "
        f"against {held_out} phantoms held out. Only the first row's verdict should be "
        "“copies found”. Where nothing was copied, shares above the threshold are expected at 5 %, "
        "nearer to training at 50 %; “control” is the same test between halves of the known ones.",
        "",
        "| trained on | verdict | p | p of the control | above the threshold | in the control | "
        "nearer to training | in the control | planted copies found | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]


if __name__ == "__main__":
    main()
