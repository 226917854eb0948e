"""Procedural heads whose ventricular and brain volumes, measured in the image, are the asked ones.

Each row warps the head of :mod:`generation.atlas`:

1. the head is scaled to an intracranial volume drawn from sex and seed, turned a little, and bent
   by a smooth random field;
2. the lateral ventricles grow or shrink along a stationary velocity field, exponentiated by scaling
   and squaring, so that tissue is pushed aside and never folds;
3. the brain draws back from the skull and its sulci open as the asked brain volume falls;
4. two level sets, the ventricular wall and the pial surface, are shifted by the fraction of a
   millimetre that makes both volumes exact on the voxel grid;
5. intensities follow age: grey-white contrast falls, periventricular white matter darkens.

Phantoms serve to build, test and benchmark pipelines. They are not a model of a population.
"""

from __future__ import annotations

import hashlib
import math
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from generation import atlas
from generation.covariates import BRAIN_VOLUME, NAMES, VENTRICULAR_VOLUME, conditioning
from generation.levelset import in_voxels, ramp, shift_to_volume
from generation.volumetry import REFERENCE_ICV
from generation.warp import Grid, exponential, look_up, positions, spread

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

VERSION = 2
"""Raise it whenever the same row would give other voxels: volumes of two versions never mix."""

SHAPE = (160, 224, 160)
GRID = Grid((80.48149871826172, -125.47715759277344, -60.55375671386719), (-1.0, 1.0, 1.0))
"""World position of the voxels (mm), stored right to left (LAS)."""

COARSE_SHAPE = (80, 112, 80)
COARSE = Grid((79.98149871826172, -124.97715759277344, -60.05375671386719), (-2.0, 2.0, 2.0))
"""Warps are computed on blocks of 2³ voxels."""

HEAD = Grid(atlas.HEAD_ORIGIN, (1.0, 1.0, 1.0))
GROWTH = Grid(atlas.ORIGIN, (float(atlas.GROWTH_STEP),) * 3)

INTRACRANIAL_MEAN = (1_440_000.0, 1_620_000.0)
INTRACRANIAL_SD = 90_000.0
"""Intracranial volume of women and men, mm³: assumptions, of the size that MRI studies report."""

LEAST_VENTRICLES = 1_500.0
MOST_VENTRICLES = 0.30
LEAST_BRAIN, MOST_BRAIN = 0.42, 0.96
"""Where extrapolation ends: mm³, share of the intracranial volume, shares of what is left of it."""

CSF, GREY, WHITE = 0.16, 0.50, 0.73
NOISE = 0.003

PIVOT = (0.0, -15.0, -10.0)
"""Point of the template (mm) about which heads are scaled and brains shrink."""

COURSE = (-0.7, -0.5, -0.3, -0.15, 0.0, 0.15, 0.3, 0.6, 1.0, 1.6, 2.4, 3.4, 4.4, 5.4, 6.4)
"""Times at which the growth of the ventricles is tabulated; a table suffices to start from."""

TEMPLATE_BRAIN = 0.85
"""Brain volume of the template's head as a share of what the ventricles leave."""


class _Traits:
    """The random numbers of one row, always drawn in the same order."""

    def __init__(self, seed: int) -> None:
        self._source = torch.Generator().manual_seed(seed)
        self.scalars = self._draw((16,)).double()
        self.bend = self._draw((3, 8, 10, 8))
        self.wiggle = self._draw((3, 13, 18, 13))
        self.cortex = self._draw((1, 28, 38, 28))
        self.coil = self._draw((1, 6, 7, 6))

    def _draw(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self._source).clamp(-2.5, 2.5)

    def noise(self) -> Tensor:
        """White noise for one volume; to be drawn once."""
        return torch.randn(SHAPE, generator=self._source)


class _Targets(NamedTuple):
    """What each row is to measure and how large its head is; tensors ``(n,)``, mm³ and ratios."""

    intracranial: Tensor
    ventricular: Tensor
    brain: Tensor
    """In a head of the reference size."""
    age: Tensor
    scale: Tensor
    """Length in this head over length in the template's."""
    shrink: Tensor
    """Length in this brain over length in one that fills its head as the template's does."""


