"""What a generator makes of rows, as it is stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from generation.covariates import NAMES
from generation.generator import has_latents
from synthbrain.errors import GeneratorError
from synthbrain.generators import identity
from synthbrain.quantise import Array, halves, quantise

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from generation.generator import Generator
    from synthbrain.header import Geometry, LatentGeometry
    from synthbrain.manifest import Manifest

Representation = Literal["image", "latent"]

NOUNS: dict[str, str] = {"image": "volume", "latent": "latent"}
"""Representations, and what one row's is called; its plural names the folder they are kept in."""


@dataclass(frozen=True, eq=False)
class Making:
    """A generator at work on a manifest's rows.

    Parameters
    ----------
    manifest
        The rows.
    generator
        Fits them: see :func:`check_fit`.
    geometry
        What is stored of a row.
    representation
        Whether that is volumes or latents.
    """

    manifest: Manifest
    generator: Generator
    geometry: Geometry | LatentGeometry
    representation: Representation

    def of(
        self, indices: Sequence[int], latents: Mapping[int, Array]
    ) -> Iterator[tuple[int, Array]]:
        """Yield each row's index and stored values.

        Parameters
        ----------
        indices
            Rows of the manifest.
        latents
            Those of some of these rows, from which their volumes are decoded.

        Raises
        ------
        GeneratorError
            What was made has another shape, or values that cannot be stored.
        """
        if latents:
            values = self._decoded(list(latents.values()))
            yield from map(self._stored, latents, values)
        left = [index for index in indices if index not in latents]
        if left:
            rows = self.manifest.table.iloc[left][[*NAMES, "seed"]]
            yield from map(self._stored, left, self._sampled(rows))

    def _decoded(self, latents: list[Array]) -> Array:
        import torch

        assert has_latents(self.generator)
        stored = torch.from_numpy(np.stack(latents)).to(torch.float32)
        return self._as_array(self.generator.decode(stored), len(latents))

    def _sampled(self, rows: pd.DataFrame) -> Array:
        if self.representation == "image":
            return self._as_array(self.generator.sample(rows), len(rows))
        assert has_latents(self.generator)
        return self._as_array(self.generator.sample_latents(rows), len(rows))

    def _as_array(self, made: torch.Tensor, count: int) -> Array:
        """The generator's output for ``count`` rows, ``(n, *shape)``."""
        channel = (1,) if self.representation == "image" else ()
        expected = (count, *channel, *self.geometry.shape)
        if tuple(made.shape) != expected:
            raise GeneratorError(
                f"{identity(self.generator)} gave an array of shape {tuple(made.shape)} for "
                f"{count} rows, expected {expected}; check it with "
                "synthbrain.testing.check_generator"
            )
        return made.detach().float().cpu().numpy().reshape(count, *self.geometry.shape)

    def _stored(self, index: int, values: Array) -> tuple[int, Array]:
        try:
            if self.representation == "latent":
                return index, halves(values)
            return index, quantise(values, self.manifest.header.geometry)
        except ValueError as error:
            id, noun = self.manifest.table.index[index], NOUNS[self.representation]
            raise GeneratorError(
                f"{identity(self.generator)} made a wrong {noun} of {id}: {error}"
            ) from None


def check_fit(generator: Generator, manifest: Manifest, representation: Representation) -> None:
    """Refuse a generator that cannot make a manifest's rows.

    Raises
    ------
    GeneratorError
        Its volumes have another shape, it has no latents where they are asked for, or it ignores
        covariates that the rows ask for.
    """
    shape = manifest.header.geometry.shape
    if tuple(generator.shape) != shape:
        raise GeneratorError(
            f"generator {generator.name!r} makes volumes of shape {tuple(generator.shape)}, "
            f"manifest {manifest.name!r} holds {shape}; use another generator"
        )
    if representation == "latent" and not has_latents(generator):
        raise GeneratorError(
            f"generator {generator.name!r} makes volumes without latents; use one that has "
            "sample_latents() and decode(), or representation='image'"
        )
    ignored = set(NAMES) - generator.honours
    if ignored and manifest.header.conditional:
        raise GeneratorError(
            f"generator {generator.name!r} ignores {', '.join(sorted(ignored))}, but "
            f"manifest {manifest.name!r} asks for it; use a conditional generator, or "
            "a manifest whose header says conditional: false"
        )
