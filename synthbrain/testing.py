"""Contract tests any Generator, Source or Store must pass, and tiny generators to test with.

For use in the tests of whoever writes one::

    from synthbrain.testing import check_generator

    def test_my_generator():
        check_generator(MyGenerator())

Every function raises :class:`AssertionError` that says which promise was broken.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from generation.covariates import NAMES, conditioning
from generation.generator import LatentGenerator, has_latents
from synthbrain.cohort import recipes
from synthbrain.header import Geometry, Header, Licence
from synthbrain.manifest import Manifest
from synthbrain.shard import ShardLayout
from synthbrain.store import Store

if TYPE_CHECKING:
    import pandas as pd

    from generation.generator import Generator
    from synthbrain.sources.base import Source

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

_GREY_LEVEL = 1 / 255
"""How far rounding a latent to float16 may move voxels, on average."""

TINY = Geometry(shape=(16, 24, 16), chunks=(8, 12, 8))
"""A geometry small enough for thousands of volumes in a test."""


class TinyGenerator:
    """Makes recognisable volumes of any size in microseconds.

    Parameters
    ----------
    shape
        Voxels of a volume.
    batch_size
        How many rows it likes at once.
    """

    name = "tiny"
    digest = "0123456789abcdef"
    honours = frozenset(NAMES)
    seconds_per_volume = 0.001

    def __init__(self, shape: tuple[int, int, int] = TINY.shape, batch_size: int = 4) -> None:
        self.shape = shape
        self.batch_size = batch_size

    def sample(self, rows: pd.DataFrame) -> torch.Tensor:
        """Noise from each row's seed, blended with its covariates: ``(n, 1, x, y, z)``."""
        covariates = conditioning(rows)
        return torch.stack(
            [
                self._volume(int(seed), vector)
                for seed, vector in zip(rows["seed"], covariates, strict=True)
            ]
        )

    def _volume(self, seed: int, vector: np.ndarray) -> torch.Tensor:
        noise = torch.rand((1, *self.shape), generator=torch.Generator().manual_seed(seed))
        return (0.5 * noise + 0.5 * float(np.clip(vector.mean(), 0, 1))).clamp(0, 1)


