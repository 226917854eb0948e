"""What every generator is: a name, an identity, and rows in, volumes out, or latents on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeGuard, runtime_checkable

if TYPE_CHECKING:
    import pandas as pd
    import torch


@runtime_checkable
class Generator(Protocol):
    """Makes volumes from rows.

    The contract (checked by ``synthbrain.testing.check_generator``):

    - the volume of a row depends on that row alone, not on the batch it came in;
    - the same row gives the same volume up to rounding (1e-4) on any device;
    - values are finite, float32, in [0, 1]; no output is rescaled by its own minimum or maximum.

    A generator may also have ``provenance``, a mapping of text to text that says how its volumes
    come about: weights, solver, versions. Whoever wants it asks
    ``getattr(generator, "provenance", {})``.
    """

    name: str
    """Short name users type, e.g. ``"phantom"``."""

    @property
    def digest(self) -> str:
        """At least 8 hex digits that change whenever the same row would give other voxels."""
        ...

    honours: frozenset[str]
    """Names of the covariates the volumes follow."""

    shape: tuple[int, int, int]
    """Voxels of one volume, ``(x, y, z)``."""

    batch_size: int
    """How many rows it likes to be given at once."""

    @property
    def seconds_per_volume(self) -> float:
        """Rough cost on this machine, for plans and progress bars."""
        ...

    def sample(self, rows: pd.DataFrame) -> torch.Tensor:
        """Make one volume per row.

        Parameters
        ----------
        rows
            Indexed by id, with the normalised covariate columns and an integer ``seed``.

        Returns
        -------
        torch.Tensor
            ``(n, 1, x, y, z)`` float32 in [0, 1], on the generator's device.
        """
        ...


@runtime_checkable
class LatentGenerator(Generator, Protocol):
    """A generator whose volumes come out of latents, small arrays that it can also give alone.

    Beyond the contract of :class:`Generator`:

    - ``sample(rows)`` equals ``decode(sample_latents(rows))``;
    - latents are finite and fit float16, as which they are stored; decoded from there, a volume
      differs by the rounding alone, on average by less than a grey level of 255.
    """

    latent_shape: tuple[int, int, int, int]
    """Values of one latent, ``(channel, x, y, z)``."""

    def sample_latents(self, rows: pd.DataFrame) -> torch.Tensor:
        """Make one latent per row.

        Parameters
        ----------
        rows
            As for :meth:`sample`.

        Returns
        -------
        torch.Tensor
            ``(n, *latent_shape)`` float32, on the generator's device.
        """
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Turn latents into volumes, each on its own.

        Parameters
        ----------
        latents
            ``(n, *latent_shape)``, any floating type, on any device.

        Returns
        -------
        torch.Tensor
            ``(n, 1, x, y, z)`` float32 in [0, 1], on the generator's device.
        """
        ...


def has_latents(generator: object) -> TypeGuard[LatentGenerator]:
    """Whether a generator also gives latents.

    One that stands for another may have the methods all the same: then ``latent_shape`` is None.
    """
    return isinstance(generator, LatentGenerator) and generator.latent_shape is not None
