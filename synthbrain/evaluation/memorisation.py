"""Whether volumes are copies of those a generator learned from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from generation.errors import EvaluationError
from generation.evaluate.memorisation import audit, combined
from generation.evaluate.near_duplicates import fresh_threshold, near_duplicates
from generation.evaluate.planted import DOSES, Planted
from generation.evaluate.vectors import coarse_voxels, rerank, vectors
from synthbrain.evaluation.sets import VolumeSet
from synthbrain.progress import track

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from generation.evaluate.diversity import Volumes
    from generation.evaluate.vectors import Features, Match

_PLANTED = 20
_PICTURED = 8


def memorisation(
    synthetic: VolumeSet,
    training: VolumeSet,
    held_out: VolumeSet,
    *,
    spaces: Mapping[str, Features] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Look for copies in several spaces, with the member-only control and the power of each.

    Parameters
    ----------
    synthetic
        Volumes of the generator.
    training, held_out
        What it learned from, and others from the same place that it never saw.
    spaces
        By name, what makes a vector of a volume; coarse voxels are always looked at.
    seed
        Of all draws.
    progress
        Show progress bars on standard error.

    Returns
    -------
    dict
        The combined verdict, one audit a space, near-duplicates among the synthetic volumes, and
        the pairs most alike, compared again at full size.
    """
    draw = np.random.Generator(np.random.Philox(seed))
    count = min(_PLANTED, len(training))
    origins = sorted(draw.choice(len(training), count, replace=False).tolist())
    audits, worst, duplicates = [], [], {}
    for name, features in {"voxels": coarse_voxels(4), **(spaces or {})}.items():
        space = _Space(name, features, progress)
        known = space.vectors(training, f"{training.name} (training)")
        made = space.vectors(synthetic, f"{synthetic.name} (synthetic)")
        others = space.vectors(held_out, f"{held_out.name} (held out)")
        planted = {
            str(dose): (
                space.vectors(Planted(training, origins, dose, seed=seed), f"copies: {dose}"),
                origins,
            )
            for dose in DOSES
        }
        found = audit(known, made, others, space=name, planted=planted, seed=seed)
        audits.append(found)
        worst += [(name, match) for match in found.worst[:_PICTURED]]
        duplicates[name] = _duplicates(made, known, others)
    verdict, p = combined(audits)
    return {
        "verdict": verdict,
        "p": p,
        "spaces": [
            {**asdict(found), "verdict": found.verdict, "statement": found.statement()}
            for found in audits
        ],
        "duplicates": duplicates,
        "worst": _worst(worst, synthetic, training),
    }


@dataclass(frozen=True)
class _Space:
    """What makes a vector of a volume."""

    name: str
    features: Features
    progress: bool

    def vectors(self, volumes: Volumes, what: str) -> torch.Tensor:
        return vectors(_Shown(volumes, f"{self.name} of {what}", self.progress), self.features)


class _Shown:
    """Volumes that show on a bar how many were read."""

    def __init__(self, volumes: Volumes, what: str, progress: bool) -> None:
        self._volumes = volumes
        self._bar = track(range(len(volumes)), total=len(volumes), what=what, show=progress)

    def __len__(self) -> int:
        return len(self._volumes)

    def __getitem__(self, index: int) -> torch.Tensor:
        next(self._bar, None)
        volume = self._volumes[index]
        if index == len(self) - 1:
            next(self._bar, None)
        return volume


def _duplicates(made: torch.Tensor, known: torch.Tensor, others: torch.Tensor) -> dict[str, Any]:
    """Synthetic volumes more alike than real ones ever are, of as many real ones."""
    import torch

    real = torch.cat([known, others])[: len(made)]
    try:
        centre = real.mean(0)
        threshold = fresh_threshold(real, centre=centre)
        share, pairs = near_duplicates(made, threshold, centre=centre)
    except EvaluationError as error:
        return {"missing": str(error)}
    return {"threshold": threshold, "expected": 0.05, "share": asdict(share),
            "worst": [match._asdict() for match in pairs[:_PICTURED]]}  # fmt: skip


def _worst(
    matches: Sequence[tuple[str, Match]], synthetic: VolumeSet, training: VolumeSet
) -> list[dict[str, Any]]:
    """The pairs most alike over all spaces, by the correlation of full-size volumes."""
    spaces: dict[tuple[int, int], list[str]] = {}
    for space, match in matches:
        spaces.setdefault((match.sample, match.match), []).append(space)
    chosen = {(m.sample, m.match): m for _, m in matches}
    again = rerank(list(chosen.values()), synthetic, training)
    return [
        {
            "synthetic": synthetic.ids[match.sample],
            "training": training.ids[match.match],
            "places": (match.sample, match.match),
            "similarity": match.similarity,
            "found_in": spaces[match.sample, match.match],
        }
        for match in again
    ]
