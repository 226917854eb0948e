"""SynthBrainDataset: a cohort as a map-style PyTorch dataset."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from generation.covariates import COVARIATES, NAMES, SEXES
from generation.generator import has_latents
from synthbrain.ahead import Missing
from synthbrain.epochs import Epoch
from synthbrain.errors import GeneratorError, UsageError
from synthbrain.generators import identity, load_generator
from synthbrain.home import home
from synthbrain.loader import ConvertingLoader, has_order
from synthbrain.making import NOUNS, Representation
from synthbrain.manifest import Manifest, Range
from synthbrain.plan import Plan
from synthbrain.progress import track
from synthbrain.quantise import as_float, as_float32, intensities
from synthbrain.resolver import Resolver
from synthbrain.sampler import SynthBrainSampler, whole
from synthbrain.sampling.routing import RoutedGenerator
from synthbrain.sources.folder import FolderSource
from synthbrain.sources.opening import packed_by, quick_sources

if TYPE_CHECKING:
    import pandas as pd

    from generation.generator import Generator
    from synthbrain.ahead import Supply
    from synthbrain.quantise import Array
    from synthbrain.sources.base import Source

Sample = dict[str, Any]
Transform = Callable[[Sample], Any]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "uint8": torch.uint8}
_MAX_THREADS = 4


class SynthBrainDataset(Dataset[Any]):
    """Volumes and covariates of a cohort; what is missing is fetched or made when asked for.

    Parameters
    ----------
    manifest
        Name or path of a manifest, or one already open.
    split, age_range, age_years, sex, ventricular_range, ventricular_mm3, brain_range, brain_mm3, \
