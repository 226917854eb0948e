"""Brain age from T1w volumes, with and without synthetic ones in the training set.

Trains the same small network twice for the same number of steps, on real volumes alone and on
real and synthetic ones mixed, and prints the error of both on real volumes held out.

    python examples/brain_age.py --real ready                  # what `synthbrain prepare` wrote
    python examples/brain_age.py --generator phantom           # to try it: phantoms stand in
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from generation.covariates import AGE
from synthbrain import SynthBrainDataset, draw_cohort
from synthbrain.mixing import mix

YEARS = AGE.high - AGE.low  # ages are normalised: 0 to 1


def network(width: int) -> nn.Module:
    """Four halvings, then one number per volume."""
    layers: list[nn.Module] = []
    channels = [1, width, 2 * width, 4 * width, 8 * width]
    for before, after in pairwise(channels):
        layers += [nn.Conv3d(before, after, 3, stride=2, padding=1), nn.GroupNorm(1, after)]
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8 * width, 1))


def train(data: Dataset, options: argparse.Namespace) -> nn.Module:
    """``--steps`` steps of Adam on the mean absolute error, in epochs of ``data``."""
    torch.manual_seed(options.seed)
    model = network(options.width).to(options.device)
    optimiser = torch.optim.Adam(model.parameters(), lr=options.lr)
    loader = DataLoader(data, options.batch, num_workers=options.workers)
    step = epoch = 0
    while step < options.steps:
        data.set_epoch(epoch)
        for batch in loader:
            loss = errors(model, batch).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            step += 1
            if step == options.steps:
                break
        epoch += 1
    return model


def errors(model: nn.Module, batch: dict) -> Tensor:
    """Absolute error of each volume of a batch, of normalised ages."""
    device = next(model.parameters()).device
    predicted = model(batch["image"].to(device))[:, 0]
    return (predicted - batch["age"].to(device)).abs()


@torch.no_grad()
def mean_error(model: nn.Module, data: Dataset, options: argparse.Namespace) -> tuple[float, float]:
    """Mean absolute error in years, and its standard error over the volumes."""
    loader = DataLoader(data, options.batch, num_workers=options.workers)
    years = YEARS * torch.cat([errors(model, batch).cpu() for batch in loader])
    return float(years.mean()), float(years.std() / len(years) ** 0.5)


def open_real(options: argparse.Namespace) -> tuple[SynthBrainDataset, SynthBrainDataset]:
    """Real volumes to train on and held-out ones; the splits never share a person."""
    if options.real is None:
        print(
            "no --real: another cohort of the generator stands in, so this says nothing of people"
        )
        rows = draw_cohort(options.stand_ins, like=options.like, seed=99, name="standin")
        where = {"manifest": rows, "generator": options.generator, "store": options.store}
    else:
        folder = Path(options.real)
        where = {"manifest": folder / "manifest", "generator": None, "store": folder / "store"}
    train, test = (SynthBrainDataset(split=split, **where) for split in ("train", "test"))
    if not train.manifest.header.conditional:
        raise SystemExit(f"{options.real} was prepared without covariates; ages are needed")
    return train, test


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--real", help="folder that `synthbrain prepare` wrote")
    parser.add_argument("--stand-ins", type=int, default=200, help="how many, without --real")
    parser.add_argument("--like", help="manifest whose rows drawn cohorts resemble")
    parser.add_argument("--generator", default="auto", help="makes the synthetic volumes")
    parser.add_argument("--store", help="folder of stored volumes")
    parser.add_argument("--pool", type=int, default=1000, help="synthetic rows to draw from")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of synthetic samples")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    real, held_out = open_real(options)
    rows = draw_cohort(options.pool, like=options.like, seed=options.seed, name="synthetic")
    synthetic = SynthBrainDataset(rows, generator=options.generator, store=options.store)
    alone = mix(real, synthetic, ratio=0, seed=options.seed)
    mixed = mix(real, synthetic, ratio=options.ratio, seed=options.seed, balance="age")
    print(f"{len(real)} real volumes to train on, {len(held_out)} held out; {mixed}")

    guess = float(torch.tensor(real.table["age"].to_numpy()).median())
    ages = torch.tensor(held_out.table["age"].to_numpy())
    print(f"always the median age:     {YEARS * float((ages - guess).abs().mean()):5.2f} years")
    for name, data in (("real alone", alone), ("real and synthetic", mixed)):
        error, spread = mean_error(train(data, options), held_out, options)
        print(f"{name + ':':<26} {error:5.2f} years, standard error {spread:.2f}")
    print("one run of each: repeat with other seeds before believing a difference")


if __name__ == "__main__":
    main()
