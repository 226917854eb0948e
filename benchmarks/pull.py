"""What it costs to have 20 of 300 volumes out of an archive of the released layout and size.

``python benchmarks/pull.py --out benchmarks/pull.md`` takes about 4 minutes on two cores and
8 GB in the temporary folder. nginx and aria2c must be installed; nothing leaves this machine.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import libtorrent as lt
import nibabel
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/helpers"))
import peers
from released import MEMBER, TABLE, add, header, table
from servers import Nginx

from generation.phantom import PhantomGenerator
from synthbrain import draw_cohort
from synthbrain.header import Geometry
from synthbrain.home import home
from synthbrain.manifest import Manifest
from synthbrain.pull import Pull
from synthbrain.sources.opening import SourceOptions, index_path
from synthbrain.torrent.make import make_torrent

MEMBERS, WANTED, KINDS = 300, 20, 6


@dataclass
class Row:
    """A line of the table."""

    way: str
    volumes: int
    requests: str
    moved: float
    wanted: float
    seconds: float

    def text(self) -> str:
        """Itself in Markdown."""
        factor, each = self.moved / self.wanted, 1000 * self.seconds / self.volumes
        return (
            f"| {self.way} | {self.volumes} | {self.requests} | {self.moved / 1e6:,.1f} | "
            f"{factor:.2f} | {self.seconds:.1f} | {each:.0f} |"
        )


def main() -> None:
    """Measure, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        atlas = home() / "cache"
        os.environ["SYNTHBRAIN_HOME"] = str(folder / "home")
        tar = archive(folder / "seeded", atlas)
        rows = list(measure(tar, folder))
        plan = planned(folder)
    report = "\n".join([*heading(tar_bytes=rows), *[row.text() for row in rows], "", plan, ""])
    print(report)
    if options.out:
        options.out.write_text(report, encoding="utf-8")


def archive(folder: Path, atlas: Path) -> Path:
    """A tar of float32 heads with noise, as ``.nii.gz``; a few heads, each under many names."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    heads = PhantomGenerator(cache=atlas).sample(draw_cohort(KINDS, seed=1).table)[:, 0].numpy()
    packed = [gzip.compress(nifti(head, draw), 6, mtime=0) for head in heads]
    path = folder / "SET.tar"
    ids = [f"sub-{number:06d}" for number in range(MEMBERS)]
    with tarfile.open(path, "w") as tar:
        add(tar, TABLE, table(ids))
        for number in draw.permutation(MEMBERS):
            add(tar, MEMBER.format(id=ids[number]), packed[number % KINDS])
    (folder / "tiny-set").mkdir()
    (folder / "tiny-set" / "manifest.json").write_text(header(path, Geometry()).text())
    return path


def nifti(head: np.ndarray, draw: np.random.Generator) -> bytes:
    """Float32 values of 256 levels where there is a head, as a release may hold them."""
    noisy = np.clip(head + draw.normal(0, 0.01, head.shape) * (head > 0), 0, 1)
    levels = (np.round(noisy * 255) / 255).astype(np.float32)
    return nibabel.Nifti1Image(levels, np.array(Geometry().affine)).to_bytes()


def measure(tar: Path, folder: Path) -> Iterator[Row]:
    """Lines of the table, the naive one first."""
    ids = [f"sub-{number:06d}" for number in range(3, MEMBERS, MEMBERS // WANTED)][:WANTED]
    yield naive(tar, folder, ids)
    stores = iter(range(100))

    def pull(options: SourceOptions, **selection: object) -> Pull:
        name = "tiny-set" if index_path("tiny-set").exists() else tar.parent / "tiny-set"
        store = folder / f"store{next(stores)}"
        return Pull.of(Manifest.open(name), options, store=store, **selection)

    yield timed("tar on disk, no index", pull(SourceOptions(folders=[tar])), tar.stat().st_size)
    index = folder / "index.parquet"
    index.write_bytes(index_path("tiny-set").read_bytes())
    yield timed("tar on disk", pull(SourceOptions(folders=[tar]), ids=ids))
    with Nginx(tar.parent, folder / "nginx").running() as nginx:
        web = SourceOptions(urls=[f"{nginx.url}/SET.tar"], only=True)
        nginx.forget()
        row = timed("web server", pull(web, ids=ids))
        yield counted(row, nginx)
        index_path("tiny-set").unlink()
        nginx.forget()
        row = timed("web server, no index", pull(web, ids=ids))
        yield counted(row, nginx)
    for mebibytes in (1, 4, 16):
        yield from torrents(tar, folder, index, mebibytes, pull, ids)


def torrents(
    tar: Path, folder: Path, index: Path, mebibytes: int, pull: Callable[..., Pull], ids: list[str]
) -> Iterator[Row]:
    """Lines of a torrent with pieces of some size."""
    torrent = folder / f"{mebibytes}.torrent"
    make_torrent(tar, torrent, piece_size=mebibytes << 20, version="v1")
    with peers.aria2_seed(tar.parent, torrent) as aria2:
        swarm = {"peers": [aria2.address], "private": True}
        for known in (True, False):
            scratch = folder / f"scratch{mebibytes}{known}"
            options = SourceOptions(
                torrent=str(torrent), only=True, torrent_options=swarm, scratch=scratch,
                index=index if known else None,
            )  # fmt: skip
            index_path("tiny-set").unlink(missing_ok=True)
            job = pull(options, ids=ids) if known else pull(options, limit=WANTED)
            way = f"torrent, pieces of {mebibytes} MiB" + ("" if known else ", first that come")
            row = timed(way, job)
            row.moved = peers.received(job.sources[0].bytes)
            yield row
            job.close()


def timed(way: str, job: Pull, moved: float | None = None) -> Row:
    """Run a pull."""
    started = time.perf_counter()
    done = list(job.run())
    seconds = time.perf_counter() - started
    source = job.sources[0]
    ids = job.manifest.table.index[done]
    wanted = sum(source.index.members[source.path(id)].size for id in ids)
    assert job.resolver.stored(job.rows).sum() >= min(len(done), len(job.rows))
    return Row(way, len(done), "–", wanted if moved is None else moved, wanted, seconds)


def counted(row: Row, nginx: Nginx) -> Row:
    """A line with what the server says it sent."""
    row.requests, row.moved = str(len(nginx.log)), sum(line["sent"] for line in nginx.log)
    return row


def naive(tar: Path, folder: Path, ids: list[str]) -> Row:
    """Unpack all of it and read what is wanted, as one does without this package."""
    started = time.perf_counter()
    with tarfile.open(tar) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    for id in ids:
        nibabel.load(folder / "unpacked" / MEMBER.format(id=id)).get_fdata(dtype=np.float32)
    seconds = time.perf_counter() - started
    wanted = sum((folder / "unpacked" / MEMBER.format(id=id)).stat().st_size for id in ids)
    row = Row("tarfile, nibabel", len(ids), "–", tar.stat().st_size, wanted, seconds)
    subprocess.run(["rm", "-r", str(folder / "unpacked")], check=True)
    return row


PLAN = r"""
import json, re, sys, time
from pathlib import Path
from released import MEMBER, header, table
from synthbrain.sources.tar import ArchiveIndex
from synthbrain.manifest import Manifest
from synthbrain.participants import read_participants
from synthbrain.pull import Pull
from synthbrain.sources.extents import Extent
from synthbrain.sources.opening import SourceOptions, index_path
folder, make = Path(sys.argv[1]), sys.argv[2] == "make"
tar = folder / "SET.tar"
if make:
    tar.write_bytes(bytes(1024))
    ids = [f"sub-{i:06d}" for i in range(100_000)]
    rows = read_participants(table(ids), header(tar).archive.column_aliases, "x")
    Manifest.create(header(tar), rows).save(folder / "tiny-set")
    members = {MEMBER.format(id=id): Extent(512 * (1 + 12_000 * i), 5_900_000)
               for i, id in enumerate(ids)}
    ArchiveIndex("SET.tar", None, members, complete=True).save(index_path("tiny-set"))
