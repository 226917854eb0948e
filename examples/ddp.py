"""Two or more processes training on one mix of real and synthetic volumes.

    torchrun --nproc-per-node 2 examples/ddp.py --generator phantom

Every process has the same mix and store. The sampler deals the positions of an epoch out and has
missing volumes made ahead; what a row's sample is does not depend on who asks, and one service
makes the volumes of all processes and their workers.
"""

from __future__ import annotations

import argparse
import hashlib

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from synthbrain import SynthBrainDataset, SynthBrainSampler, draw_cohort
from synthbrain.mixing import mix


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", type=int, default=200, help="rows standing in for real scans")
    parser.add_argument("--like", help="manifest whose rows drawn cohorts resemble")
    parser.add_argument("--generator", default="auto", help="makes the volumes")
    parser.add_argument("--store", help="folder of stored volumes")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of synthetic samples")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4, help="of each process")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()

    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    where = {"generator": options.generator, "store": options.store}
    real = SynthBrainDataset(draw_cohort(options.n, like=options.like, name="standin"), **where)
    extra = draw_cohort(10 * options.n, like=options.like, seed=1, name="synthetic")
    mixed = mix(real, SynthBrainDataset(extra, **where), ratio=options.ratio)

    torch.manual_seed(0)
    model = DistributedDataParallel(
        nn.Sequential(
            nn.Conv3d(1, options.width, 3, stride=2, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(options.width, 1),
        )
    )  # fmt: skip
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    sampler = SynthBrainSampler(mixed, shuffle=False)  # the mix is in random order already
    loader = DataLoader(mixed, options.batch, sampler=sampler, num_workers=options.workers)
    for epoch in range(options.epochs):
        mixed.set_epoch(epoch)
        sampler.set_epoch(epoch)
        ids: list[str] = []
        for batch in loader:
            loss = nn.functional.l1_loss(model(batch["image"])[:, 0], batch["age"])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            ids += batch["id"]
        print_epoch(epoch, ids, mixed.table(epoch)["id"].tolist())
    weights = torch.cat([value.flatten() for value in model.state_dict().values()])
    print(f"rank {rank}: weights {hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:16]}")
    distributed.destroy_process_group()


def print_epoch(epoch: int, ids: list[str], expected: list[str]) -> None:
    """How the ranks together saw an epoch; the last few may be there twice, to make shares even."""
    everyone: list[list[str]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(everyone, ids)
    if distributed.get_rank() == 0:
        seen = {id for rank in everyone for id in rank}
        shares = " + ".join(str(len(rank)) for rank in everyone)
        print(f"epoch {epoch}: {shares} samples, {len(seen)} of {len(set(expected))} volumes")


if __name__ == "__main__":
    main()
