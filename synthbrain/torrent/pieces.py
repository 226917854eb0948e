"""Pieces of a torrent as they lie in a folder, sparse files and all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from synthbrain.torrent.metainfo import Metainfo


def read_piece(meta: Metainfo, folder: Path, piece: int) -> bytes | None:
    """The bytes of a piece; None where they are missing or not those of the torrent."""
    offset, size = meta.extent(piece)
    data = bytearray(size)  # padding is zeros, and lies in no file
    try:
        for file, begin, length in meta.spans(offset, size):
            start = file.offset + begin - offset
            data[start : start + length] = _read(folder / file.path, begin, length)
    except OSError:
        return None
    whole = bytes(data)
    return whole if meta.matches(piece, whole) else None


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        data = os.pread(file.fileno(), size, offset)
    if len(data) < size:
        raise OSError(f"{path} ends early")
    return data


def runs(pieces: Iterable[int]) -> list[tuple[int, int]]:
    """Piece numbers as ``(first, last + 1)``, which is far shorter to send.

    Examples
    --------
    >>> runs([5, 1, 2, 3])
    [(1, 4), (5, 6)]
    """
    found: list[tuple[int, int]] = []
    for piece in sorted(pieces):
        if found and found[-1][1] == piece:
            found[-1] = (found[-1][0], piece + 1)
        else:
            found.append((piece, piece + 1))
    return found


def numbers(found: Iterable[Iterable[int]]) -> set[int]:
    """Piece numbers of :func:`runs`."""
    return {piece for first, end in found for piece in range(first, end)}
