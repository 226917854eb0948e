"""Torrent files, opened with suspicion: anybody may have written them.

Names are looked at as they stand in the file, not as a library made them harmless: a torrent that
tries to leave its folder is refused, not corrected.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

import libtorrent as lt

from synthbrain.errors import SourceError

LARGEST = 64 << 20
"""Bytes of the largest torrent file that is opened."""

_LARGEST_PIECE = 256 << 20
_LEAF = 16 << 10
_NAME_KEYS = (b"name", b"name.utf-8")
_PATH_KEYS = (b"path", b"path.utf-8")
_LIMITS = {"max_buffer_size": LARGEST, "max_pieces": 1 << 22, "max_decode_tokens": 20_000_000}


@dataclass(frozen=True)
class TorrentFile:
    """A file of a torrent: where it lies in the folder and in the run of all bytes."""

    path: str
    size: int
    offset: int


@dataclass(frozen=True)
class Metainfo:
    """What a torrent file says.

    Parameters
    ----------
    name
        Name of the only file, or of the folder of all.
    files
        In the torrent's order, without padding; paths begin with ``name``, if it is a folder.
    piece_length
        Bytes of every piece but the last.
    size
        Bytes of all pieces, padding included.
    v1, v2
        Info-hashes in hexadecimal digits, None where the torrent has none of that kind.
    web_seeds, trackers
        Their addresses.
    private
        Whether peers may be had from its trackers only.
    data
        The torrent file itself.
    """

    name: str
    files: tuple[TorrentFile, ...]
    piece_length: int
    size: int
    v1: str | None
    v2: str | None
    web_seeds: tuple[str, ...] = ()
    trackers: tuple[str, ...] = ()
    private: bool = False
    data: bytes = field(default=b"", repr=False)
    hashes: bytes = field(default=b"", repr=False)
    layers: Mapping[int, bytes] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: str | Path, info_hash: str | None = None) -> Metainfo:
        """Read a torrent file.

        Parameters
        ----------
        path
            The ``.torrent``.
        info_hash
            The v1 or v2 info-hash it must have, in hexadecimal digits.

        Raises
        ------
        SourceError
            Unreadable, too large, of another info-hash, or with names that leave its folder.
        """
        path = Path(path).expanduser()
        try:
            with path.open("rb") as file:
                data = file.read(LARGEST + 1)
        except OSError as error:
            raise SourceError(
                f"cannot read the torrent {path}: {error.strerror}; check the path"
            ) from error
        return cls.parse(data, str(path), info_hash)

    @classmethod
    def parse(cls, data: bytes, origin: str, info_hash: str | None = None) -> Metainfo:
        """Understand the bytes of a torrent file; ``origin`` names it in errors.

        Raises
        ------
        SourceError
            As :meth:`open`.
        """
        if len(data) > LARGEST:
            raise SourceError(
                f"{origin} is larger than {LARGEST >> 20} MiB, which no torrent we use is; "
                "check the path"
            )
        try:
            raw = cast("dict[bytes, Any]", lt.bdecode(data))
            _check_names(raw[b"info"])
            found = _understand(raw, load(data), data)
        except _RefusedError as error:
            raise SourceError(f"{origin} {error}; refused, get it from another place") from None
        except Exception as error:  # whatever a decoder says of bytes nobody vouches for
            raise SourceError(f"{origin} is not a torrent file ({error}); get it again") from None
        if info_hash and info_hash.lower() not in (found.v1, found.v2, (found.v2 or "")[:40]):
            raise SourceError(
                f"{origin} has info-hash {found.v1 or found.v2}, expected {info_hash.lower()}; "
                "it is another torrent than the one published"
            )
        return found

    @property
    def key(self) -> str:
        """The info-hash that names its folders: v1, or v2 where there is no v1."""
        return self.v1 or self.v2 or ""

    @property
    def count(self) -> int:
        """Pieces of the torrent."""
        return -(-self.size // self.piece_length)

    def file(self, path: str | None = None) -> TorrentFile:
        """The file of a path inside the torrent; the largest for None.

        Raises
        ------
        SourceError
            There is none of that path.
        """
        if path is None:
            return max(self.files, key=lambda file: file.size)
        names = {path, f"{self.name}/{path}"}
        for file in self.files:
            if file.path in names:
                return file
        some = ", ".join(file.path for file in self.files[:3])
        raise SourceError(f"no file {path} in torrent {self.name}, which has {some}; choose one")

    def extent(self, piece: int) -> tuple[int, int]:
        """Offset and bytes of a piece."""
        offset = piece * self.piece_length
        return offset, min(self.piece_length, self.size - offset)

    def spans(self, offset: int, size: int) -> Iterator[tuple[TorrentFile, int, int]]:
        """Where bytes of the torrent lie: ``(file, offset in the file, bytes)``, padding left out.

        Parameters
        ----------
        offset, size
            Bytes of the torrent, as :meth:`extent` gives them.
        """
        for file in self._near(offset, size):
            begin, end = max(offset, file.offset), min(offset + size, file.offset + file.size)
            if begin < end:
                yield file, begin - file.offset, end - begin

    def _near(self, offset: int, size: int) -> Iterable[TorrentFile]:
        from bisect import bisect_left, bisect_right

        first = bisect_right(self.files, offset, key=lambda file: file.offset) - 1
        last = bisect_left(self.files, offset + size, key=lambda file: file.offset)
        return self.files[max(first, 0) : last]

    def matches(self, piece: int, data: bytes) -> bool:
        """Whether bytes are those of a piece: SHA-1, or the Merkle root where there is no v1."""
        if self.v1:
            return hashlib.sha1(data).digest() == self.hashes[20 * piece : 20 * piece + 20]
        offset, size = self.extent(piece)
        (file, begin, length), *_ = self.spans(offset, size)
        root = self.layers[file.offset][begin // self.piece_length * 32 :][:32]
        leaves = self.piece_length // _LEAF
        if file.size <= self.piece_length:
            leaves = 1 << (-(-file.size // _LEAF) - 1).bit_length()
        return _merkle(data[:length], leaves) == root


def load(data: bytes) -> lt.add_torrent_params:
    """A torrent file as libtorrent takes it, at sizes beyond its own limits."""
    return lt.load_torrent_buffer(data, cast("Any", _LIMITS))


def magnet_hash(uri: str) -> str | None:
    """The info-hash a magnet link asks for, in hexadecimal digits; None if it has none.

    Raises
    ------
    SourceError
        Not a magnet link that can be understood.
    """
    try:
        hashes = lt.parse_magnet_uri(uri).info_hashes
    except RuntimeError as error:
        raise SourceError(f"{uri[:80]!r} is not a magnet link ({error}); check it") from None
    return str(hashes.v1) if hashes.has_v1() else str(hashes.v2)


def is_magnet(torrent: str | Path) -> bool:
    """Whether it is a magnet link rather than a path."""
    return str(torrent).startswith("magnet:")


def magnet_name(uri: str) -> str:
    """What a magnet link calls itself."""
    return parse_qs(urlsplit(uri).query).get("dn", ["(magnet link)"])[0]


class _RefusedError(Exception):
    """What is wrong with a torrent, in words that follow its name."""


def _check_names(info: Mapping[bytes, Any]) -> None:
    if not 0 < info[b"piece length"] <= _LARGEST_PIECE:
        raise _RefusedError(f"has pieces of {info[b'piece length']} bytes")
    for key in _NAME_KEYS:
        if key in info:
            _check_part(info[key])
    for entry in info.get(b"files", ()):
        _check_attributes(entry)
        for key in _PATH_KEYS:
            _check_path(entry, key)
    _check_attributes(info)
    _check_tree(info.get(b"file tree", {}))


def _check_path(entry: Mapping[bytes, Any], key: bytes) -> None:
    if key not in entry:
        return
    if not entry[key]:
        raise _RefusedError("has a file without a name")
    for part in entry[key]:
        _check_part(part)


def _check_tree(tree: Mapping[bytes, Any]) -> None:
    """Names of a v2 torrent; iterative, for a tree may be deeper than Python's stack."""
    waiting = [tree]
    while waiting:
        for part, below in waiting.pop().items():
            if part == b"":
                _check_attributes(below)
                continue
            _check_part(part)
            waiting.append(below)


