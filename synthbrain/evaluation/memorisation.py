"""Whether volumes are copies of those a generator learned from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

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
    from synthbrain.evaluation.fidelity import FeatureSpace

_PLANTED = 20
_PICTURED = 8


def memorisation(
    synthetic: VolumeSet,
    training: VolumeSet,
    held_out: VolumeSet,
    *,
    spaces: Mapping[str, Features] | None = None,
    kept: FeatureSpace | None = None,
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
    kept
        A network whose features are kept, those of copies made on purpose too; one space more.
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
    looked_at: list[_Space] = [
        _Computed(name, progress, features)
        for name, features in {"voxels": coarse_voxels(4), **(spaces or {})}.items()
    ]
    if kept is not None:
        looked_at.append(_Kept(kept.network.name, kept))
    for space in looked_at:
        name = space.name
        known = space.vectors(training, training.keys, f"{training.name} (training)")
        made = space.vectors(synthetic, synthetic.keys, f"{synthetic.name} (synthetic)")
        others = space.vectors(held_out, held_out.keys, f"{held_out.name} (held out)")
        planted = {}
        for dose in DOSES:
            copies = Planted(training, origins, dose, seed=seed)
            names = [f"{training.keys[origin]}, {dose}, seed {seed}" for origin in origins]
            planted[str(dose)] = space.vectors(copies, names, f"copies: {dose}"), origins
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


class _Space(Protocol):
    """What makes vectors of volumes, for which names stand."""

    @property
    def name(self) -> str: ...

    def vectors(self, volumes: Volumes, names: Sequence[str], what: str) -> torch.Tensor: ...


@dataclass(frozen=True)
class _Computed:
    """Vectors that are computed each time."""

    name: str
    progress: bool
    features: Features

    def vectors(self, volumes: Volumes, names: Sequence[str], what: str) -> torch.Tensor:
        return vectors(_Shown(volumes, f"{self.name} of {what}", self.progress), self.features)


@dataclass(frozen=True)
class _Kept:
    """Features of a network, each computed once."""

    name: str
    space: FeatureSpace

    def vectors(self, volumes: Volumes, names: Sequence[str], what: str) -> torch.Tensor:
        import torch

        found = self.space.of_named(volumes, names, f"{self.name} of {what}")
        return torch.from_numpy(np.ascontiguousarray(found))


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
    """Synthetic volumes more alike than real ones ever are; the share is of as many as real ones.

    The closest of more is closer: all of them would be above the threshold too often. So would they
    if the centre were the mean of the real ones that set it, which are less alike by it.
    """
    import torch

    real = torch.cat([known, others])[: 2 * len(made)]
    try:
        compared, centre = real[::2], real[1::2].mean(0)
        threshold = fresh_threshold(compared, centre=centre)
        share, _ = near_duplicates(made[: len(compared)], threshold, centre=centre)
        _, pairs = near_duplicates(made, threshold, centre=centre)
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