where, ids, limit, extrapolate
        Which rows, as in :meth:`synthbrain.Manifest.select`.
    generator
        Makes recipes that are stored nowhere: a name, which DataLoader workers leave to one
        sampling service for all of them; an object with the methods of
        :class:`generation.generator.Generator`, which each process uses for itself; or ``"auto"``
        for the best one installed, and for None where the manifest names packs of what another one
        made. With None nothing is ever sampled, and a missing row that no source has raises.
    sources
        Where to fetch from before sampling: sources, or folders of NIfTI files. By default those
        of the manifest's header but torrents, which `synthbrain pull` fetches from; ``[]`` for
        none.
    store
        Folder of stored volumes; ``store/`` in the package's home by default.
    made_by
        Without a generator: whose volumes to read, where the store holds those of several.
    patch_size
        Return boxes of this size instead of whole volumes. Where a box lies is a pure function
        of (``seed``, epoch, row): see :meth:`set_epoch`.
    representation
        ``"image"``, or ``"latent"`` for the small arrays that :meth:`decode` turns into volumes;
        rows that are stored as such nowhere need a
        :class:`generation.generator.LatentGenerator`.
    units
        ``"normalised"`` covariates, or ``"natural"`` ones: years, mm³, ``"female"``/``"male"``.
    transform
        Called with each sample, as MONAI's dictionary transforms are.
    dtype
        Type of ``image``: ``"float32"`` or ``"float16"`` in [0, 1], or ``"uint8"`` as stored. Of
        ``latent``: ``"float32"``, or ``"float16"`` as stored.
    meta_tensor
        Return ``image`` as a :class:`monai.data.MetaTensor` that carries the affine.
    heal
        Make damaged volumes again and log it; with False damage raises.
    seed
        Seed of the patch positions.

    Raises
    ------
    UsageError, CovariateError
        An argument makes no sense, or no row satisfies them all.
    ManifestError, GeneratorError, SourceError
        The manifest, generator or source is unknown or unfit.

    Notes
    -----
    A sample is a dict: ``image`` tensor ``(1, x, y, z)``, ``sex``, ``age``,
    ``ventricular_volume``, ``brain_volume`` (float32 scalars), ``id``, ``made_by`` (text), and
    ``patch_start`` (``(3,)`` int64) with ``patch_size``. With ``representation="latent"`` there is
    a ``latent`` tensor ``(channel, x, y, z)`` in place of ``image``.

    Examples
    --------
    >>> ds = SynthBrainDataset(split="train", age_range=(0.4, 0.8), generator="phantom", limit=8)
    >>> len(ds)
    8
    """

    def __init__(
        self,
        manifest: str | os.PathLike[str] | Manifest = "synthbrain-100k",
        *,
        split: str | Sequence[str] | None = None,
        age_range: Range | None = None,
        age_years: Range | None = None,
        sex: str | float | None = None,
        ventricular_range: Range | None = None,
        ventricular_mm3: Range | None = None,
        brain_range: Range | None = None,
        brain_mm3: Range | None = None,
        where: str | None = None,
        ids: Iterable[str] | None = None,
        limit: int | None = None,
        extrapolate: bool = False,
        generator: str | Generator | None = "auto",
        sources: Sequence[Source | str | os.PathLike[str]] | None = None,
        store: str | os.PathLike[str] | None = None,
        made_by: str | None = None,
        patch_size: Sequence[int] | int | None = None,
        representation: Representation = "image",
        units: Literal["normalised", "natural"] = "normalised",
        transform: Transform | None = None,
        dtype: Literal["float32", "float16", "uint8"] = "float32",
        meta_tensor: bool = False,
        heal: bool = True,
        seed: int = 0,
    ) -> None:
        if not isinstance(manifest, Manifest):
            manifest = Manifest.open(manifest)
        self.manifest = manifest.select(
            split=split, age_range=age_range, age_years=age_years, sex=sex,
            ventricular_range=ventricular_range, ventricular_mm3=ventricular_mm3,
            brain_range=brain_range, brain_mm3=brain_mm3, where=where, ids=ids, limit=limit,
            extrapolate=extrapolate,
        )  # fmt: skip
        _one_of("representation", representation, tuple(NOUNS))
        _one_of("units", units, ("normalised", "natural"))
        _one_of("dtype", dtype, tuple(_DTYPES))
        if representation == "latent":
            _refuse_for_latents(dtype, patch_size, meta_tensor)
        elif dtype == "uint8" and self.manifest.header.geometry.dtype != "uint8":
            raise UsageError(
                f"dtype must be 'float16' or 'float32' for {self.manifest.name}, whose volumes are "
                f"not stored as bytes; found {dtype!r}"
            )
        if isinstance(sources, (str, os.PathLike)):
            raise UsageError(f"sources must be a list of sources and folders, found {sources!r}")
        if isinstance(generator, str):
            generator = _named(generator, self.manifest)
        if generator is None and made_by is None:
            made_by = packed_by(self.manifest)
        self.resolver = Resolver(
            self.manifest,
            Path(store).expanduser().absolute() if store is not None else home() / "store",
            generator,
            made_by=made_by,
            sources=quick_sources(self.manifest)
            if sources is None
            else [_as_source(source) for source in sources],
            heal=heal,
            representation=representation,
        )
        self.patch_size = _patch_size(patch_size, self.manifest.header.geometry.shape)
        self.units = units
        self.transform = transform
        self.dtype = dtype
        self.meta_tensor = meta_tensor
        self.seed = whole("seed", seed, below=2**64)
        self._covariates = _columns(self.manifest.table, units)
        # Not Python strings: counting references to them would copy every page a worker touches.
        self._ids = self.manifest.table.index.to_numpy(dtype=np.str_)
        self.epochs = Epoch()

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: int) -> Any:
        """The sample at ``index``; negative indices count from the end.

        Raises
        ------
        IndexError
            There is no such row.
        MissingVolumeError
            The volume is not stored and may not be made.
        """
        index = self._checked(index)
        return self._sample(index, self._images([index])[0])

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The samples of a batch; its missing rows are made together."""
        checked = [self._checked(index) for index in indices]
        images = self._images(checked)
        return [self._sample(i, image) for i, image in zip(checked, images, strict=True)]

    def __repr__(self) -> str:
        made_by = self.resolver.made_by
        what = f"latents, {made_by}" if self.representation == "latent" else made_by
        return f"<SynthBrainDataset of {self.manifest.name}: {len(self):,} rows, {what}>"

    @property
    def representation(self) -> Representation:
        """What samples hold under that name: ``"image"`` or ``"latent"``."""
        return self.resolver.representation

    @property
    def table(self) -> pd.DataFrame:
        """The rows: indexed by id, covariates normalised. A copy."""
        return self.manifest.table.copy()

    def plan(self) -> Plan:
        """What it would take to have every volume on disk. Changes nothing."""
        return self.resolver.plan()

    def missing(self) -> list[str]:
        """Ids of the rows that are not stored."""
        stored = self.resolver.stored()
        return self._ids[~stored].tolist()

    def fill(self, *, progress: bool = True) -> int:
        """Fetch or make every missing volume, now; safe to interrupt and to run many times.

        Parameters
        ----------
        progress
            Show a progress bar on standard error.

        Returns
        -------
        int
            How many volumes were missing.

        Raises
        ------
        MissingVolumeError
            Some volumes can neither be fetched nor made.
        StoreFullError
            There is not room for them all.
        """
        plan = self.plan()
        done = track(self.resolver.fill(plan), total=plan.missing, what="filling", show=progress)
        return sum(1 for _ in done)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Turn a batch of latents into volumes, on the generator's device.

        Parameters
        ----------
        latents
            ``(n, channel, x, y, z)``, any floating type, on any device.

        Returns
        -------
        torch.Tensor
            ``(n, 1, x, y, z)`` float32 in [0, 1], fit to train on.

        Raises
        ------
        GeneratorError
            The dataset has no generator, or one without latents.
        UsageError
            Latents of another shape.
        """
        generator = self.resolver.generator
        if not has_latents(generator):
            found = "none" if generator is None else repr(generator.name)
            raise GeneratorError(
                f"only the generator that makes latents decodes them, and this dataset's is {found}"
                "; pass generator= one that does"
            )
        expected = tuple(generator.latent_shape)
        if tuple(latents.shape[1:]) != expected:
            raise UsageError(
                f"latents must have shape (n, {', '.join(map(str, expected))}), "
                f"found {tuple(latents.shape)}"
            )
        volumes = generator.decode(latents)
        # Autograd refuses what was made in inference mode, also as the input of a network.
        return volumes.clone() if volumes.is_inference() else volumes

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch patch positions are drawn for; reaches running workers.

        A :class:`synthbrain.SynthBrainSampler` that shuffles draws this epoch next, and sets the
        dataset's to its own when it begins one: order and patches are of the same epoch.

        Parameters
        ----------
        epoch
            In [0, 2**63).

        Raises
        ------
        UsageError
            Not a whole number, or a negative one.
        """
        self.epochs.choose(whole("epoch", epoch, below=2**63))

    def sampler(self, **options: Any) -> SynthBrainSampler:
        """An order of the rows, split over ranks and exact to resume.

        Parameters
        ----------
        options
            Of :class:`synthbrain.SynthBrainSampler`: ``shuffle``, ``rank``, ``world_size``,
            ``drop_last``, ``ahead``, and ``seed``, the dataset's by default.
        """
        return SynthBrainSampler(self, **{"seed": self.seed} | options)

    def supply(self) -> Supply | None:
        """How :class:`SynthBrainSampler` has missing rows before they are asked for.

        Returns
        -------
        Supply or None
            None where no source could fetch them and no sampling service make them: a generator
            given as an object works in the process that asks for its volumes.
        """
        missing = Missing(self.resolver)
        return missing if missing.can_sample or self.resolver.sources else None

    def loader(
        self, *, device: torch.device | str | None = None, **options: Any
    ) -> DataLoader[Any]:
        """A DataLoader that carries stored values across workers and casts after collating.

        Parameters
        ----------
        device
            Move images, or latents, there before casting.
        options
            Passed to :class:`torch.utils.data.DataLoader`. Without a ``sampler`` or
            ``batch_sampler`` it gets :meth:`sampler`: rows split over the ranks of
            :mod:`torch.distributed`, missing ones made ahead, with ``shuffle`` in an order that
            seed and epoch decide.

        Returns
        -------
        DataLoader
            Batches have what those of a plain DataLoader have, and a quarter of the bytes crosses
            from the workers, or half where float16 is stored. With a ``transform`` or a
            ``collate_fn``, which need floats, nothing is gained and nothing is changed. With
            ``shuffle`` the epoch goes up by one each time it is iterated to its end;
            :meth:`set_epoch` chooses another.
        """
        if not has_order(options):
            options["sampler"] = self.sampler(shuffle=bool(options.pop("shuffle", False)))
        key, work = self.representation, (self.transform, options.get("collate_fn"))
        needs_floats = any(each is not None for each in work)
        if needs_floats or self.meta_tensor or self.dtype != "float32":
            return ConvertingLoader(self, key, operator.methodcaller("to", device), **options)
        stored = self.resolver.geometry.dtype
        cast: Callable[[torch.Tensor], torch.Tensor] = partial(as_float32, device=device)
        if stored == "uint8":
            cast = partial(as_float, device=device, scale=self.manifest.header.geometry.scale)
        return ConvertingLoader(_with_dtype(self, stored), key, cast, **options)

    def _checked(self, index: int) -> int:
        size, index = len(self), operator.index(index)
        if not -size <= index < size:
            raise IndexError(f"row {index} of a dataset with {size} rows")
        return index % size

    def _images(self, indices: list[int]) -> list[tuple[Array, Array | None]]:
        """Stored values of each row, and where its patch starts."""
        pool = _threads()
        if self.patch_size is None:
            volumes = self.resolver.volumes(indices, threads=pool)
            return [(volume, None) for volume in volumes]
        starts = [self._patch_start(index) for index in indices]
        corners = [start.tolist() for start in starts]
        patches = self.resolver.patches(indices, corners, self.patch_size, threads=pool)
        return list(zip(patches, starts, strict=True))

    def _patch_start(self, index: int) -> Array:
        assert self.patch_size is not None
        row = int(self.manifest.positions[index])
        word = (int(self.epochs) << 32 | row) % 2**64
        key = np.array([self.seed, word], np.uint64)  # a list is rounded
        draw = np.random.Philox(key=key)
        room = np.subtract(self.manifest.header.geometry.shape, self.patch_size) + 1
        return (np.random.Generator(draw).random(3) * room).astype(np.int64)

    def _sample(self, index: int, image: tuple[Array, Array | None]) -> Any:
        stored, start = image
        sample: Sample = {self.representation: self._tensor(stored, start)}
        for name in NAMES:
            sample[name] = self._covariates[name][index]
        sample["id"] = str(self._ids[index])
        sample["made_by"] = self.resolver.maker_of(index)
        if start is not None:
            sample["patch_start"] = start
        return sample if self.transform is None else self.transform(sample)

    def _tensor(self, stored: Array, start: Array | None) -> torch.Tensor:
        if self.representation == "latent":
            return torch.from_numpy(stored).to(_DTYPES[self.dtype])
        geometry = self.manifest.header.geometry
        values = (
            stored if self.dtype == "uint8" else intensities(stored, geometry, threads=_threads())
        )
        tensor = torch.from_numpy(values).to(_DTYPES[self.dtype]).unsqueeze(0)
        if not self.meta_tensor:
            return tensor
        from monai.data.meta_tensor import MetaTensor

        affine = np.array(geometry.affine)
        if start is not None:
            affine[:3, 3] += affine[:3, :3] @ start
        return MetaTensor(tensor, affine=torch.from_numpy(affine))


