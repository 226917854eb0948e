"""Where each member of a large tar lies, so that one volume costs one volume.

An index is built by walking the headers of the archive, or grows out of whatever parts of it
arrive: headers sit on 512-byte boundaries and carry a magic word and a checksum, so any stretch
of the archive tells of the members in it. It is a small Parquet file that anybody may share.
(POSIX.1-2001 ustar and pax; GNU long names.)
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from synthbrain.errors import SourceError
from synthbrain.sources.extents import Extent

log = logging.getLogger("synthbrain")

BLOCK = tarfile.BLOCKSIZE

MEMBER_LIMIT = 2**30
"""No volume takes a GB: a header that says so is damaged, or means harm."""

_MAGIC, _MAGIC_AT = b"ustar", 257
_EXTENDED = {tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE}
_LONG_NAME = tarfile.GNUTYPE_LONGNAME
_NO_MEMBER = {*_EXTENDED, tarfile.XGLTYPE, _LONG_NAME, tarfile.GNUTYPE_LONGLINK}
_REGULAR = {tarfile.REGTYPE, tarfile.AREGTYPE}
_NO_DATA = {
    tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
}  # fmt: skip
_EXTENDED_LIMIT = 2**20
_SCAN = 2**20
_KEY = b"synthbrain"

Read = Callable[[Extent], bytes]


@dataclass(frozen=True, slots=True)
class Member:
    """A file of an archive: where its bytes lie, and where the next header is."""

    path: str
    data: Extent
    next: int


def walk(read: Read, run: Extent) -> Iterator[Member]:
    """The regular files whose headers lie in a run that begins with a header.

    Parameters
    ----------
    read
        Gives any extent of the run.
    run
        Where to walk; a header that is cut off by its end is left for later.

    Raises
    ------
    SourceError
        What should be a header is none.
    """
    offset, path, size = run.offset, None, None
    while offset + BLOCK <= run.end:
        info = _header(read(Extent(offset, BLOCK)), offset)
        if info is None:
            return
        data = Extent(offset + BLOCK, info.size)
        if info.type in _NO_MEMBER:
            if info.size > _EXTENDED_LIMIT:
                raise SourceError(f"header at {offset} announces {info.size:,} bytes of names")
            if data.end > run.end:
                return
            if info.type in _EXTENDED:
                path, size = _pax(read(data), path, size)
            elif info.type == _LONG_NAME:
                path = read(data).rstrip(b"\0").decode("utf-8", "surrogateescape")
        else:
            data = Extent(data.offset, info.size if size is None else size)
            if info.type in _REGULAR:
                yield Member(path or info.name, data, _padded(data.end))
            path = size = None
        offset = _padded(data.end)


def scan(read: Read, run: Extent) -> Iterator[Member]:
    """The regular files whose headers lie in a run that begins anywhere.

    Parameters as :func:`walk`; what is no header is passed over. Where the run begins between a
    long name and its header, that member goes by the shortened name the header has.
    """
    offset = _padded(run.offset)
    while (start := _first_header(read, Extent(offset, run.end - offset))) is not None:
        offset = start + BLOCK
        try:
            for member in walk(read, Extent(start, run.end - start)):
                offset = member.next
                yield member
        except SourceError:
            continue


@dataclass
class ArchiveIndex:
    """The members of an archive that are known.

    Parameters
    ----------
    archive
        File name of the archive.
    size
        Its bytes; None while unknown.
    members
        Known members by path.
    walked
        Every header before this offset is known.
    complete
        Every header is.
    """

    archive: str
    size: int | None = None
    members: dict[str, Extent] = field(default_factory=dict)
    walked: int = 0
    complete: bool = False

    def add(self, member: Member) -> bool:
        """Take in a member, unless it cannot be one; returns whether it is new."""
        if (problem := self._problem(member.data)) is not None:
            log.warning("%s in %s %s; left out", member.path, self.archive, problem)
            return False
        if member.path in self.members:
            return False
        self.members[member.path] = member.data
        return True

    def finish(self, size: int) -> None:
        """Every header is known."""
        self.walked, self.complete, self.size = size, True, size

    def save(self, path: Path) -> None:
        """Write the index as Parquet, all of it or nothing."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        about = {"archive": self.archive, "size": self.size, "walked": self.walked,
                 "complete": self.complete}  # fmt: skip
        ordered = sorted(self.members.items(), key=lambda item: item[1])
        table = pa.table(
            {
                "path": pa.array([name for name, _ in ordered], pa.string()),
                "offset": pa.array([extent.offset for _, extent in ordered], pa.uint64()),
                "size": pa.array([extent.size for _, extent in ordered], pa.uint64()),
            }
        ).replace_schema_metadata({_KEY: json.dumps(about).encode()})
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        try:
            pq.write_table(table, scratch, compression="zstd")
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> ArchiveIndex:
        """Read an index.

        Raises
        ------
        SourceError
            It is none, or points outside its archive.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(path, columns=["path", "offset", "size"])
            about = json.loads(table.schema.metadata[_KEY])
            index = cls(about["archive"], about["size"], {}, about["walked"], about["complete"])
            columns = (table[name].to_pylist() for name in ("path", "offset", "size"))
            members = {name: Extent(at, size) for name, at, size in zip(*columns, strict=True)}
        except FileNotFoundError:
            raise SourceError(f"no index {path}; make one with `synthbrain index`") from None
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise SourceError(f"{path} is not an archive index ({reason})") from None
        for name, extent in members.items():
            if (problem := index._problem(extent)) is not None:
                raise SourceError(f"{path}: {name} {problem}; do not use this index")
        index.members = members
        return index

    def _problem(self, data: Extent) -> str | None:
        if data.offset % BLOCK:
            return f"lies at {data.offset}, not a multiple of {BLOCK}"
        if self.size is not None and data.end > self.size:
            return f"ends at {data.end:,}, outside the archive of {self.size:,} bytes"
        if not 0 <= data.size <= MEMBER_LIMIT:
            return f"claims {data.size:,} bytes, more than the {MEMBER_LIMIT:,} any volume takes"
        return None


def extend(index: ArchiveIndex, read: Read, size: int) -> Iterator[Member]:
    """Walk on from where an index ends, yielding each member as it is added.

    Parameters
    ----------
    index
        Grows; save it now and then, and it goes on from there.
    read
        Gives any extent of the archive.
    size
        Bytes of the archive.

    Raises
    ------
    SourceError
        The archive is damaged, or cut short.
    """
    index.size = size
    for member in walk(read, Extent(index.walked, size - index.walked)):
        index.add(member)
        index.walked = min(member.next, size)
        yield member
    _refuse_early_end(index, read, size)
    index.finish(size)


def _refuse_early_end(index: ArchiveIndex, read: Read, size: int) -> None:
    """What follows the last member must be nothing, directories and the zeros that end a tar."""
    offset = index.walked
    while offset + BLOCK <= size:
        info = _header(read(Extent(offset, BLOCK)), offset)
        if info is None:
            return
        offset = _padded(offset + BLOCK + info.size)
    if offset > size:
        raise SourceError(
            f"{index.archive} ends at {size:,}, inside what its header at {index.walked:,} "
            "describes: it is cut short"
        )


def _header(block: bytes, offset: int) -> tarfile.TarInfo | None:
    """A header block, or None for the zeros that end an archive."""
    if not any(block):
        return None
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise SourceError(f"no tar header at {offset:,} ({error})") from None
    if info.size < 0:
        raise SourceError(f"header at {offset:,} announces {info.size} bytes")
    if info.type in _NO_DATA:
        info.size = 0  # whatever they say
    return info


def _pax(data: bytes, path: str | None, size: int | None) -> tuple[str | None, int | None]:
    r"""Path and size out of the records ``"<length> <key>=<value>\n"``."""
    while data:
        length = data.partition(b" ")[0]
        if not length.isdigit() or not 0 < int(length) <= len(data):
            break
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if key == b"path":
            path = value.decode("utf-8", "surrogateescape")
        elif key == b"size" and value.isdigit():
            size = int(value)
        data = data[int(length) :]
    return path, size


def _first_header(read: Read, run: Extent) -> int | None:
    """Offset of the first block of a run that is a header."""
    offset = run.offset
    while offset + BLOCK <= run.end:
        data = read(Extent(offset, min(_SCAN, run.end - offset) // BLOCK * BLOCK))
        found = data.find(_MAGIC, _MAGIC_AT)
        while found != -1:
            at = found - _MAGIC_AT
            if at % BLOCK == 0 and at + BLOCK <= len(data) and _is_header(data[at : at + BLOCK]):
                return offset + at
            found = data.find(_MAGIC, found + 1)
        offset += len(data)
    return None


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _padded(offset: int) -> int:
    return -(-offset // BLOCK) * BLOCK
