"""What spoils volumes, and which figures tell: blur, noise, collapse, copies, wrong labels.

Synthetic and real volumes are phantoms of one distribution; then the synthetic ones are spoilt in
one way at a time, by rising doses, and everything is measured.

``python benchmarks/sensitivity.py --out benchmarks/sensitivity.md`` takes about half an hour on two
cores once its phantoms are stored.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from about import setting

from generation.evaluate.med3d import random_med3d
from generation.evaluate.memorisation import audit
from generation.evaluate.planted import Dose, altered
from generation.evaluate.segmentations import PhantomMeasurer
from generation.evaluate.vectors import coarse_voxels, vectors
from synthbrain.evaluation.conditioning import conditioning
from synthbrain.evaluation.diversity import diversity
from synthbrain.evaluation.fidelity import FeatureSpace, fidelity
from synthbrain.evaluation.measuring import Instruments
from synthbrain.evaluation.metrics import metrics
from synthbrain.evaluation.sets import VolumeSet
from synthbrain.named import opener

SHOWN = ("fd", "kid", "clipped_density", "clipped_coverage", "ms-ssim", "ventricles.r",
         "ventricles.slope", "brain.r", "copies.above", "copies.p")  # fmt: skip


@dataclasses.dataclass
class Spoilt:
    """Synthetic volumes after something was done to them.

    Which volume stands in each row's place, from which set; what is done to its voxels; and whose
    covariates the row has.
    """

    name: str
    places: list[tuple[VolumeSet, int]]
    labels: pd.DataFrame
    dose: Dose | None = None

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> torch.Tensor:
        source, place = self.places[index]
        volume = source[place]
        return volume if self.dose is None else altered(volume, self.dose, seed=place)

    @property
    def table(self) -> pd.DataFrame:
        return self.labels

    @property
    def ids(self) -> list[str]:
        return [f"{index:04d}" for index in range(len(self))]

    @property
    def keys(self) -> list[str]:
        done = "" if self.dose is None else f" {self.dose}"
        found = (source.keys[place] + done for source, place in self.places)
        return [hashlib.sha256(text.encode()).hexdigest() for text in found]

    @property
    def identity(self) -> str:
        return hashlib.sha256("\n".join(self.keys).encode()).hexdigest()

    @property
    def affine(self) -> Any:
        return self.places[0][0].affine


def main() -> None:
    """Spoil, measure, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--volumes", type=int, default=32, help="of each of the three sets (32)")
    parser.add_argument("--store", type=Path, help="where phantoms are stored")
    parser.add_argument("--folder", type=Path, help="where what is measured is kept")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    count = options.volumes
    whole = VolumeSet("phantoms", opener("phantoms:1200", store=options.store)(limit=4 * count))
    synthetic, real, training, held_out = (
        whole.part(list(range(start, start + count))) for start in range(0, 4 * count, count)
    )
    folder = options.folder or Path(tempfile.mkdtemp())
    known, others = (vectors(volumes, coarse_voxels(4)) for volumes in (training, held_out))
    lines = []
    for kind, dose, spoilt in spoiled(synthetic, training):
        print(f"{kind} {dose}", flush=True)
        found = measured(spoilt, real, folder)
        made = vectors(spoilt, coarse_voxels(4))
        copies = audit(known, made, others, space="voxels")
        found |= {"copies.above": copies.finding.above.share, "copies.p": copies.finding.p}
        cells = [f"{found[name]:.3g}" if name in found else "–" for name in SHOWN]
        lines.append(f"| {kind} | {dose} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    report = "\n".join([*heading(count), *lines, ""])
    print(report)
    if options.out:
        options.out.write_text(report, encoding="utf-8")


def spoiled(synthetic: VolumeSet, training: VolumeSet) -> Iterator[tuple[str, str, Spoilt]]:
    """Kinds and doses, the untouched set first."""
    count, table = len(synthetic), synthetic.table
    own = [(synthetic, place) for place in range(count)]
    yield "untouched", "–", Spoilt("untouched", own, table)
    for amount in (0.5, 1.0, 2.0):
        spoilt = Spoilt(f"blur {amount}", own, table, Dose("blur", amount))
        yield "blur", f"σ {amount:g} voxels", spoilt
    for amount in (0.02, 0.05, 0.1):
        spoilt = Spoilt(f"noise {amount}", own, table, Dose("noise", amount))
        yield "noise", f"σ {amount:g}", spoilt
    for share in (0.25, 0.5, 1.0):
        part = int(share * count)
        collapsed = [(synthetic, 0 if place < part else place) for place in range(count)]
        collapsed_table = table.iloc[[place for _, place in collapsed]]
        yield "collapse", f"{share:.0%} one volume", Spoilt("collapse", collapsed, collapsed_table)
    for share in (0.25, 0.5, 1.0):
        part = int(share * count)
        copied = [(training if place < part else synthetic, place) for place in range(count)]
        labels = pd.concat([training.table.iloc[:part], table.iloc[part:]])
        yield "copies", f"{share:.0%} from training", Spoilt("copies", copied, labels)
    for share in (0.25, 0.5, 1.0):
        order = np.arange(count)
        part = int(share * count)
        order[:part] = np.roll(order[:part], 1)
        yield "labels", f"{share:.0%} exchanged", Spoilt("labels", own, table.iloc[order])


def measured(spoilt: Any, real: VolumeSet, folder: Path) -> dict[str, float]:
    """Figures of one set; features, pairs and measurements are kept."""
    space = FeatureSpace(network=random_med3d(), folder=folder / "features")
    instruments = Instruments(folder=folder / "measured", measurer=PhantomMeasurer())
    results = {
        "fidelity": fidelity(spoilt, real, space),
        "diversity": diversity([spoilt], folder / "pairs", measures=("ms-ssim",), count=100),
        "conditioning": conditioning(spoilt, instruments),
    }
    return metrics(results)


def heading(count: int) -> list[str]:
    """What was run on what, and the head of the table."""
    return [
        "# What spoils volumes, and which figures tell",
        "",
        f"`python benchmarks/sensitivity.py`; {setting(('torch', 'monai'))}.",
        "",
        f"{count} phantoms stand for synthetic volumes, {count} for real ones, {count} for the "
        f"training set and {count} are held out; all from one distribution. Features are those of "
        "the network with random weights. `copies.above` is expected at 0.05 where nothing was "
        "copied, whatever the labels.",
        "",
        f"| what | dose | {' | '.join(SHOWN)} |",
        "|---|---" + "|---" * len(SHOWN) + "|",
    ]


if __name__ == "__main__":
    main()