class TinyLatentGenerator:
    """Makes latents of noise and decodes them into blurred blocks, in microseconds.

    Parameters
    ----------
    shape
        Voxels of a volume, multiples of 8; a latent has an eighth of them along each axis.
    batch_size
        How many rows it likes at once.
    """

    name = "tiny-latent"
    digest = "fedcba9876543210"
    honours = frozenset(NAMES)
    seconds_per_volume = 0.001

    def __init__(self, shape: tuple[int, int, int] = TINY.shape, batch_size: int = 4) -> None:
        self.shape = shape
        self.latent_shape = (3, shape[0] // 8, shape[1] // 8, shape[2] // 8)
        self.batch_size = batch_size

    def sample(self, rows: pd.DataFrame) -> torch.Tensor:
        """The decoded latents of some rows: ``(n, 1, x, y, z)``."""
        return self.decode(self.sample_latents(rows))

    def sample_latents(self, rows: pd.DataFrame) -> torch.Tensor:
        """Normal noise from each row's seed, shifted by its covariates: ``(n, *latent_shape)``."""
        means = torch.tensor(conditioning(rows)).mean(1).float()
        sources = [torch.Generator().manual_seed(int(seed)) for seed in rows["seed"]]
        noise = [torch.randn(self.latent_shape, generator=source) for source in sources]
        return torch.stack(noise) + means[:, None, None, None, None]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Channels averaged, enlarged and squashed: ``(n, 1, x, y, z)``."""
        mean = latents.float().mean(1, keepdim=True)
        return torch.nn.functional.interpolate(mean, self.shape, mode="trilinear").sigmoid()


def tiny_manifest(n: int = 20, *, name: str = "tiny", seed: int = 0) -> Manifest:
    """A manifest of ``n`` recipes with :data:`TINY` volumes and evenly drawn covariates."""
    draw = np.random.default_rng(seed)
    columns = {name: draw.random(n).round(6) for name in NAMES}
    columns["sex"] = (columns["sex"] > 0.5).astype(float)
    header = Header(name=name, geometry=TINY, rows=n, licence=Licence(status="stated", name="CC0"))
    return Manifest.create(header, recipes(columns, stem=name, seed=seed))


def check_generator(generator: Generator, *, tolerance: float = 1e-4) -> None:
    """Hold a generator to its contract, on three rows.

    Parameters
    ----------
    generator
        The generator; one that makes latents is also held to the contract of
        :class:`generation.generator.LatentGenerator`.
    tolerance
        How far the same row's voxels, or latent, may differ between batches.
    """
    rows = tiny_manifest(3, name="contract", seed=7).table[[*NAMES, "seed"]]
    together = generator.sample(rows)
    expected = (3, 1, *generator.shape)
    assert tuple(together.shape) == expected, f"shape {tuple(together.shape)}, expected {expected}"
    assert together.dtype == torch.float32, f"type {together.dtype}, expected float32"
    assert bool(torch.isfinite(together).all()), "values are not all finite"
    assert float(together.min()) >= 0, f"lowest value {float(together.min())} is below 0"
    assert float(together.max()) <= 1, f"highest value {float(together.max())} is above 1"
    for number in reversed(range(3)):
        alone = generator.sample(rows.iloc[[number]])[0]
        error = float((alone - together[number]).abs().max())
        assert error <= tolerance, f"row {number} differs by {error} when made alone"
    reseeded = generator.sample(rows.iloc[[0]].assign(seed=[int(rows["seed"].iloc[0]) + 1]))[0]
    assert not torch.equal(reseeded, together[0]), "another seed gives the same volume"
    assert len(generator.digest) >= 8, "digest has fewer than 8 digits"
    assert set(generator.digest) <= set("0123456789abcdef"), "digest is not hexadecimal"
    assert _NAME.fullmatch(generator.name), f"name {generator.name!r} cannot name a folder"
    assert generator.honours <= set(NAMES), f"honours {generator.honours}, not all covariates"
    assert generator.batch_size >= 1, "batch_size is below 1"
    assert generator.seconds_per_volume > 0, "seconds_per_volume is not positive"
    if has_latents(generator):
        _check_latents(generator, rows, tolerance)
        _check_decoding(generator, rows, together, tolerance)


def _check_latents(generator: LatentGenerator, rows: pd.DataFrame, tolerance: float) -> None:
    latents = generator.sample_latents(rows)
    found, expected = tuple(latents.shape), (len(rows), *generator.latent_shape)
    assert len(expected) == 5, f"latent_shape {expected[1:]}, expected (channel, x, y, z)"
    assert found == expected, f"latents of shape {found}, expected {expected}"
    assert latents.dtype == torch.float32, f"latents of type {latents.dtype}, expected float32"
    assert bool(torch.isfinite(latents).all()), "latents are not all finite"
    largest = float(latents.abs().max())
    assert largest <= torch.finfo(torch.float16).max, f"latents up to {largest} do not fit float16"
    alone = generator.sample_latents(rows.iloc[[1]])[0]
    error = float((alone - latents[1]).abs().max())
    assert error <= tolerance, f"the latent of row 1 differs by {error} when made alone"


def _check_decoding(
    generator: LatentGenerator, rows: pd.DataFrame, volumes: torch.Tensor, tolerance: float
) -> None:
    latents = generator.sample_latents(rows)
    decoded = generator.decode(latents)
    found, expected = tuple(decoded.shape), (len(rows), 1, *generator.shape)
    assert found == expected, f"decode() gives shape {found}, expected {expected}"
    assert decoded.dtype == torch.float32, f"decode() gives {decoded.dtype}, expected float32"
    low, high = float(decoded.min()), float(decoded.max())
    assert low >= 0, f"decode() gives {low}, below 0"
    assert high <= 1, f"decode() gives {high}, above 1"
    error = float((decoded - volumes).abs().max())
    assert error <= tolerance, f"decode(sample_latents(rows)) is {error} off sample(rows)"
    stored = generator.decode(latents[[1]].half())[0]
    error = float((stored - decoded[1]).abs().mean())
    assert error <= _GREY_LEVEL, f"decoded from float16, row 1 is {error} off on average"


def check_source(source: Source, ids: Sequence[str], geometry: Geometry) -> None:
    """Hold a source to its contract.

    Parameters
    ----------
    source
        The source.
    ids
        Two or more ids it can give.
    geometry
        Geometry of the volumes.
    """
    stranger = "no-such-volume"
    holds = source.holds([*ids, stranger])
    assert isinstance(holds, np.ndarray), f"holds() gives {type(holds)}, expected a bool array"
    assert holds.dtype == bool, f"holds() gives {holds.dtype}, expected bool"
    assert holds[:-1].all(), f"holds() gives {holds.tolist()} for volumes it has"
    cost = source.cost(ids)
    assert cost.bytes > 0, f"cost {cost} has no bytes"
    assert cost.seconds > 0, f"cost {cost} has no seconds"
    got = list(source.fetch([*ids, stranger], geometry))
    given = sorted(id for id, _ in got if id in ids)
    assert given == sorted(ids), f"fetch() gave {given}, asked for {sorted(ids)}"
    layout = ShardLayout(geometry.shape, geometry.chunks, geometry.dtype)
    for id, payload in got:
        volume = layout.decode(payload) if isinstance(payload, bytes) else payload
        assert volume.shape == geometry.shape, f"{id} has shape {volume.shape}"
        assert volume.dtype == np.dtype(geometry.dtype), f"{id} has type {volume.dtype}"
    started = source.fetch(ids, geometry)
    next(iter(started))
    close = getattr(started, "close", None)
    assert close is not None, "fetch() must be a generator, so that it can be closed"
    close()


def check_store(store: Store) -> None:
    """Hold a store to its contract: an empty one with a writable root.

    A subclass or a store on an unusual file system must pass this.
    """
    layout = store.layout
    volume = np.random.default_rng(0).integers(0, 255, layout.shape).astype(layout.dtype)
    zeros = np.zeros_like(volume)
    assert not store.has(5), "an empty store has a volume"
    assert store.write(5, volume), "the first write says somebody else was first"
    assert not store.write(5, zeros), "the second write replaced a sound volume"
    assert np.array_equal(store.read(5), volume), "a volume came back changed"
    assert store.write(1005, zeros), "an all-zero volume was not written"
    assert store.has(1005), "an all-zero volume counts as missing"
    stored = store.stored([5, 6, 1005]).tolist()
    assert stored == [True, False, True], f"stored() gives {stored} for 5, 6 and 1005 of 5, 1005"
    start, size = tuple(n // 4 for n in layout.shape), tuple((n + 1) // 2 for n in layout.shape)
    box = tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))
    assert np.array_equal(store.read_patch(5, start, size), volume[box]), "a patch differs"
    _check_damage(store, volume)


def _check_damage(store: Store, volume: np.ndarray) -> None:
    path: Path = store.path(5)
    sound = path.read_bytes()
    path.write_bytes(sound[: len(sound) // 2])
    assert not store.has(5), "a shard cut short counts as present"
    path.write_bytes(sound[:10] + bytes([sound[10] ^ 1]) + sound[11:])
    blamed = [position for position, damage in store.verify() if damage is not None]
    assert blamed == [5], f"verify() names {len(blamed)} volumes, {blamed}: volume 5 is damaged"
    store.quarantine(5)
    assert not store.has(5), "a quarantined volume counts as present"
    assert store.write(5, volume), "a quarantined volume cannot be written again"
    assert np.array_equal(store.read(5), volume), "a volume written again came back changed"
