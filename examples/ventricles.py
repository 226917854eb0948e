"""Ventricular volume from T1w volumes, trained on a cohort drawn for the purpose.

Nothing is downloaded or made beforehand: the cohort is drawn, and the first epoch makes each
volume as the loop asks for it. Later epochs, and later runs, read it from the store.

    python examples/ventricles.py --generator phantom
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader

from generation.covariates import VENTRICULAR_VOLUME
from synthbrain import SynthBrainDataset, draw_cohort


def network(width: int) -> nn.Module:
    """Three halvings, then one number per volume."""
    return nn.Sequential(
        nn.Conv3d(1, width, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv3d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv3d(2 * width, 4 * width, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4 * width, 1),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", type=int, default=400, help="rows of the cohort")
    parser.add_argument("--like", help="manifest whose rows the cohort resembles")
    parser.add_argument("--generator", default="auto", help="makes the volumes")
    parser.add_argument("--store", help="folder of stored volumes")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    # Half men, half women, and every ventricular volume of the trained range as people have it.
    rows = draw_cohort(
        options.n, like=options.like, sex="balanced", seed=options.seed, name="ventricles"
    )
    where = {"generator": options.generator, "store": options.store}
    training = SynthBrainDataset(rows, split="train", seed=options.seed, **where)
    held_out = SynthBrainDataset(rows, split="test", **where)
    print(training.plan())

    torch.manual_seed(options.seed)
    model = network(options.width).to(options.device)
    optimiser = torch.optim.Adam(model.parameters(), lr=options.lr)

    def predictions(batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        predicted = model(batch["image"].to(options.device))[:, 0]
        return predicted, batch["ventricular_volume"].to(options.device)

    loader = training.loader(batch_size=options.batch, shuffle=True)
    for epoch in range(options.epochs):
        losses = []
        for batch in loader:
            loss = nn.functional.mse_loss(*predictions(batch))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        missing = len(training.missing())
        print(f"epoch {epoch}: loss {sum(losses) / len(losses):.4f}, {missing} volumes missing")

    with torch.no_grad():
        pairs = [predictions(batch) for batch in DataLoader(held_out, options.batch)]
    predicted, true = (torch.cat(parts).cpu() for parts in zip(*pairs, strict=True))
    guess = float(training.table["ventricular_volume"].mean())
    millilitres = (VENTRICULAR_VOLUME.high - VENTRICULAR_VOLUME.low) / 1000
    error = float((predicted - true).abs().mean()) * millilitres
    base = float((guess - true).abs().mean()) * millilitres
    print(f"{len(held_out)} volumes held out: mean error {error:.1f} ml")
    print(f"always the mean of the training set: {base:.1f} ml")


if __name__ == "__main__":
    main()
