"""Generators for sampling services to load, and what their clients do; quick to import."""

import os
import time
from pathlib import Path

import numpy as np
import torch

from generation.covariates import NAMES, conditioning


class Noise:
    """Noise of each row's seed, shifted by its covariates; tells a file which rows it made."""

    name = "noise"
    digest = "00112233445566778899"
    honours = frozenset(NAMES)
    shape = (16, 24, 16)
    seconds_per_volume = 0.01

    def __init__(self, log=None, seconds=0.0, batch_size=4, device="cpu"):
        self.log, self.seconds, self.batch_size = log, seconds, batch_size

    def sample(self, rows):
        time.sleep(self.seconds)
        if self.log is not None:
            with Path(self.log).open("a") as file:
                file.write(" ".join(map(str, rows["seed"])) + "\n")
        means = conditioning(rows).mean(1).clip(0, 1)
        made = [
            np.random.default_rng(int(seed)).random((1, *self.shape), dtype=np.float32) / 2
            + mean / 2
            for seed, mean in zip(rows["seed"], means, strict=True)
        ]
        return torch.from_numpy(np.stack(made)).float().clamp(0, 1)


class Picky(Noise):
    """Refuses some seeds."""

    def __init__(self, refused=(), **options):
        super().__init__(**options)
        self.refused = set(refused)

    def sample(self, rows):
        made = super().sample(rows)
        if bad := self.refused & set(rows["seed"].tolist()):
            raise ValueError(f"seed {min(bad)} is unlucky\nand that takes two lines to say")
        return made


class Starved(Noise):
    """Has room for a few rows only."""

    def __init__(self, room, **options):
        super().__init__(**options)
        self.room = room

    def sample(self, rows):
        if len(rows) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().sample(rows)


class Fatal(Noise):
    """Takes its process down."""

    def sample(self, rows):
        print("the driver says goodbye", flush=True)
        os._exit(9)


def unloadable():
    raise FileNotFoundError("no weights here")


def ask_in_parts(shared, rows, folder, number):
    """What a client process does: a row at a time, each volume saved."""
    for index in range(len(rows)):
        volume = shared.sample(rows.iloc[[index]])
        np.save(folder / f"{number}-{index}.npy", volume.numpy())


def train(dataset, context, orders, folder, rank):
    """What a rank does: all volumes of its own order, through four workers."""
    from torch.utils.data import DataLoader, Subset

    loader = DataLoader(
        Subset(dataset, orders[rank]), batch_size=3, num_workers=4, multiprocessing_context=context
    )
    for batch in loader:
        for id, image in zip(batch["id"], batch["image"], strict=True):
            np.save(folder / f"{rank}-{id}.npy", image.numpy())


def logged():
    """Noise that tells the file named by NOISE_LOG which seeds it made, NOISE_SECONDS a batch."""
    return Noise(log=os.environ["NOISE_LOG"], seconds=float(os.environ.get("NOISE_SECONDS", "0")))
