"""Diversity of a set of volumes: how alike its members are, two by two.

The less alike, the more diverse. Pinaya et al. 2022 report the mean MS-SSIM and 4-G-R-SSIM of 1000
pairs; :data:`PUBLISHED` holds their values.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from generation.errors import EvaluationError
from generation.evaluate.pairing import Pair, Step, reading_order

PUBLISHED: Mapping[str, Mapping[str, float]] = {
    "LSGAN": {"ms-ssim": 0.9997, "4-g-r-ssim": 0.9969},
    "VAE-GAN": {"ms-ssim": 0.9671, "4-g-r-ssim": 0.8719},
    "LDM": {"ms-ssim": 0.6555, "4-g-r-ssim": 0.3883},
    "LDM + DDIM": {"ms-ssim": 0.6704, "4-g-r-ssim": 0.3957},
    "real images": {"ms-ssim": 0.6536, "4-g-r-ssim": 0.3909},
}
"""Means over 1000 pairs (Pinaya et al. 2022, Table 1); their variant of 4-G-R-SSIM is unknown."""


class Volumes(Protocol):
    """Anything indexed that gives ``(1, x, y, z)`` tensors; read from one thread at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor: ...


class Measure(Protocol):
    """A similarity in two steps: each volume alone, then pairs.

    :class:`~generation.evaluate.ssim.Ssim` and
    :class:`~generation.evaluate.gradient_ssim.GradientSsim` are such.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """What the values are called."""

    @property
    def settings(self) -> str:
        """All that the values depend on, as text."""

    def prepare(self, volumes: Tensor) -> Any:
        """What depends on volumes ``(n, 1, x, y, z)`` alone."""

    def compare(self, first: Any, second: Any) -> dict[str, Tensor]:
        """Values ``(n,)`` by name."""


class Compared(NamedTuple):
    """A pair of indices, the lower first, and its values by name."""

    pair: Pair
    values: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Diversity:
    """How alike pairs of volumes are.

    Parameters
    ----------
    measure
        Name of the similarity.
    mean, deviation
        Over pairs; the deviation with ``n - 1``.
    interval
        Of the mean, see :func:`summarise`.
    confidence
        Its level.
    pairs, volumes
        How many pairs, of how many volumes.
    """

    measure: str
    mean: float
    deviation: float
    interval: tuple[float, float]
    confidence: float
    pairs: int
    volumes: int


def between_pairs(
    volumes: Volumes,
    wanted: Iterable[Pair],
    measure: Measure,
    *,
    folder: Path | None = None,
    identity: str = "",
    resident: int = 16,
    device: torch.device | str = "cpu",
) -> Iterator[Compared]:
    """Similarity of pairs of volumes, while volumes stream through memory.

    One thread reads ahead while the device compares; on a processor PyTorch's own threads share
    each comparison. The lower index of a pair is the reference of measures that have one.

    Parameters
    ----------
    volumes
        Any indexable of ``(1, x, y, z)`` tensors.
    wanted
        Pairs, as from :func:`pairs`.
    measure
        The similarity.
    folder
        Where to keep what is found. Started again, what is there is not computed again.
    identity
        What tells these volumes from others, such as the digest of a manifest; needed with a
        folder.
    resident
        Most prepared volumes in memory; a full-size volume takes 80 MB for MS-SSIM.
    device
        Where to compare.

    Yields
    ------
    Compared
        Each pair once: first those kept before, then the others as they are done. Safe to stop at
        any time.

    Raises
    ------
    EvaluationError
        A pair names no two volumes, a folder has no identity, a file holds other results, or as
        the measure does.
    """
    chosen = sorted({(min(pair), max(pair)) for pair in wanted})
    for first, second in chosen:
        if not 0 <= first < second < len(volumes):
            raise EvaluationError(
                f"({first}, {second}) is no pair of {len(volumes)} volumes; "
                "use two different indices from 0"
            )
    record = (
        None if folder is None else _Record(folder, measure, identity=identity, count=len(volumes))
    )
    kept = {} if record is None else record.read()
    yield from (Compared(pair, kept[pair]) for pair in chosen if pair in kept)
    missing = [pair for pair in chosen if pair not in kept]
    steps = reading_order(missing, resident)
    for compared in _compared(volumes, steps, measure, device=torch.device(device)):
        if record is not None:
            record.append(compared)
        yield compared


def _compared(
    volumes: Volumes, steps: Iterable[Step], measure: Measure, *, device: torch.device
) -> Iterator[Compared]:
    prepared: dict[int, Any] = {}
    for step, volume in _read_ahead(volumes, steps):
        if step.forget is not None:
            del prepared[step.forget]
        prepared[step.read] = measure.prepare(volume[None].to(device))
        for first, second in step.compare:
            values = measure.compare(prepared[first], prepared[second])
            yield Compared((first, second), {name: float(v) for name, v in values.items()})


def _read_ahead(volumes: Volumes, steps: Iterable[Step]) -> Iterator[tuple[Step, Tensor]]:
    """Each step with the volume it reads; the next is read meanwhile."""
    ahead: tuple[Step, Future[Tensor]] | None = None
    with ThreadPoolExecutor(1) as reader:
        for step in steps:
            following = (step, reader.submit(volumes.__getitem__, step.read))
            if ahead is not None:
                yield ahead[0], ahead[1].result()
            ahead = following
        if ahead is not None:
            yield ahead[0], ahead[1].result()


class _Record:
    """Results kept as lines of JSON, in a file named after the digest of the settings."""

    def __init__(self, folder: Path, measure: Measure, *, identity: str, count: int) -> None:
        if not identity:
            raise EvaluationError(
                f"results kept in {folder} need an identity of the volumes; "
                "give the digest of their manifest"
            )
        self._header = json.dumps(
            {"measure": measure.settings, "volumes": identity, "count": count}, sort_keys=True
        )
        digest = hashlib.sha256(self._header.encode()).hexdigest()
        self.path = folder / f"pairs-{digest[:16]}.jsonl"

    def read(self) -> dict[Pair, dict[str, float]]:
        """What was found before; a line cut short counts as none."""
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(self._header + "\n")
        header, *lines = self.path.read_text().split("\n")
        if header != self._header:
            raise EvaluationError(f"{self.path} holds other results; move it away and run again")
        if lines and lines[-1]:
            with self.path.open("a") as file:
                file.write("\n")
        found = {}
        for line in lines:
            try:
                first, second, values = json.loads(line)
            except ValueError:
                continue
            found[first, second] = values
        return found

    def append(self, compared: Compared) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps([*compared.pair, compared.values]) + "\n")


def summarise(compared: Iterable[Compared], *, confidence: float = 0.95) -> dict[str, Diversity]:
    """Mean similarity by measure, with an interval that knows that pairs share volumes.

    The variance of the mean adds up the products of the residuals of all pairs with a volume in
    common (Aronow, Samii & Assenova 2015), times ``n (n - 1) / (n - 2)²`` for ``n`` volumes, which
    is without bias where all pairs are there and volumes differ by additive effects. The quantile
    is Student's with ``n - 1`` degrees of freedom. The variance is never taken to be less than for
    pairs that share no volume.

    Parameters
    ----------
    compared
        Pairs with values, as from :func:`between_pairs`.
    confidence
        Level of the interval.

    Returns
    -------
    dict of Diversity
        By name of the measure.

    Raises
    ------
    EvaluationError
        Fewer than two pairs.
    """
    from scipy import stats

    found: Sequence[Compared] = list(compared)
    if len(found) < 2:
        raise EvaluationError(f"found {len(found)} pairs, expected 2 or more to tell a spread")
    members, places = np.unique([c.pair for c in found], return_inverse=True)
    places = places.reshape(-1, 2)
    n = len(members)
    quantile = float(stats.t.ppf((1 + confidence) / 2, n - 1))
    summary = {}
    for name in found[0].values:
        values = np.array([c.values[name] for c in found])
        residuals = values - values.mean()
        alone = float((residuals**2).sum())
        sums = np.bincount(places.ravel(), residuals.repeat(2), n)
        shared = (float((sums**2).sum()) - alone) * n * (n - 1) / (n - 2) ** 2
        half = quantile * math.sqrt(max(shared, alone)) / len(values)
        mean = float(values.mean())
        summary[name] = Diversity(
            measure=name,
            mean=mean,
            deviation=float(values.std(ddof=1)),
            interval=(mean - half, mean + half),
            confidence=confidence,
            pairs=len(values),
            volumes=n,
        )
    return summary