def _check_part(part: bytes) -> None:
    name = part.decode(errors="replace")
    bad = not name or name in (".", "..") or any(c in name for c in "/\\\0\n\r")
    if bad or "\ufffd" in name or not name.isprintable():
        raise _RefusedError(f"has a file named {name[:80]!r}")


def _check_attributes(entry: Mapping[bytes, Any]) -> None:
    if b"l" in entry.get(b"attr", b"") or b"symlink path" in entry:
        raise _RefusedError("holds a symbolic link")


def _understand(raw: Mapping[bytes, Any], params: lt.add_torrent_params, data: bytes) -> Metainfo:
    info = params.ti
    assert info is not None  # every torrent file that loads has one
    storage = info.layout()
    files = tuple(
        TorrentFile(storage.file_path(i), storage.file_size(i), storage.file_offset(i))
        for i in range(storage.num_files())
        if not storage.file_flags(i) & lt.file_storage.flag_pad_file
    )
    _check_files(raw[b"info"], files)
    hashes = info.info_hashes()
    return Metainfo(
        name=info.name(),
        files=files,
        piece_length=info.piece_length(),
        size=info.total_size(),
        v1=str(hashes.v1) if hashes.has_v1() else None,
        v2=str(hashes.v2) if hashes.has_v2() else None,
        web_seeds=tuple(params.url_seeds),
        trackers=tuple(params.trackers),
        private=info.priv(),
        data=data,
        hashes=raw[b"info"].get(b"pieces", b""),
        layers={} if hashes.has_v1() else dict(_layers(raw, storage)),
    )


