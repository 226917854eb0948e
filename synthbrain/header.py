"""The header of a manifest: everything about a set of volumes except its rows."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from synthbrain.errors import ManifestError

SCHEMA_VERSION = 1

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]*$"
"""What a manifest may be called: it becomes a folder name."""

NAME_LENGTH = 80

Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=NAME_LENGTH)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


Affine = tuple[
    tuple[float, float, float, float],
    tuple[float, float, float, float],
    tuple[float, float, float, float],
    tuple[float, float, float, float],
]

SCHEMES = ("https", "http", "s3", "gs", "hf", "file")
"""Addresses a manifest may name."""


def _member(path: str, *fields: str) -> str:
    """A path inside an archive, which must not lead out of it."""
    parts = path.split("/")
    if "\\" in path or "" in parts or ".." in parts or "." in parts:
        raise ValueError("must be a relative path without '.', '..' or empty parts")
    if any(field not in path for field in fields):
        raise ValueError(f"must contain {' and '.join(fields)}")
    return path


def _address(url: str) -> str:
    scheme, found, rest = url.partition("://")
    if not found or scheme not in SCHEMES or not rest:
        raise ValueError(f"must be an address of one of {', '.join(SCHEMES)}")
    return url


Url = Annotated[str, AfterValidator(_address)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Geometry(_Strict):
    """Shape, type and place of every volume of a manifest.

    ``value = stored * scale`` and ``world = affine @ (i, j, k, 1)`` in mm. Only bytes are scaled:
    as float16, values are stored as they are.
    """

    shape: tuple[int, int, int] = (160, 224, 160)
    chunks: tuple[int, int, int] = (80, 112, 80)
    dtype: Literal["uint8", "float16"] = "uint8"
    scale: Annotated[float, Field(gt=0)] = 1 / 255
    affine: Affine = (
        (-1.0, 0.0, 0.0, 80.48149871826172),
        (0.0, 1.0, 0.0, -125.47715759277344),
        (0.0, 0.0, 1.0, -60.55375671386719),
        (0.0, 0.0, 0.0, 1.0),
    )
    orientation: str = "LAS"

    axes: ClassVar[tuple[str, ...]] = ("x", "y", "z")

    @property
    def attributes(self) -> dict[str, Any]:
        """What whoever opens a block must know to use its voxels."""
        scale = self.scale if self.dtype == "uint8" else 1.0
        return {"scale": scale, "affine": self.affine, "orientation": self.orientation}

    @model_validator(mode="after")
    def _chunks_divide(self) -> Geometry:
        if any(c < 1 or s < c or s % c for s, c in zip(self.shape, self.chunks, strict=True)):
            raise ValueError(f"chunks {self.chunks} do not divide shape {self.shape}")
        return self


@dataclass(frozen=True)
class LatentGeometry:
    """Shape and type of every latent of a generator: halves, and each latent a single chunk.

    Parameters
    ----------
    shape
        Values along channel, x, y and z; by default those of the published system.
    """

    shape: tuple[int, ...] = (3, 20, 28, 20)

    dtype: ClassVar[str] = "float16"
    axes: ClassVar[tuple[str, ...]] = ("channel", "x", "y", "z")

    @property
    def chunks(self) -> tuple[int, ...]:
        """The whole latent."""
        return self.shape

    @property
    def attributes(self) -> dict[str, Any]:
        """What whoever opens a block must know to use its values."""
        return {"representation": "latent"}


class Licence(_Strict):
    """Under what terms the volumes may be used, and how sure that is."""

    status: Literal["stated", "unknown"]
    name: str = ""
    note: str = ""


class Archive(_Strict):
    """An uncompressed tar of NIfTI files that holds the published volumes; where, sources say."""

    name: str
    """File name."""
    size: Annotated[int, Field(gt=0)]
    """Bytes, at least roughly: for plans made before any source was asked."""
    member: Annotated[str, AfterValidator(lambda path: _member(path, "{id}"))]
    """Template of a volume's path inside, with ``{id}``."""
    participants: Annotated[str, AfterValidator(lambda path: _member(path))]
    """Path of the table of covariates inside."""
    column_aliases: dict[str, tuple[str, ...]]
    """Accepted headers of that table for each column of ours."""
    values: tuple[float, float] = (0.0, 1.0)
    """Intensities that become 0 and 1."""
    affines: tuple[Affine, ...] = ()
    """What files may say instead of the manifest's affine, for the same voxels."""


