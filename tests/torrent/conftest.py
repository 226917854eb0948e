import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peers
import pytest

from synthbrain.sources.extents import Extent
from synthbrain.torrent.client import TorrentBytes
from synthbrain.torrent.make import make_torrent


@dataclass
class Published:
    """An archive and its members; its torrents are made when asked for."""

    folder: Path
    path: Path
    members: list[Extent]

    def torrent(self, piece, version="v1"):
        path = self.folder.parent / f"{version}-{piece}.torrent"
        if not path.exists():
            make_torrent(self.path, path, piece_size=piece, version=version)
        return path

    def bytes(self, extent):
        with self.path.open("rb") as file:
            file.seek(extent.offset)
            return file.read(extent.size)

    def check(self, pairs):
        """Every pair is an extent and its bytes; gives the extents."""
        extents = []
        for extent, data in pairs:
            assert data == self.bytes(extent)
            extents.append(extent)
        return extents


def publish(folder, members, low, high):
    """A tar of random members."""
    draw = np.random.default_rng(members)
    seeded = folder / "seeded"
    seeded.mkdir()
    path = seeded / "brains.tar"
    extents = []
    with tarfile.open(path, "w") as tar:
        for number in range(members):
            info = tarfile.TarInfo(f"brains/{number:04d}.nii.gz")
            info.size = int(draw.integers(low, high))
            extents.append(Extent(tar.offset + tarfile.BLOCKSIZE, info.size))
            tar.addfile(info, io.BytesIO(draw.bytes(info.size)))
    return Published(seeded, path, extents)


@pytest.fixture(scope="session")
def archive(tmp_path_factory):
    """300 members of 300 to 600 kB."""
    folder = tmp_path_factory.mktemp("archive")
    return publish(folder, 300, 300_000, 600_000)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """60 members, 12 MB."""
    return publish(tmp_path_factory.mktemp("small"), 60, 150_000, 250_000)


@pytest.fixture(scope="session")
def small_torrent(small):
    """v1: aria2 1.36 and Transmission 3.00 do not understand torrents with a v2 part."""
    return small.torrent(64 << 10)


@pytest.fixture(scope="session")
def small_seed(small, small_torrent):
    """Address of a peer that has all of the small archive."""
    with peers.aria2_seed(small.folder, small_torrent) as aria2:
        yield aria2.address


@pytest.fixture
def bytes_of(tmp_path):
    """Opens torrents as bytes, on loopback alone, and closes them."""
    opened = []

    def open_(torrent, **options):
        options = {"scratch": tmp_path / "scratch", "private": True, "timeout": 20} | options
        opened.append(TorrentBytes(torrent=torrent, **options))
        return opened[-1]

    yield open_
    for source in opened:
        source.close()
