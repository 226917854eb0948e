"""Volumes as vectors, and their correlations: what the search for copies works on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from generation.errors import EvaluationError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from generation.evaluate.diversity import Volumes

    Floats = NDArray[np.float32]

Features = Callable[[Tensor], Tensor]
"""From volumes ``(n, 1, x, y, z)`` to ``(n, ...)``: voxels, latents, what a network sees."""

_BLOCK = 1024
_ROWS = 64
"""Vectors that are held in double precision at once."""


class Match(NamedTuple):
    """A synthetic sample (or the first of two), what it is closest to, and their correlation."""

    sample: int
    match: int
    similarity: float


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share of samples.

    Parameters
    ----------
    count, of
        How many, of how many.
    interval
        Clopper-Pearson's, at 95 %: samples are taken to be independent draws of the generator.
    """

    count: int
    of: int
    interval: tuple[float, float]

    @property
    def share(self) -> float:
        """Between 0 and 1."""
        return self.count / self.of

    @classmethod
    def counted(cls, hits: NDArray[np.bool_]) -> Share:
        """How many are true."""
        from scipy import stats

        count, of = int(hits.sum()), len(hits)
        low = float(stats.beta.ppf(0.025, count, of - count + 1)) if count else 0.0
        high = float(stats.beta.ppf(0.975, count + 1, of - count)) if count < of else 1.0
        return cls(count=count, of=of, interval=(low, high))


def vectors(volumes: Volumes, features: Features, *, batch: int = 1) -> Tensor:
    """One vector for each volume; volumes stream through memory.

    Parameters
    ----------
    volumes
        Any indexable of ``(1, x, y, z)`` tensors.
    features
        Makes ``(n, ...)`` of ``(n, 1, x, y, z)``; it moves them to its device itself. An
        autoencoder's latent mean, a network's features, or :func:`coarse_voxels`.
    batch
        Volumes at a time.

    Returns
    -------
    Tensor
        ``(n, d)`` float32 on the CPU.

    Raises
    ------
    EvaluationError
        There are no volumes, or the features do not give one vector for each.
    """
    # One array for all: small ones between volumes that come and go would hold their room.
    found: Tensor | None = None
    for start in range(0, len(volumes), batch):
        part = torch.stack([volumes[i] for i in range(start, min(start + batch, len(volumes)))])
        with torch.no_grad():
            values = features(part)
        if len(values) != len(part):
            raise EvaluationError(
                f"the features of {len(part)} volumes have shape {tuple(values.shape)}; "
                "expected one row for each volume"
            )
        values = values.detach().flatten(1).float().cpu()
        if found is None:
            found = torch.empty((len(volumes), values.shape[1]))
        found[start : start + len(values)] = values
    if found is None:
        raise EvaluationError("found no volumes to make vectors of; expected one or more")
    return found


def coarse_voxels(reduction: int = 4) -> Features:
    """Voxels, each the mean of ``reduction`` cubed: 89,600 of a full-size volume for 4.

    Volumes must be registered. Take 8 where memory is short.
    """

    def coarse(volumes: Tensor) -> Tensor:
        return F.avg_pool3d(volumes.float(), reduction).flatten(1)

    return coarse


def rerank(
    matches: Sequence[Match], samples: Volumes, references: Volumes, *, centre: Tensor | None = None
) -> tuple[Match, ...]:
    """Matches found on coarse vectors, with the correlation of the full-size volumes.

    Parameters
    ----------
    matches
        As an audit returns them.
    samples, references
        Volumes ``(1, x, y, z)`` the indices are of.
    centre
        Mean of real volumes, ``(1, x, y, z)``, to take away first.

    Returns
    -------
    tuple of Match
        Most similar first.

    Raises
    ------
    EvaluationError
        A volume is constant or not finite.
    """
    flat = None if centre is None else centre.flatten()
    again = []
    for match in matches:
        sample = unit(samples[match.sample].flatten()[None], flat)
        reference = unit(references[match.match].flatten()[None], flat)
        again.append(match._replace(similarity=float((sample * reference).sum())))
    return tuple(sorted(again, key=lambda match: -match.similarity))


def unit(values: Tensor, centre: Tensor | None) -> Tensor:
    """Vectors whose scalar products are correlations, float32 on the CPU."""
    return polar(values, centre)[0]


def polar(values: Tensor, centre: Tensor | None) -> tuple[Tensor, Tensor]:
    """As :func:`unit`, and ``(n,)`` how long they were once centre and mean were taken away."""
    middle = None if centre is None else centre.detach().cpu().double()
    values = values.detach().cpu()
    found = torch.empty(values.shape, dtype=torch.float32)
    lengths = []
    for part, out in zip(values.split(_ROWS), found.split(_ROWS), strict=True):
        part = part.double() if middle is None else part.double() - middle
        part = part - part.mean(1, keepdim=True)
        norms = part.norm(dim=1, keepdim=True)
        if not part.isfinite().all() or not (norms > 0).all():
            raise EvaluationError(
                "found vectors that are constant or not finite: correlations need values that "
                "vary; check the volumes they come from"
            )
        out.copy_(part / norms)
        lengths.append(norms[:, 0].float())
    return found, torch.cat(lengths)


def correlations(first: Tensor, second: Tensor) -> Floats:
    """Of all with all, ``(n, m)``."""
    return torch.cat([part @ second.T for part in first.split(_BLOCK)]).numpy()


def upper_quantile(values: Floats, level: float) -> float:
    """The smallest value that a share ``level`` of the values do not exceed."""
    return float(np.quantile(values, level, method="higher"))
