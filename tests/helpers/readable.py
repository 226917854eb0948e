"""Volumes whose covariates can be read back from their voxels."""

import numpy as np
import torch

from generation.covariates import BRAIN_VOLUME, NAMES, VENTRICULAR_VOLUME, conditioning
from generation.errors import EvaluationError

SHAPE = (16, 16, 16)


class Readable:
    """A quarter of the volume for each covariate, and noise of the row's own around them.

    Parameters
    ----------
    sigma
        Standard deviation of the noise.
    error
        What is added to each covariate at random.
    """

    name = "readable"
    honours = frozenset(NAMES)
    shape = SHAPE
    batch_size = 4
    seconds_per_volume = 0.001

    def __init__(self, sigma=0.05, error=0.0):
        self.sigma, self.error = sigma, error
        self.digest = f"{int(1e4 * sigma):08x}{int(1e4 * error):08x}"

    def sample(self, rows):
        pairs = zip(rows["seed"], conditioning(rows), strict=True)
        return torch.stack([self._volume(int(seed), vector) for seed, vector in pairs])

    def _volume(self, seed, vector):
        draw = torch.Generator().manual_seed(seed)
        told = torch.as_tensor(vector) + self.error * torch.randn(4, generator=draw)
        noise = torch.randn(1, 4, *(n // d for n, d in zip(SHAPE, (4, 1, 1), strict=True)),
                            generator=draw)  # fmt: skip
        noise -= noise.mean((2, 3, 4), keepdim=True)
        volume = 0.25 + told[None, :, None, None, None] / 2 + self.sigma * noise
        return volume.reshape(1, *SHAPE).float().clamp(0, 1)


class Reader:
    """Reads them: a measurer. Fails where the first voxel is brighter than a limit."""

    name, version = "reader", "1"

    def __init__(self, limit=2.0):
        self.limit, self.calls = limit, 0

    def measure(self, volume, affine):
        self.calls += 1
        if volume.flat[0] > self.limit:
            raise EvaluationError("too bright to read")
        values = 2 * (np.asarray(volume).reshape(4, -1).mean(1, dtype=np.float64) - 0.25)
        return {
            "ventricular_volume": float(VENTRICULAR_VOLUME.denormalise(values[2])),
            "brain_volume": float(BRAIN_VOLUME.denormalise(values[3])),
        }


class Means:
    """Features: means of small blocks."""

    name, digest, size, pretrained = "means", "0" * 64, 64, False

    def features(self, volumes):
        return torch.nn.functional.avg_pool3d(volumes.float(), 4).flatten(1)
