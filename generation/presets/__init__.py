"""The published systems as data: architectures, noise schedules and samplers."""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

if TYPE_CHECKING:
    from torch import nn

Count = Annotated[int, Field(gt=0)]
Beta = Annotated[float, Field(gt=0, lt=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ScheduleSpec(_Strict):
    """A discrete noise schedule: ``steps`` betas from ``start`` to ``end``."""

    kind: Literal["linear", "scaled_linear"]
    start: Beta
    end: Beta
    steps: Count


class SamplerSpec(_Strict):
    """How the published code samples."""

    solver: str
    steps: int
    spacing: str


class GanNetworkSpec(_Strict):
    """Channels of one network of a GAN from its input to its output, and groups of its norms.

    The discriminator has no groups: it is normalised channel by channel.
    """

    channels: tuple[Count, ...]
    groups: Count = 8


class System(_Strict):
    """What all systems have: networks, and the grid of their volumes."""

    system: str
    reference: str
    networks: Mapping[str, Any]
    shape: tuple[int, int, int]
    affine: tuple[tuple[float, float, float, float], ...]
    """Voxel indices to mm, four rows."""

    @property
    def sampling(self) -> tuple[str, ...]:
        """Networks that sampling needs: those that are installed."""
        return tuple(self.networks)

    @abstractmethod
    def make(self, network: str) -> nn.Module:
        """The named network, new, with the parameters PyTorch's randomness gives it."""

    def build(self, network: str) -> nn.Module:
        """The named network with parameters on the meta device, to be loaded into.

        Parameters
        ----------
        network
            One of ``networks``.
        """
        import torch

        with torch.device("meta"):
            return self.make(network).eval()


class Preset(System):
    """One published diffusion system.

    ``networks`` holds the keyword arguments of MONAI's ``AutoencoderKL`` (``autoencoder``) and
    ``DiffusionModelUNet`` (``unet``); checkpoints keep those classes' key names.
    """

    system: Literal["latent", "pixel"]
    networks: dict[str, dict[str, Any]]
    schedule: ScheduleSpec
    target: Literal["epsilon", "sample", "velocity", "flow"]
    clip: tuple[float, float] | None
    sampler: SamplerSpec
    latent_shape: tuple[int, int, int, int] | None
    value_range: tuple[float, float]
    """Values of the network's output that stand for the intensities 0 and 1."""

    def make(self, network: str) -> nn.Module:
        """As in :class:`System`: ``"unet"``, or ``"autoencoder"`` for latent systems."""
        from monai.networks.nets import (  # type: ignore[attr-defined]
            AutoencoderKL,
            DiffusionModelUNet,
        )

        kind = AutoencoderKL if network == "autoencoder" else DiffusionModelUNet
        return kind(**self.networks[network])


class GanPreset(System):
    """A generative adversarial network; :mod:`generation.gan_networks` says what its networks are.

    ``networks`` has a ``generator``, a ``discriminator`` and, for a VAE-GAN, an ``encoder``.
    """

    system: Literal["gan"]
    networks: dict[str, GanNetworkSpec]
    latent: Count
    """Length of the noise a volume is made of."""
    base: tuple[Count, Count, Count]
    """Voxels the generator starts at; they double until they are ``shape``."""

    @property
    def sampling(self) -> tuple[str, ...]:
        """The generator alone."""
        return ("generator",)

    def make(self, network: str) -> nn.Module:
        """As in :class:`System`: ``"generator"``, ``"discriminator"`` or ``"encoder"``."""
        from generation.gan_networks import Discriminator, Encoder, Generator

        spec = self.networks[network]
        if network == "discriminator":
            return Discriminator(self.shape, spec.channels)
        kind = Generator if network == "generator" else Encoder
        return kind(self.latent, self.base, spec.channels, spec.groups)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, spec in self.networks.items():
            if name == "discriminator":
                self._check_discriminator(len(spec.channels))
                continue
            if name not in ("generator", "encoder"):
                raise ValueError(f"a GAN has no network {name!r}")
            factor = 2 ** (len(spec.channels) - 1)
            found = tuple(side * factor for side in self.base)
            if found != self.shape:
                raise ValueError(
                    f"{len(spec.channels)} channels of the {name} make {found} of base "
                    f"{self.base}, expected shape {self.shape}"
                )
            if any(count % spec.groups for count in spec.channels):
                raise ValueError(
                    f"channels of the {name} must be multiples of its groups, {spec.groups}; "
                    f"found {spec.channels}"
                )
        return self

    def _check_discriminator(self, layers: int) -> None:
        left = [side / 2**layers for side in self.shape]
        if layers == 0 or any(side % 1 for side in left) or math.prod(left) < 2:
            raise ValueError(
                f"{layers} layers of the discriminator halve {self.shape} to {left}, expected "
                "whole numbers, not all of them 1"
            )


AnyPreset = Preset | GanPreset

_ANY: TypeAdapter[AnyPreset] = TypeAdapter(Annotated[AnyPreset, Field(discriminator="system")])


def read_preset(fields: Any) -> AnyPreset:
    """A preset from its fields; ``system`` decides of which class.

    Raises
    ------
    ValueError
        They are not those of a preset.
    """
    return _ANY.validate_python(fields)


def load_preset(name: str) -> AnyPreset:
    """The preset of a published system, or of the embedded model: one of the files here."""
    return read_preset(json.loads(files(__name__).joinpath(f"{name}.json").read_text()))
