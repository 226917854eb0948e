"""Brain age by Lightning, from synthetic volumes that are made as the training goes on.

    python examples/brain_age_lightning.py --generator phantom --workers 4

Lightning deals rows to its processes itself, unless told that the loader's sampler does; it then
starts as many as there are devices.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader

from generation.covariates import AGE
from synthbrain import SynthBrainDataset, draw_cohort


class Volumes(lightning.LightningDataModule):
    """A cohort's training and validation rows."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.options = options
        self.parts: dict[str, SynthBrainDataset] = {}

    def setup(self, stage: str) -> None:
        """Open both, in each process."""
        options = self.options
        rows = draw_cohort(options.n, like=options.like, seed=options.seed, name="ages")
        for part in ("train", "validation"):
            self.parts[part] = SynthBrainDataset(
                rows, split=part, generator=options.generator, store=options.store
            )

    def train_dataloader(self) -> DataLoader[Any]:
        """In another order each epoch, the missing ones made ahead."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """As they lie."""
        return self._loader("validation", shuffle=False)

    def _loader(self, part: str, shuffle: bool) -> DataLoader[Any]:
        options = self.options
        return self.parts[part].loader(
            batch_size=options.batch, num_workers=options.workers, shuffle=shuffle
        )


class BrainAge(lightning.LightningModule):
    """A small network that tells the age in years."""

    def __init__(self, width: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.network = nn.Sequential(
            nn.Conv3d(1, width, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv3d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(2 * width, 1),
        )  # fmt: skip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised ages of volumes, ``(n,)``."""
        return self.network(images)[:, 0]

    def training_step(self, batch: dict[str, Any], _: int) -> torch.Tensor:
        """Mean squared error."""
        return nn.functional.mse_loss(self(batch["image"]), batch["age"])

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        """Mean absolute error, in years."""
        years = AGE.high - AGE.low
        error = (self(batch["image"]) - batch["age"]).abs().mean() * years
        self.log("years", error, batch_size=len(batch["age"]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.rate)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", type=int, default=400, help="rows of the cohort")
    parser.add_argument("--like", help="manifest whose rows the cohort resembles")
    parser.add_argument("--generator", default="auto", help="makes the volumes")
    parser.add_argument("--store", help="folder of stored volumes")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8, help="of each process")
    parser.add_argument("--workers", type=int, default=0, help="of each process")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    lightning.seed_everything(options.seed, verbose=False)
    trainer = lightning.Trainer(
        max_epochs=options.epochs, use_distributed_sampler=False, logger=False,
        enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(BrainAge(options.width, options.lr), datamodule=Volumes(options))
    print(f"mean error {float(trainer.callback_metrics['years']):.1f} years")


if __name__ == "__main__":
    main()