_pools: dict[int, ThreadPoolExecutor] = {}


def _threads() -> ThreadPoolExecutor | None:
    """This process's reading threads; none in a worker, whose siblings use the other cores."""
    if get_worker_info() is not None:
        return None
    pid = os.getpid()
    if pid not in _pools:
        _pools.clear()  # a forked child holds its parent's pool, whose threads do not exist here
        count = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
        _pools[pid] = ThreadPoolExecutor(count, thread_name_prefix="synthbrain")
    return _pools[pid]


def _with_dtype(dataset: SynthBrainDataset, dtype: str) -> SynthBrainDataset:
    import copy

    twin = copy.copy(dataset)
    twin.dtype = dtype  # type: ignore[assignment]
    return twin


def _columns(table: pd.DataFrame, units: str) -> dict[str, Array]:
    """Covariates by name, as the values samples carry."""
    columns: dict[str, Array] = {}
    for covariate in COVARIATES:
        values = table[covariate.name].to_numpy()
        if units == "natural":
            values = covariate.denormalise(values)
        columns[covariate.name] = values.astype(np.float32)
    if units == "natural":
        words = np.array(list(SEXES), dtype=object)
        columns["sex"] = words[(columns["sex"] > 0.5).astype(int)]
    return columns


def _as_source(source: Source | str | os.PathLike[str]) -> Source:
    return FolderSource(Path(source)) if isinstance(source, (str, os.PathLike)) else source


