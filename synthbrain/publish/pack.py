"""One block of a store as one file: a stored zip that opens as a Zarr array.

A pack holds ``zarr.json`` and the block's shards under their local names, uncompressed, so that a
volume is a byte range of the pack and that range is the shard file. The same shards always give
the same bytes: members are sorted by slot, and dates and permissions are fixed.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from synthbrain.errors import DamagedShardError, MissingVolumeError, StoreError
from synthbrain.files import aside
from synthbrain.sources.extents import Extent
from synthbrain.store import BLOCK, Store

METADATA = "zarr.json"

IDENTITY = ("manifest", "rows_digest", "made_by")
"""What a pack says of its making: not on which machine, so that two machines agree."""

_DATE = (1980, 1, 1, 0, 0, 0)
_MODE = 0o100644
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_MAGIC = b"PK\x03\x04"
_NAME = re.compile(r"block-(\d{4,})\.zarr\.zip")
_SHARD = re.compile(r"c\.(\d+)(\.0)+")


@dataclass(frozen=True)
class Member:
    """A volume in a pack: its position in the manifest, its bytes in the pack, and their hash."""

    position: int
    extent: Extent
    sha256: str


@dataclass(frozen=True)
class Pack:
    """A written pack.

    Parameters
    ----------
    path, size
        The file and its bytes.
    members
        Its volumes by position.
    written
        False where an identical file was there already.
    """

    path: Path
    size: int
    members: tuple[Member, ...]
    written: bool


def pack_name(block: int) -> str:
    """What the pack of a block is called.

    Examples
    --------
    >>> pack_name(42)
    'block-0042.zarr.zip'
    """
    return f"block-{block:04d}.zarr.zip"


def write_pack(
    store: Store, block: int, path: Path, *, positions: Iterable[int] | None = None
) -> Pack:
    """Write one block of a store as a pack, unless an identical one is there.

    Parameters
    ----------
    store
        Of volumes or of latents.
    block
        Its number: volumes ``1000 * block`` to ``1000 * block + 999``.
    path
        The file to write.
    positions
        Which volumes of the block; all that are stored by default.

    Returns
    -------
    Pack
        Its members, with the hash of each shard.

    Raises
    ------
    MissingVolumeError
        A volume asked for is not stored, or none is.
    DamagedShardError
        A shard does not decode; the message names its file.
    StoreError
        The pack cannot be written.
    """
    chosen = _chosen(store, block, positions)
    found = _identical(store, path, chosen)
    if found is not None:
        return found
    hashes = {}
    with aside(path) as scratch:
        with zipfile.ZipFile(scratch, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(_entry(METADATA), _metadata(store))
            for position in chosen:
                data = _sound_shard(store, position)
                hashes[position] = hashlib.sha256(data).hexdigest()
                archive.writestr(_entry(store.path(position).name), data)
        extents = _extents(scratch, block)
    return _pack(path, extents, hashes, written=True)


def pack_members(path: Path) -> dict[int, Extent]:
    """Where each volume lies in a pack, by its position, from the pack's central directory.

    Raises
    ------
    StoreError
        The file is not a pack, or its name does not tell its block.
    """
    match = _NAME.fullmatch(path.name)
    if not match:
        raise StoreError(f"{path} is not named like a pack, expected such as {pack_name(0)}")
    return _extents(path, int(match[1]))


def _extents(path: Path, block: int) -> dict[int, Extent]:
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            members = [(m, _SHARD.fullmatch(m.filename)) for m in archive.infolist()]
            return {
                block * BLOCK + int(match[1]): Extent(_data_offset(file, member), member.file_size)
                for member, match in members
                if match
            }
    except (zipfile.BadZipFile, OSError) as error:
        raise StoreError(f"{path} is not a readable pack ({error}); build it again") from error


def _data_offset(file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: its local header may be longer than its central one."""
    file.seek(member.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or not header.startswith(_MAGIC):
        raise zipfile.BadZipFile(f"no member at {member.header_offset}")
    _, name, extra = _LOCAL_HEADER.unpack(header)
    return member.header_offset + _LOCAL_HEADER.size + int(name) + int(extra)


def _chosen(store: Store, block: int, positions: Iterable[int] | None) -> list[int]:
    wanted = store.positions() if positions is None else map(int, positions)
    chosen = sorted(position for position in wanted if position // BLOCK == block)
    if not chosen:
        raise MissingVolumeError(f"block {block} of {store.root} holds no volumes to pack")
    return chosen


def _metadata(store: Store) -> bytes:
    metadata = store.metadata()
    identity = {key: store.attributes[key] for key in IDENTITY if key in store.attributes}
    metadata["attributes"] = {**store.geometry.attributes, **identity}
    return json.dumps(metadata, indent=2).encode()


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _DATE)
    entry.external_attr = _MODE << 16
    entry.create_system = 3  # Unix, wherever this runs
    return entry


def _shard(store: Store, position: int) -> bytes:
    path = store.path(position)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise MissingVolumeError(
            f"volume {position} is not in {store.root}; fill the cohort first"
        ) from None
    except OSError as error:
        raise StoreError(error.errno, f"cannot read {path}: {error.strerror}") from error


def _sound_shard(store: Store, position: int) -> bytes:
    data = _shard(store, position)
    try:
        store.layout.decode(data)
    except DamagedShardError as error:
        raise DamagedShardError(
            f"{store.path(position)} is damaged ({error}) and not packed; run `synthbrain verify` "
            "with --repair, and fill the cohort again"
        ) from error
    return data


def _identical(store: Store, path: Path, chosen: Sequence[int]) -> Pack | None:
    """The pack that is there already, if these shards would give the same file."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = [(m.filename, m.file_size, m.CRC, m.external_attr) for m in archive.infolist()]
            same_metadata = archive.read(METADATA) == _metadata(store)
    except (OSError, KeyError, zipfile.BadZipFile):
        return None
    names = [METADATA, *(store.path(position).name for position in chosen)]
    if not same_metadata or [name for name, *_ in found] != names:
        return None
    hashes = {}
    for position, (_, *described) in zip(chosen, found[1:], strict=True):
        data = _shard(store, position)
        if described != [len(data), zlib.crc32(data), _MODE << 16]:
            return None
        hashes[position] = hashlib.sha256(data).hexdigest()
    block = chosen[0] // BLOCK
    return _pack(path, _extents(path, block), hashes, written=False)


def _pack(path: Path, extents: dict[int, Extent], hashes: dict[int, str], *, written: bool) -> Pack:
    members = tuple(Member(p, extents[p], digest) for p, digest in hashes.items())
    return Pack(path, path.stat().st_size, members, written)