class PhantomGenerator:
    """Full-size procedural heads with known covariates, in torch, on a CPU or a GPU.

    Parameters
    ----------
    cache
        Folder for the derived template fields (75 MB); without one each process derives them
        again, which takes about 25 s.
    device
        Where to sample.

    Notes
    -----
    Covariates outside [0, 1] extrapolate until anatomy ends: ventricles shrink towards 1.5 ml and
    grow to 30 % of the intracranial volume; the brain keeps between 42 % and 96 % of the room that
    skull and ventricles leave.

    Examples
    --------
    >>> PhantomGenerator().shape
    (160, 224, 160)
    """

    name = "phantom"
    honours = frozenset(NAMES)
    shape = SHAPE

    def __init__(self, cache: Path | None = None, device: str | torch.device = "cpu") -> None:
        self.cache = cache
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        self.batch_size = 8 if on_gpu else 1
        self.seconds_per_volume = 0.1 if on_gpu else 1.5

    def __getstate__(self) -> dict[str, object]:
        return {"cache": self.cache, "device": self.device}

    def __setstate__(self, state: dict[str, object]) -> None:
        PhantomGenerator.__init__(self, **state)  # type: ignore[arg-type]

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 over the versions of generator and atlas and the template's files."""
        return hashlib.sha256(f"phantom {VERSION} {atlas.digest()}".encode()).hexdigest()

    @torch.inference_mode()
    def sample(self, rows: pd.DataFrame) -> Tensor:
        """Make one volume per row.

        Parameters
        ----------
        rows
            Normalised covariate columns and an integer ``seed``.

        Returns
        -------
        Tensor
            ``(n, 1, 160, 224, 160)`` float32 in [0, 1], 1 mm, LAS.

        Raises
        ------
        CovariateError
            A covariate is absent or not finite.
        FileNotFoundError
            nilearn, and with it the template, is not installed.
        """
        vectors = conditioning(rows)
        seeds = [int(seed) for seed in rows["seed"]]
        starts = range(0, len(seeds), self.batch_size)
        ends = [start + self.batch_size for start in starts]
        batches = [
            self._volumes(vectors[start:end], seeds[start:end])
            for start, end in zip(starts, ends, strict=True)
        ]
        return torch.cat(batches) if batches else torch.empty((0, 1, *SHAPE), device=self.device)

    @torch.inference_mode()
    def deformation(self, rows: pd.DataFrame) -> Tensor:
        """Where in the template's brain each part of a volume comes from.

        Parameters
        ----------
        rows
            As for :meth:`sample`.

        Returns
        -------
        Tensor
            World coordinates (mm) for every block of 2³ voxels, ``(n, 3, 80, 112, 80)``.
        """
        traits = [_Traits(int(seed)) for seed in rows["seed"]]
        targets = _targets(conditioning(rows), traits, self.device)
        return self._into_brain(self._into_head(targets, traits), targets, traits)

    def _volumes(self, vectors: NDArray[np.float32], seeds: list[int]) -> Tensor:
        traits = [_Traits(seed) for seed in seeds]
        targets = _targets(vectors, traits, self.device)
        into_head = self._into_head(targets, traits)
        head, skull = look_up(self._head, HEAD, _enlarge(into_head)).unbind(1)
        into_brain = _enlarge(self._into_brain(into_head, targets, traits))
        tissue, pial, ventricle = look_up(self._brain, self._brain_grid, into_brain).unbind(1)
        del into_head, into_brain
        inside = ramp(-skull)
        ventricle = in_voxels(ventricle)
        ventricle += shift_to_volume(-ventricle, inside, targets.ventricular)
        room = inside * ramp(ventricle)
        wall = 4.0 * (2.5 - ventricle)  # at least 1.5 mm of tissue around the ventricles
        pial += 1.6 * self._spread(traits, "cortex")[:, 0]
        volume = _bounded(targets.brain / REFERENCE_ICV, inside, room)
        erosion = shift_to_volume(torch.maximum(pial, wall), room, volume)
        pial -= erosion
        matter = ramp(torch.maximum(pial, wall - erosion)) * room
        tissue = _age(_ribbon(tissue, pial, erosion), ventricle, targets.age)
        image = _contrast(tissue, targets.age, traits) * matter + CSF * (inside - matter)
        image += _coat(head, traits) * (1 - inside)
        return self._scan(image, traits)[:, None]

    def _scan(self, image: Tensor, traits: list[_Traits]) -> Tensor:
        """Receive-coil shading and noise, none of it in the air: synthetic sets have none there."""
        image *= torch.exp(0.12 * self._spread(traits, "coil")[:, 0])
        noise = torch.stack([t.noise() for t in traits]).to(self.device)
        noise *= NOISE * (image / CSF).clamp(max=1)
        return (image + noise).clamp_(0, 1)

    def _into_head(self, targets: _Targets, traits: list[_Traits]) -> Tensor:
        """Template coordinates (mm) of a head's voxels, ``(n, 3, 80, 112, 80)``."""
        here = positions(COARSE, COARSE_SHAPE, self.device)
        pivot = torch.tensor(PIVOT, device=self.device).view(1, 3, 1, 1, 1)
        poses = torch.stack([_pose(t.scalars) for t in traits]).float().to(self.device)
        poses = poses / targets.scale.float().view(-1, 1, 1)
        centred = here - pivot - torch.stack([_offset(t.scalars) for t in traits]).to(here)
        turned = torch.einsum(
            "nij,nj...->ni...", poses, centred.expand(len(traits), -1, -1, -1, -1)
        )
        return turned + pivot + 4.5 * self._spread(traits, "bend", COARSE_SHAPE)

    def _into_brain(self, into_head: Tensor, targets: _Targets, traits: list[_Traits]) -> Tensor:
        """The same for the brain, which shrinks inside its skull and has ventricles that grow."""
        pivot = torch.tensor(PIVOT, device=self.device).view(1, 3, 1, 1, 1)
        shrink = targets.shrink.float().view(-1, 1, 1, 1, 1)
        wiggle = 2.2 * self._spread(traits, "wiggle", COARSE_SHAPE)
        spread_out = (into_head - pivot) / shrink + pivot + wiggle
        in_template = targets.ventricular / (targets.scale * targets.shrink) ** 3
        flow = exponential(self._growth, GROWTH, -self._time(in_template))
        return spread_out + look_up(flow, GROWTH, spread_out)

    def _time(self, volume: Tensor) -> Tensor:
        """How long the ventricles of the template grow until they hold ``volume``."""
        times, volumes = self._course
        above = torch.searchsorted(volumes, volume).clamp(1, len(volumes) - 1)
        part = (volume - volumes[above - 1]) / (volumes[above] - volumes[above - 1])
        return (times[above - 1] + part.clamp(0, 1) * (times[above] - times[above - 1])).float()

    @cached_property
    def _course(self) -> tuple[Tensor, Tensor]:
        """Volume of the template's ventricles (mm³) over the time they grow."""

        def derive() -> dict[str, Any]:
            times = torch.tensor(COURSE, dtype=torch.float64, device=self.device)
            return {"times": times.cpu().numpy(), "volumes": self._grown(times).cpu().numpy()}

        # Devices round differently: each remembers its own.
        name = f"course-{self.device.type}-{self.digest[:16]}"
        kept = atlas.remembered(self.cache, name, ("times", "volumes"), derive)
        times, volumes = (torch.from_numpy(kept[key]) for key in ("times", "volumes"))
        return times.to(self.device), volumes.to(self.device)

    def _grown(self, times: Tensor) -> Tensor:
        step = atlas.GROWTH_STEP
        shape = (self._growth.shape[1], self._growth.shape[2], self._growth.shape[3])
        here = positions(GROWTH, shape, self.device)
        volumes = []
        for time in times:
            moved = here + exponential(self._growth, GROWTH, -time.view(1).float())
            distance = look_up(self._brain[2:], self._brain_grid, moved)
            volumes.append((0.5 - distance / step).clamp(0, 1).sum(dtype=torch.float64) * step**3)
        return torch.stack(volumes).cummax(0).values

    @cached_property
    def _atlas(self) -> atlas.Atlas:
        return atlas.load_atlas(self.cache)

    @cached_property
    def _brain(self) -> Tensor:
        fields = (self._atlas.tissue, self._atlas.pial, self._atlas.ventricle)
        return torch.stack([torch.from_numpy(field) for field in fields]).to(self.device)

    @cached_property
    def _head(self) -> Tensor:
        fields = (self._atlas.head, self._atlas.skull)
        return torch.stack([torch.from_numpy(field) for field in fields]).to(self.device)

    @cached_property
    def _growth(self) -> Tensor:
        return torch.from_numpy(self._atlas.growth).to(self.device)

    @cached_property
    def _brain_grid(self) -> Grid:
        x, y, z = self._atlas.brain_origin.tolist()
        return Grid((x, y, z), (1.0, 1.0, 1.0))

    def _spread(
        self, traits: list[_Traits], name: str, shape: tuple[int, int, int] = SHAPE
    ) -> Tensor:
        knots = torch.stack([getattr(t, name) for t in traits]).to(self.device)
        return spread(knots, shape)


