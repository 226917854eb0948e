"""One rank of a training run: ``rank.py FOLDER EPOCHS WORKERS CONTEXT SHUFFLE``."""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from synthbrain import Manifest, SynthBrainDataset
from synthbrain.sampling.launch import Limits


def main(folder, epochs, workers, context, pause):
    """Train on everything; what was seen of each epoch is left in the folder."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    ds = SynthBrainDataset(
        Manifest.open(folder / "cohort"), split="train", age_range=(0.4, 0.8), seed=3,
        generator="sampled:logged", store=folder / "store",
    )  # fmt: skip
    ds.resolver.generator.shared.limits = Limits(idle=1.0)
    options = {"num_workers": workers} | ({"multiprocessing_context": context} if workers else {})
    loader = ds.loader(batch_size=4, shuffle=True, **options)
    for epoch in range(epochs):
        seen = {}
        for step, batch in enumerate(loader):
            if step == 0:
                (folder / f"begun-{rank}-{epoch}").touch()
            seen |= dict(zip(batch["id"], batch["image"].numpy(), strict=True))
            dist.all_reduce(torch.ones(1))  # as gradients are
            time.sleep(pause)
        np.savez(folder / f"seen-{rank}-{epoch}.npz", **seen)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], float(sys.argv[5]))
