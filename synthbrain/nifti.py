"""NIfTI files as stored values, trusting nothing they say of themselves (NIfTI-1.1)."""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from isal import igzip_lib, isal_zlib

from synthbrain.errors import SourceError
from synthbrain.quantise import quantise

if TYPE_CHECKING:
    from synthbrain.header import Affine, Archive, Geometry

_AFFINE_TOLERANCE = 1e-3
_GZIP = b"\x1f\x8b"
_KINDS = "biuf"
_WIDEST = 8
_SLACK = 2**20
"""Header and extensions."""


def read_nifti(path: Path, geometry: Geometry) -> np.ndarray[Any, np.dtype[Any]]:
    """A NIfTI file on disk as stored values; errors as :func:`decode_nifti`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    return decode_nifti(data, geometry, str(path))


def decode_nifti(
    data: bytes,
    geometry: Geometry,
    where: str,
    *,
    archive: Archive | None = None,
    any_affine: bool = False,
) -> np.ndarray[Any, np.dtype[Any]]:
    """A NIfTI file as stored values.

    Parameters
    ----------
    data
        The file, gzipped or not.
    geometry
        Shape and affine it must have.
    where
        Names the file in errors.
    archive
        What is known of the files of a published archive: other affines they may state, and the
        intensities that stand for 0 and 1.
    any_affine
        Take the voxels whatever affine the file states.

    Returns
    -------
    numpy.ndarray
        Of the geometry's shape and type.

    Raises
    ------
    SourceError
        Unreadable, of another shape, type or affine, or with values outside the range. A file
        that unpacks to more than such a volume can take is refused before it does.
    """
    import nibabel

    limit = int(np.prod(geometry.shape)) * _WIDEST + _SLACK
    try:
        plain = gunzip(data, limit) if data[:2] == _GZIP else data
        image = nibabel.Nifti1Image.from_stream(io.BytesIO(plain))
    except Exception as error:
        raise SourceError(f"cannot read {where}: {_line(error)}") from error
    if image.shape != geometry.shape:
        raise SourceError(f"{where} has shape {image.shape}, expected {geometry.shape}")
    if image.get_data_dtype().kind not in _KINDS:
        raise SourceError(f"{where} holds {image.get_data_dtype()}, expected plain numbers")
    if not any_affine:
        _check_affine(image.affine, (geometry.affine, *(archive.affines if archive else ())), where)
    try:
        values = np.asarray(image.dataobj, dtype=np.float32)
    except Exception as error:
        raise SourceError(f"cannot read {where}: {_line(error)}") from error
    low, high = archive.values if archive else (0.0, 1.0)
    if (low, high) != (0.0, 1.0):
        values = (values - np.float32(low)) / np.float32(high - low)
    try:
        return quantise(values, geometry)
    except ValueError as error:
        raise SourceError(f"{where}: {error}") from None


def gunzip(data: bytes, limit: int) -> bytes:
    """Unpack a gzip file, members one after the other, into at most ``limit`` bytes.

    Raises
    ------
    ValueError
        More than that, damaged, or cut short.
    """
    parts, room = [], limit + 1
    while data:
        stream = isal_zlib.decompressobj(zlib.MAX_WBITS | 16)
        try:
            parts.append(stream.decompress(data, room))
        except igzip_lib.IsalError as error:  # type: ignore[misc]
            raise ValueError(f"damaged gzip ({error})") from None
        room -= len(parts[-1])
        if room <= 0:
            raise ValueError(f"unpacks to more than {limit:,} bytes")
        if not stream.eof:
            raise ValueError("gzip is cut short")
        data = stream.unused_data.lstrip(b"\0")
    return b"".join(parts)


def _check_affine(found: Any, accepted: Sequence[Affine], where: str) -> None:
    if not any(np.allclose(found, affine, atol=_AFFINE_TOLERANCE) for affine in accepted):
        raise SourceError(
            f"{where} has affine {np.asarray(found).tolist()}, expected {accepted[0]}; "
            "resample it to the manifest's grid"
        )


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