def _targets(vectors: NDArray[np.float32], traits: list[_Traits], device: torch.device) -> _Targets:
    sex, age, ventricular, brain = torch.tensor(vectors, dtype=torch.float64).unbind(1)
    women, men = INTRACRANIAL_MEAN
    deviation = torch.stack([t.scalars[0] for t in traits]).clamp(-2, 2)
    intracranial = women + (men - women) * sex.clamp(0, 1) + INTRACRANIAL_SD * deviation
    ventricles = _ventricles(ventricular, intracranial)
    volume = BRAIN_VOLUME.low + brain * (BRAIN_VOLUME.high - BRAIN_VOLUME.low)
    filled = volume / REFERENCE_ICV * intracranial / (intracranial - ventricles) / TEMPLATE_BRAIN
    values = _Targets(
        intracranial=intracranial,
        ventricular=ventricles,
        brain=volume,
        age=age.clamp(-0.5, 1.5),
        scale=(intracranial / REFERENCE_ICV) ** (1 / 3),
        shrink=filled.clamp(0.5, 1.1) ** 0.17,
    )
    return _Targets(*[value.to(device) for value in values])


def _ventricles(covariate: Tensor, intracranial: Tensor) -> Tensor:
    """Ventricular volume (mm³) to make: the asked one, until anatomy ends."""
    low, high = VENTRICULAR_VOLUME.low, VENTRICULAR_VOLUME.high
    asked = low + covariate * (high - low)
    slack = low - LEAST_VENTRICLES
    small = LEAST_VENTRICLES + slack * torch.exp(((asked - low) / slack).clamp(max=0))
    large = intracranial * _soft_min(asked / intracranial, MOST_VENTRICLES)
    return torch.where(asked < low, small, large)