class TorrentSource(_Strict):
    """The archive inside a torrent."""

    kind: Literal["torrent"]
    info_hash: Annotated[str, Field(pattern=r"^([0-9a-f]{40}|[0-9a-f]{64})$")]
    file: Annotated[str, AfterValidator(lambda path: _member(path))]
    """Path of the archive inside the torrent."""
    trackers: tuple[str, ...] = ()
    web_seeds: tuple[Url, ...] = ()


class ArchiveSource(_Strict):
    """A copy of the archive at an address that answers ranges."""

    kind: Literal["archive"]
    url: Url


class PacksSource(_Strict):
    """Packs below an address: stored zips of one block each, ``packs/block-0042.zarr.zip``.

    ``hf://datasets/ORG/NAME@REVISION`` is a dataset repository of the Hugging Face Hub.
    """

    kind: Literal["packs"]
    url: Url
    made_by: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "published"
    """What made the volumes: ``"published"``, or the identity of a generator."""


AnySource = Annotated[TorrentSource | ArchiveSource | PacksSource, Field(discriminator="kind")]


class ParentRef(_Strict):
    """The manifest a selection was taken from, and how."""

    name: Name
    rows_digest: Digest
    selection: tuple[str, ...] = ()


class Header(_Strict):
    """Header of a manifest (``manifest.json``).

    Raises
    ------
    ManifestError
        From :meth:`parse`: not JSON, written by a newer schema, or with unknown, missing or
        malformed fields; the message names the field.
    """

    schema_version: Literal[1] = 1
    name: Name
    version: str = "1"
    description: str = ""
    geometry: Geometry = Geometry()
    conditional: bool = True
    """Whether the covariates describe the volumes; false for unconditional sets."""
    rows: Annotated[int, Field(ge=0)]
    """Number of rows; 0 while they have yet to be read from a source."""
    rows_digest: Digest | None = None
    content_digest: Digest | None = None
    licence: Licence
    citations: tuple[str, ...] = ()
    archive: Archive | None = None
    sources: dict[str, AnySource] = {}
    """Where volumes can be had, the preferred first among equals."""
    parent: ParentRef | None = None
    provenance: dict[str, str] = {}
    """Free text: how the rows came to be."""

    @classmethod
    def parse(cls, text: str, where: str) -> Header:
        """Read a header strictly; ``where`` names the file in errors."""
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ManifestError(f"{where} is not valid JSON ({error}); restore the file") from None
        if not isinstance(fields, dict):
            raise ManifestError(f"{where} holds {type(fields).__name__}, expected a JSON object")
        version = fields.get("schema_version")
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise ManifestError(
                f"{where} was written with manifest schema {version}, this version reads up to "
                f"{SCHEMA_VERSION}; upgrade synthbrain"
            )
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ManifestError(f"{where}: {_first_problem(error, fields)}") from None

    def text(self) -> str:
        """The header as the JSON text of ``manifest.json``."""
        return self.model_dump_json(indent=2, exclude_defaults=False) + "\n"


def _first_problem(error: ValidationError, fields: dict[str, Any]) -> str:
    problem = error.errors(include_url=False)[0]
    place = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(place, Header.model_fields, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"unknown field {place!r}{hint}"
    if problem["type"] == "missing":
        return f"required field {place!r} is missing; found {sorted(fields)}"
    return f"field {place!r}: {problem['msg']}, found {problem['input']!r}"