def _named(name: str, manifest: Manifest) -> Generator | None:
    """A generator by name; with ``"auto"`` none whose volumes are others than those published."""
    maker = packed_by(manifest)
    generator = load_generator(name)
    if name == "auto" and maker not in (None, identity(generator)):
        return None
    return RoutedGenerator(name, generator)


def _patch_size(size: Sequence[int] | int | None, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    if size is None:
        return None
    try:
        sizes = tuple(map(operator.index, size if isinstance(size, Iterable) else (size,) * 3))
    except TypeError:
        raise UsageError(
            f"patch_size must be three numbers from 1 to {shape}, found {size!r}"
        ) from None
    if len(sizes) != 3 or any(not 1 <= n <= full for n, full in zip(sizes, shape, strict=True)):
        raise UsageError(f"patch_size must be three numbers from 1 to {shape}, found {sizes}")
    return sizes


def _refuse_for_latents(dtype: str, patch_size: object, meta_tensor: bool) -> None:
    """What only volumes have."""
    if dtype == "uint8":
        raise UsageError("dtype must be 'float32' or 'float16' for latents, found 'uint8'")
    if patch_size is not None:
        raise UsageError(
            f"patch_size must be None for latents, found {patch_size!r}: they are decoded whole; "
            "leave it out, or ask for representation='image'"
        )
    if meta_tensor:
        raise UsageError(
            "meta_tensor must be False for latents, found True: they lie in no space; leave it "
            "out, or ask for representation='image'"
        )


def _one_of(argument: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        expected = ", ".join(map(repr, allowed))
        raise UsageError(f"{argument} must be {expected}; found {value!r}")