else:
    start = time.perf_counter()
    pull = Pull.of(Manifest.open(folder / "tiny-set"), SourceOptions(folders=[tar]))
    assert pull.plan().missing == 100_000
    took = time.perf_counter() - start
    status = Path("/proc/self/status").read_text()
    peak = re.search(r"VmHWM:\s+(\d+)", status)[1]
    print(json.dumps([took, int(peak) / 1e6]))
"""


def planned(folder: Path) -> str:
    """A sentence on planning the whole set, in a process of its own."""
    (folder / "plan").mkdir()
    helpers = str(Path(__file__).parents[1] / "tests/helpers")
    env = os.environ | {
        "SYNTHBRAIN_HOME": str(folder / "plan" / "home"),
        "PYTHONPATH": os.pathsep.join([helpers, *filter(None, sys.path)]),
    }
    for what in ("make", "plan"):
        line = [sys.executable, "-c", PLAN, str(folder / "plan"), what]
        out = subprocess.run(line, env=env, check=True, capture_output=True, text=True).stdout
    seconds, gigabytes = json.loads(out)
    return (
        f"Planning all rows of a set of 100,000 takes {seconds:.1f} s and {gigabytes:.2f} GB: "
        "opening the manifest and the index, looking at the store, pricing every member."
    )


def heading(tar_bytes: list[Row]) -> list[str]:
    """What was measured, where."""
    whole = tar_bytes[0].moved
    return [
        "# Pulling volumes out of an archive",
        "",
        f"A tar of {MEMBERS} volumes, {whole / 1e9:.2f} GB, in the layout of the released set; "
        f"{WANTED} scattered volumes into the store, checked and converted. "
        f"{os.cpu_count()} cores, Python {platform.python_version()}, libtorrent "
        f"{lt.__version__}. An index of the archive is at hand unless a line says otherwise. "
        "Torrents come from aria2c, which lets a new peer wait up to 10 s; what comes beyond the "
        "volumes asked for is kept where it holds whole ones.",
        "",
        "| from | volumes | requests | MB moved | × of theirs | s | ms a volume |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]


if __name__ == "__main__":
    main()
