"""How near volumes come to real ones, in the features of a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from generation.errors import EvaluationError
from generation.evaluate.distances import frechet_distance, frechet_infinity, kernel_distance
from generation.evaluate.estimates import PointEstimate, jackknife
from generation.evaluate.extraction import extract, read
from generation.evaluate.neighbours import (
    clipped_density_coverage,
    density_coverage,
    precision_recall,
)
from synthbrain.evaluation.sets import VolumeSet
from synthbrain.progress import track

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from generation.evaluate.diversity import Volumes
    from generation.evaluate.networks import FeatureNetwork

PUBLISHED = {
    "LSGAN": 0.0231,
    "VAE-GAN": 0.1576,
    "LDM": 0.0076,
    "LDM + DDIM": 0.0080,
    "real images": 0.0005,
}
"""Fréchet distances on Med3D features (Pinaya et al. 2022, Table 1)."""


@dataclass(frozen=True, kw_only=True)
class FeatureSpace:
    """A network's features of volumes, each computed once and kept.

    Parameters
    ----------
    network
        What computes features.
    folder
        Where they are kept.
    device
        Where to compute them.
    progress
        Show progress bars on standard error.
    """

    network: FeatureNetwork
    folder: Path
    device: str = "cpu"
    progress: bool = True

    def of(self, volumes: VolumeSet) -> NDArray[np.float32]:
        """Features ``(n, size)`` of volumes; those that are not there yet are computed."""
        return self.of_named(volumes, volumes.keys, f"features of {volumes.name}")

    def of_named(self, volumes: Volumes, names: Sequence[str], what: str) -> NDArray[np.float32]:
        """As :meth:`of`, of volumes for which names stand: see :func:`extract`."""
        done = extract(volumes, names, self.network, self.folder, device=self.device)
        for _ in track(done, total=len(volumes), what=what, show=self.progress):
            pass
        return read(names, self.network, self.folder)

    def kept(self, volumes: VolumeSet) -> NDArray[np.float32]:
        """As :meth:`of`, of volumes whose features are there."""
        return read(volumes.keys, self.network, self.folder)

    def facts(self) -> dict[str, Any]:
        """What the report says of the network."""
        keys = ("name", "digest", "size", "pretrained")
        return {key: getattr(self.network, key) for key in keys}


def fidelity(
    synthetic: VolumeSet, real: VolumeSet, space: FeatureSpace, *, seed: int = 0
) -> dict[str, Any]:
    """Distances of synthetic from real volumes, and between two halves of the real ones.

    Parameters
    ----------
    synthetic, real
        The volumes.
    space
        The features they are compared in.
    seed
        Of the halves, and of the order in which volumes are dealt out.

    Returns
    -------
    dict
        Facts of the network, and two rows of figures, each with what could not be computed.
    """
    made, wanted = space.of(synthetic), space.of(real)
    one, other = (space.kept(half) for half in real.halves(seed))
    rows = [
        _row(f"{synthetic.name} against {real.name}", wanted, made, seed=seed),
        _row(f"{real.name}, one half against the other", one, other, seed=seed),
    ]
    return {"network": space.facts(), "rows": rows, "published": PUBLISHED}


def _row(
    name: str, real: NDArray[np.float32], generated: NDArray[np.float32], *, seed: int
) -> dict[str, Any]:
    figures: dict[str, Callable[[], Any]] = {
        "fd": lambda: jackknife(frechet_distance, real, generated, seed=seed),
        "fd_infinity": lambda: frechet_infinity(real, generated, seed=seed),
        "kid": lambda: kernel_distance(real, generated),
    }
    pairs: dict[tuple[str, str], Callable[[], Any]] = {
        ("density", "coverage"): partial(density_coverage, real, generated),
        ("clipped_density", "clipped_coverage"): partial(clipped_density_coverage, real, generated),
        ("precision", "recall"): partial(precision_recall, real, generated),
    }
    row: dict[str, Any] = {"compared": name, "real": len(real), "generated": len(generated)}
    missing: dict[str, str] = {}
    for figure, compute in figures.items():
        try:
            row[figure] = _estimate(compute())
        except EvaluationError as error:
            missing[figure] = str(error)
    for names, compute in pairs.items():
        try:
            found = compute()
            row |= dict(zip(names, (found.fidelity, found.diversity), strict=True))
        except EvaluationError as error:
            missing |= dict.fromkeys(names, str(error))
    return {**row, "missing": missing}


def _estimate(found: PointEstimate) -> dict[str, Any]:
    return {**asdict(found), "interval": found.interval()}
