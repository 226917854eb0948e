"""SynthBrainStream: a cohort straight from packs, through a cache of limited size."""

from __future__ import annotations

import logging
import operator
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthbrain.cache import Cache
from synthbrain.dataset import SynthBrainDataset
from synthbrain.errors import UsageError
from synthbrain.home import home
from synthbrain.loader import has_order
from synthbrain.manifest import Manifest
from synthbrain.rows import PUBLISHED
from synthbrain.sizes import byte_count
from synthbrain.sources.opening import SourceOptions, open_sources, quick_sources
from synthbrain.stream.fetching import Recoverable, Runs, StreamResolver
from synthbrain.stream.order import WINDOW
from synthbrain.stream.sampler import StreamSampler

if TYPE_CHECKING:
    import torch
    from torch.utils.data import DataLoader

    from generation.generator import Generator
    from synthbrain.sources.base import Source

log = logging.getLogger("synthbrain")

_AHEAD = 256
"""Rows to fetch before they are asked for, where the cache has room for sixteen times as many."""


class SynthBrainStream(SynthBrainDataset):
    """Volumes and covariates of a cohort, fetched while one trains, for those without room for all.

    Samples, patches and loaders are those of :class:`synthbrain.SynthBrainDataset`. What differs
    is where volumes are kept, a cache with a limit, and the order they come in, which fetches
    neighbours of a pack together: :meth:`sampler`.

    It is a map-style dataset with a sampler, not an iterable one: the order is decided in one
    place, so a run stops and goes on anywhere, with any number of workers and ranks, and any
    loader that takes a sampler can be used.

    Parameters
    ----------
    manifest
        As of :class:`synthbrain.SynthBrainDataset`; also the address or folder of a published one.
    sources
        Where to fetch from: sources, or addresses and folders below which ``packs/`` lies. By
        default those of the manifest's header but torrents, and the packs beside the manifest
        where the header names none.
    cache
        Folder of the volumes that are here for now; ``cache/stream/`` in the package's home by
        default. Any number of processes may share it.
    cache_limit
        Bytes that the volumes of this set may take in it, or a size such as ``"20GB"``.
    window
        Over how many rows of the order those of a run are spread: see
        :func:`synthbrain.stream.stream_order`. The cache should hold twice as many.
    generator, made_by
        As of :class:`synthbrain.SynthBrainDataset`, but that nothing is sampled by default, and
        that what made the volumes is what the sources say.
    options
        All else of :class:`synthbrain.SynthBrainDataset`: which rows, ``patch_size``, ``units``,
        ``transform``, ``dtype``, ``meta_tensor``, ``heal``, ``seed``.

    Raises
    ------
    UsageError, CovariateError
        An argument makes no sense, no row satisfies them all, or there is nothing to fetch from.
    ManifestError, GeneratorError, SourceError
        The manifest, generator or source is unknown or unfit.

    Examples
    --------
    Stop after any batch, and go on there::

        stream = SynthBrainStream("hf://datasets/ORG/NAME", split="train", cache_limit="50GB")
        sampler = stream.sampler()
        if checkpoint is not None:
            sampler.load_state_dict(checkpoint)
        loader = stream.loader(batch_size=8, sampler=sampler, num_workers=4)
        for step, batch in enumerate(loader, start=1):
            ...
            checkpoint = sampler.state_dict(consumed=8 * step)
    """

    resolver: StreamResolver

    def __init__(
        self,
        manifest: str | os.PathLike[str] | Manifest = "synthbrain-100k",
        *,
        sources: Sequence[Source | str | os.PathLike[str]] | None = None,
        cache: str | os.PathLike[str] | None = None,
        cache_limit: int | str = "20GB",
        window: int = WINDOW,
        generator: str | Generator | None = None,
        made_by: str | None = None,
        **options: Any,
    ) -> None:
        _refuse(options)
        limit, self.window = byte_count(cache_limit, "cache_limit", least=1), _window(window)
        whole = manifest if isinstance(manifest, Manifest) else Manifest.open(manifest)
        opened = _sources(manifest, whole, sources)
        if not opened and generator is None:
            raise UsageError(
                f"there is nothing to stream {whole.name} from: its header names no packs; pass "
                "sources=['hf://datasets/ORG/NAME'], another address, or a folder with packs/"
            )
        if generator is None and made_by is None:
            made_by = next((s.made_by for s in opened if s.made_by != PUBLISHED), None)
        super().__init__(
            whole,
            sources=opened,
            store=home() / "cache" / "stream" if cache is None else cache,
            generator=generator,
            made_by=made_by,
            **options,
        )
        plain = self.resolver
        made = plain.made_by if plain.generator is not None else None
        self.resolver = StreamResolver(
            **{each.name: getattr(plain, each.name) for each in fields(plain) if each.init},
            cache=Cache(
                plain.folder / whole.store_key, limit, recovery=Recoverable(whole, opened, made)
            ),
        )

    def __repr__(self) -> str:
        return f"<SynthBrainStream of {self.manifest.name}: {len(self):,} rows>"

    @property
    def ahead(self) -> int:
        """How many rows of a rank are fetched before they are asked for."""
        return min(_AHEAD, self.resolver.capacity // 16)

    def sampler(self, **options: Any) -> StreamSampler:
        """The stream's order, split over ranks and exact to resume.

        Parameters
        ----------
        options
            As of :class:`synthbrain.SynthBrainSampler`: ``seed`` (the stream's by default),
            ``shuffle``, ``rank``, ``world_size``, ``drop_last``, ``ahead``.
        """
        return StreamSampler(self, **options)

    def loader(
        self, *, device: torch.device | str | None = None, **options: Any
    ) -> DataLoader[Any]:
        """A DataLoader in the stream's order, as :meth:`SynthBrainDataset.loader`.

        Parameters
        ----------
        device
            Move images there before casting.
        options
            Passed to :class:`torch.utils.data.DataLoader`. Without a ``sampler`` or
            ``batch_sampler`` it gets :meth:`sampler`; ``shuffle`` is True by default.
        """
        if not has_order(options):
            options.setdefault("shuffle", True)
        return super().loader(device=device, **options)

    def fill(self, *, progress: bool = True) -> int:
        """Refused: a stream has no room for all volumes.

        Raises
        ------
        UsageError
            Always.
        """
        raise UsageError(
            "a stream keeps no more volumes than its cache_limit; fill a SynthBrainDataset with "
            "the same arguments, or run `synthbrain pull`"
        )

    def supply(self) -> Runs | None:
        """How :class:`StreamSampler` has rows before they are asked for."""
        if not self.resolver.sources:
            return None
        capacity = self.resolver.capacity
        fits = capacity >= 2 * self.window
        if not fits and len(self) > capacity:
            log.warning(
                "a cache of %d volumes is smaller than two windows of %d rows: every volume takes "
                "a request of its own; raise cache_limit, or make window smaller",
                capacity, self.window,
            )  # fmt: skip
        return Runs(self.resolver, whole=fits and not _spans_machines())


def _refuse(options: dict[str, Any]) -> None:
    """Options of a dataset that a stream has not."""
    if "store" in options:
        raise UsageError(
            f"a stream has no store, found store={options['store']!r}; name the folder of its "
            "cache with cache=, or use SynthBrainDataset"
        )
    if options.get("representation", "image") != "image":
        raise UsageError(
            "a stream gives volumes, found representation='latent': no source has latents; use "
            "SynthBrainDataset"
        )


def _window(window: int) -> int:
    try:
        number = operator.index(window)
    except TypeError:
        number = 0
    if number < 1:
        raise UsageError(f"window must be a whole number of rows from 1, found {window!r}")
    return number


def _sources(
    manifest: str | os.PathLike[str] | Manifest,
    whole: Manifest,
    sources: Sequence[Source | str | os.PathLike[str]] | None,
) -> list[Source]:
    """Those given, those of the header, or the packs beside the manifest, of all its rows."""
    if isinstance(sources, (str, os.PathLike)):
        raise UsageError(f"sources must be a list of sources and addresses, found {sources!r}")
    if sources is not None:
        return [_opened(source, whole) for source in sources]
    if isinstance(manifest, Manifest) or whole.header.sources:
        return quick_sources(whole)
    address = os.fspath(manifest).rstrip("/")
    folder = "." if address == "manifest.json" else address.removesuffix("/manifest.json")
    beside = "://" in folder or Path(folder, "packs").is_dir()
    return [_opened(folder, whole)] if beside else []


def _opened(source: Source | str | os.PathLike[str], manifest: Manifest) -> Source:
    if not isinstance(source, (str, os.PathLike)):
        return source
    address = os.fspath(source)
    if "://" in address:
        return open_sources(manifest, SourceOptions(urls=[address], only=True))[0]
    return open_sources(manifest, SourceOptions(folders=[Path(address)], only=True))[0]


def _spans_machines() -> bool:
    """Whether ranks that torchrun started share no disk: most rows of a run are for others."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return world > int(os.environ.get("LOCAL_WORLD_SIZE", world))