def _bounded(share: Tensor, inside: Tensor, room: Tensor) -> Tensor:
    """Brain volume (mm³) to make: a share of the intracranial volume, until anatomy ends."""
    intracranial = inside.sum((1, 2, 3), dtype=torch.float64)
    left = room.sum((1, 2, 3), dtype=torch.float64)
    filled = _soft_min(share * intracranial / left, MOST_BRAIN)
    return left * -_soft_min(-filled, -LEAST_BRAIN)


def _soft_min(value: Tensor, limit: float) -> Tensor:
    """``min(value, limit)`` with its corner rounded over about 0.03."""
    return limit - F.softplus(limit - value, beta=80)


def _pose(scalars: Tensor) -> Tensor:
    """Rotation by a degree or two and the shape of the head, long to broad, ``(3, 3)``."""
    angles = scalars[1:4] * math.radians(1.2)
    skew = torch.zeros((3, 3), dtype=torch.float64)
    skew[[2, 0, 1], [1, 2, 0]] = angles
    breadth, height = 0.014 * scalars[4], 0.012 * scalars[5]
    return torch.matrix_exp(
        skew - skew.T + torch.diag(torch.stack([breadth, -breadth - height, height]))
    )


def _offset(scalars: Tensor) -> Tensor:
    return (0.8 * scalars[6:9]).view(3, 1, 1, 1)


def _enlarge(coordinates: Tensor) -> Tensor:
    """Coordinates on blocks of 2³ voxels to coordinates on voxels."""
    device = coordinates.device
    moved = coordinates - positions(COARSE, COARSE_SHAPE, device)
    moved = F.interpolate(moved, scale_factor=2, mode="trilinear", align_corners=False)
    return moved.add_(positions(GRID, SHAPE, device))


def _ribbon(tissue: Tensor, pial: Tensor, erosion: Tensor) -> Tensor:
    """Keep some grey matter on gyri whose cortex the shift of the pial surface took."""
    excess = (tissue - ((pial - 1.6) / 1.6).clamp_(min=0)).clamp_(min=0)
    return tissue - (0.6 * erosion).clamp(0, 0.8) * excess


def _age(tissue: Tensor, ventricle: Tensor, age: Tensor) -> Tensor:
    """Darken the white matter around the ventricles of the old."""
    amount = (0.45 * (age - 0.3)).clamp(min=0).float().view(-1, 1, 1, 1)
    return tissue - amount * torch.exp(-ventricle.clamp(min=0) / 3.0)


def _contrast(tissue: Tensor, age: Tensor, traits: list[_Traits]) -> Tensor:
    """Intensities from tissue: the older, the less white matter differs from grey."""
    own = torch.stack([t.scalars[9] for t in traits]).to(tissue.device)
    white = (WHITE - 0.06 * age + 0.012 * own).float().view(-1, 1, 1, 1)
    grey = (GREY + 0.01 * age).float().view(-1, 1, 1, 1)
    return grey + tissue * (white - grey)


def _coat(head: Tensor, traits: list[_Traits]) -> Tensor:
    """Skull and scalp with a brightness of their own."""
    own = torch.stack([t.scalars[10] for t in traits]).to(head.device)
    return head * (1 + 0.05 * own).float().view(-1, 1, 1, 1)