def _check_files(info: Mapping[bytes, Any], files: tuple[TorrentFile, ...]) -> None:
    """The library names files as the torrent does, each differently, none as another's folder."""
    if not files or not any(file.size for file in files):
        raise _RefusedError("has no files")
    paths = [file.path for file in files]
    named = set(_named(info))
    if len(set(paths)) < len(paths) or len(named) < len(paths) or not named.issuperset(paths):
        raise _RefusedError("has several files of the same path, or of names not allowed here")
    folders = {str(parent) for path in paths for parent in Path(path).parents}
    if not folders.isdisjoint(paths):
        raise _RefusedError("has a file that is a folder as well")


def _named(info: Mapping[bytes, Any]) -> Iterator[str]:
    """Paths of all files as written in the torrent."""
    name = info.get(b"name.utf-8", info.get(b"name", b"")).decode()
    if b"files" in info:
        for entry in info[b"files"]:
            parts = entry.get(b"path.utf-8", entry.get(b"path", ()))
            yield "/".join([name, *(part.decode() for part in parts)])
    elif b"file tree" in info:
        single = set(info[b"file tree"]) == {name.encode()}
        yield from _leaves(info[b"file tree"], "" if single else name + "/")
    else:
        yield name


def _leaves(tree: Mapping[bytes, Any], prefix: str) -> Iterator[str]:
    waiting = [(prefix, tree)]
    while waiting:
        above, branch = waiting.pop()
        for part, below in branch.items():
            if b"" in below:
                yield above + part.decode()
            else:
                waiting.append((f"{above}{part.decode()}/", below))


def _layers(raw: Mapping[bytes, Any], storage: lt.file_storage) -> Iterator[tuple[int, bytes]]:
    """Merkle roots of the pieces of each file, by the file's offset."""
    layers = raw.get(b"piece layers", {})
    for i in range(storage.num_files()):
        root = storage.root(i).to_bytes()
        yield storage.file_offset(i), layers.get(root, root)


def _merkle(data: bytes, leaves: int) -> bytes:
    """Root of the tree over 16 KiB leaves, filled up with zeros (BEP 52)."""
    level = [
        hashlib.sha256(data[begin : begin + _LEAF]).digest() for begin in range(0, len(data), _LEAF)
    ]
    level += [bytes(32)] * (leaves - len(level))
    while len(level) > 1:
        pairs = zip(level[::2], level[1::2], strict=True)
        level = [hashlib.sha256(left + right).digest() for left, right in pairs]
    return level[0]
