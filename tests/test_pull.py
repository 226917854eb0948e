import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from released import SHAPE, release
from servers import Nginx, ObjectStore

from synthbrain import SynthBrainDataset
from synthbrain.errors import ManifestError, MissingVolumeError, StoreFullError
from synthbrain.header import ArchiveSource, Geometry
from synthbrain.manifest import Manifest
from synthbrain.pull import Pull
from synthbrain.resolver import Resolver
from synthbrain.sources.opening import SourceOptions, index_path
from synthbrain.sources.tar import ArchiveIndex
from synthbrain.testing import TinyGenerator, tiny_manifest

LARGE = Geometry(shape=(96, 96, 96), chunks=(48, 48, 48))
"""Volumes of 3 MB, so far apart that they do not share requests."""


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return release(tmp_path_factory.mktemp("released"), 40)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return release(tmp_path_factory.mktemp("large"), 30, geometry=LARGE)


@pytest.fixture
def nginx(large, tmp_path):
    with Nginx(large.tar.parent, tmp_path / "nginx").running() as running:
        yield running


def from_tar(released, **options):
    return SourceOptions(folders=[released.tar], **options)


def from_url(url, **options):
    return SourceOptions(urls=[url], **options)


def same(released, resolver, rows):
    ids = resolver.manifest.table.index
    return all(
        np.array_equal(resolver.published.read(int(row)), released.stored(ids[row])) for row in rows
    )


# Rows


def test_rows_come_out_of_the_archive_and_stay(released, home):
    pull = Pull.of(released.open(), from_tar(released))
    assert len(pull.manifest) == 40
    assert pull.manifest.header.licence.name == "CC-BY-4.0"
    assert Manifest.open("tiny-set").header.rows_digest == pull.manifest.header.rows_digest
    assert Manifest.open("tiny-set").table.equals(pull.manifest.table)


def test_rows_may_come_from_a_table_of_ones_own(released, home, tmp_path):
    from released import table

    (tmp_path / "mine.tsv").write_bytes(table(["sub-000007", "sub-000001"]))
    pull = Pull.of(released.open(), from_tar(released), table=tmp_path / "mine.tsv")
    assert pull.manifest.table.index.tolist() == ["sub-000007", "sub-000001"]
    assert sorted(pull.run()) == [0, 1]
    assert same(released, pull.resolver, [0, 1])


def test_a_table_that_would_change_nothing_is_refused(released, home, tmp_path):
    from released import table

    mine, other = tmp_path / "mine.tsv", tmp_path / "other.tsv"
    mine.write_bytes(table(["sub-000007", "sub-000001"]))
    other.write_bytes(table(["sub-000007", "sub-000002"]))
    Pull.of(released.open(), from_tar(released), table=mine)
    known = Manifest.open("tiny-set")
    assert len(Pull.of(known, from_tar(released), table=mine).chosen) == 2  # run again
    with pytest.raises(ManifestError, match=r"other.tsv holds others; .* delete .*tiny-set"):
        Pull.of(known, from_tar(released), table=other)


def test_rows_that_nobody_has_are_told_with_what_to_do(released):
    with pytest.raises(ManifestError, match="--torrent, --url or --from"):
        Pull.of(released.open())


# What is fetched


def test_a_selection_is_fetched_and_loads(released, home):
    pull = Pull.of(released.open(), from_tar(released), age_years=(50, 60))
    assert pull.plan().missing == len(pull.chosen) == 11
    done = sorted(pull.run())
    assert done == sorted(pull.rows.tolist())
    assert same(released, pull.resolver, done)
    assert pull.plan().missing == 0
    ds = SynthBrainDataset("tiny-set", age_years=(50, 60), generator=None, dtype="uint8")
    assert np.array_equal(ds[0]["image"][0].numpy(), released.stored(ds[0]["id"]))
    assert ds[0]["made_by"] == "published"


def test_a_limit_takes_what_comes_first_where_places_are_not_known(released, home):
    pull = Pull.of(released.open(), from_tar(released), limit=5)
    assert pull.count == 5
    assert len(list(pull.run())) == 5
    again = Pull.of(released.open(), from_tar(released), limit=5)
    assert again.plan().missing == 0 or again.count is None
    more = Pull.of(released.open(), from_tar(released), limit=9)
    list(more.run())
    assert int(more.resolver.stored().sum()) >= 9


def test_a_limit_takes_the_first_rows_where_places_are_known(released, home):
    list(Pull.of(released.open(), from_tar(released)).run())
    index = index_path("tiny-set")
    pull = Pull.of(released.open(), from_tar(released, index=index), store=home / "other", limit=5)
    assert pull.count is None
    assert sorted(pull.run()) == [0, 1, 2, 3, 4]


def test_a_folder_of_the_extracted_archive_is_used_in_place(released, home, tmp_path):
    import tarfile

    list(Pull.of(released.open(), from_tar(released), limit=1).run())
    with tarfile.open(released.tar) as tar:
        tar.extractall(tmp_path, filter="data")
    pull = Pull.of(Manifest.open("tiny-set"), SourceOptions(folders=[tmp_path]), store=home / "b")
    assert sorted(pull.run()) == list(range(40))
    assert same(released, pull.resolver, range(40))


def test_a_mirror_gives_what_another_source_lacks(released, home, tmp_path):
    manifest = Pull.of(released.open(), from_tar(released)).manifest
    cut = tmp_path / "SET.tar"
    data = bytearray(released.tar.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 60_000] = bytes(60_000)
    cut.write_bytes(data)
    list(Pull.of(manifest, from_tar(released), store=home / "x").run())  # the index is complete
    both = SourceOptions(folders=[cut, released.tar])
    pull = Pull.of(manifest, both, store=home / "y")
    assert sorted(pull.run()) == list(range(40))
    assert same(released, pull.resolver, range(40))


def test_what_no_source_gives_is_told_and_the_rest_is_kept(released, home, tmp_path):
    manifest = Pull.of(released.open(), from_tar(released)).manifest
    data = released.tar.read_bytes()
    (tmp_path / "SET.tar").write_bytes(data[: len(data) // 1024 * 512])
    pull = Pull.of(manifest, SourceOptions(folders=[tmp_path / "SET.tar"]), store=home / "z")
    with pytest.raises(MissingVolumeError, match="could not be fetched"):
        list(pull.run())
    kept = np.flatnonzero(pull.resolver.stored())
    assert 10 < len(kept) < 40
    assert same(released, pull.resolver, kept)


def test_a_full_disk_ends_the_pull_and_loses_nothing(released, home, small_disk):
    folder, _ = small_disk("300k")
    pull = Pull.of(released.open(), from_tar(released), store=folder)
    with pytest.raises(StoreFullError):
        list(pull.run())
    assert not list(folder.rglob("*.partial"))
    pull = Pull.of(Manifest.open("tiny-set"), from_tar(released), store=folder)
    object.__setattr__(pull, "plan", lambda: pull.resolver.plan())
    plan = pull.plan()
    roomy = type(plan)(**{**plan.__dict__, "bytes_free": 10**9})
    with pytest.raises(StoreFullError, match="no room for another volume"):
        list(pull.run(roomy))
    stored = np.flatnonzero(pull.resolver.stored())
    assert len(stored) > 0
    assert same(released, pull.resolver, stored)
    assert not list(folder.rglob("*.partial"))


# Web servers


def test_twenty_members_of_a_remote_tar_cost_twenty_ranges(large, nginx, home):
    source = f"{nginx.url}/SET.tar"
    list(Pull.of(large.open(), from_tar(large), store=home / "a").run())
    ids = sorted(large.values)[::3] + sorted(large.values)[1::3]
    nginx.forget()
    pull = Pull.of(Manifest.open("tiny-set"), from_url(source, only=True), ids=ids)
    assert pull.plan().missing == 20
    assert sorted(pull.run()) == sorted(pull.rows.tolist())
    assert same(large, pull.resolver, pull.rows)
    index = ArchiveIndex.load(index_path("tiny-set")).members
    wanted = sum(index[f"SET/rawdata/{id}/anat/{id}_T1w.nii.gz"].size for id in ids)
    answers = nginx.log
    assert all(answer["status"] == 206 for answer in answers)
    assert len(answers) <= 20
    assert sum(answer["sent"] for answer in answers) <= 1.01 * wanted + 20 * 2**10


def test_a_remote_tar_is_indexed_from_its_headers(large, nginx, home):
    url = f"{nginx.url}/SET.tar"
    pull = Pull.of(large.open(), from_url(url), ids=["sub-000003"])
    assert len(list(pull.run())) == 1
    assert same(large, pull.resolver, pull.rows)
    assert sum(answer["sent"] for answer in nginx.log) < large.tar.stat().st_size * 0.7


def test_a_signed_address_is_one_of_the_archive(large, nginx, home):
    pull = Pull.of(large.open(), from_url(f"{nginx.url}/SET.tar?X-Amz-Signature=a/b"), limit=1)
    assert len(list(pull.run())) == 1


def test_the_header_may_name_the_mirror(large, nginx, home):
    manifest = large.open()
    mirror = ArchiveSource(kind="archive", url=f"{nginx.url}/SET.tar")
    header = manifest.header.model_copy(update={"sources": {"web": mirror}})
    named = Manifest(header, manifest.table, manifest.positions)
    pull = Pull.of(named, limit=2)
    assert len(list(pull.run())) == 2
    assert "tiny-set" in str(pull.folder / pull.manifest.store_key)


def test_volumes_of_a_pack_cost_a_few_ranges(tmp_path, home):
    from synthbrain.publish.layout import build

    manifest = tiny_manifest(40)
    ds = SynthBrainDataset(manifest, generator=TinyGenerator(), sources=[], store=tmp_path / "s")
    ds.fill(progress=False)
    build(ds, tmp_path / "out", progress=False)
    with Nginx(tmp_path, tmp_path / "nginx").running() as nginx:
        published = Manifest.open(f"{nginx.url}/out")
        nginx.forget()
        options = SourceOptions(urls=[f"{nginx.url}/out"])
        pull = Pull.of(published, options, store=tmp_path / "t", limit=20)
        assert sorted(pull.run()) == list(range(20))
        assert len(nginx.log) <= 5  # size, directory, what made it, volumes
    for row in range(20):
        assert pull.resolver.path(row).read_bytes() == ds.resolver.path(row).read_bytes()


@pytest.fixture
def bucket(monkeypatch):
    pytest.importorskip("s3fs")
    import fsspec

    with ObjectStore().running() as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield store
        fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_an_object_store_serves_the_same_ranges(released, home, bucket):
    bucket.put("brains", "SET.tar", released.tar.read_bytes())
    pull = Pull.of(released.open(), from_url("s3://brains/SET.tar"), limit=6)
    done = list(pull.run())
    assert len(done) >= 6  # all that came with the first span
    assert same(released, pull.resolver, done)
    missing = Pull.of(
        Manifest.open("tiny-set"), from_url("s3://brains/other.tar"), store=home / "b"
    )
    with pytest.raises(MissingVolumeError):
        list(missing.run())


# Being killed

KILLED = """
import sys
from synthbrain.manifest import Manifest
from synthbrain.pull import Pull
from synthbrain.sources.opening import SourceOptions
name, kind, place = sys.argv[1:]
options = {
    "tar": lambda: SourceOptions(folders=[place]),
    "url": lambda: SourceOptions(urls=[place], only=True),
    "packs": lambda: SourceOptions(urls=[place], only=True),
}[kind]()
from pathlib import Path
options.__dict__["folders"] = [Path(f) for f in options.folders]
for _ in Pull.of(Manifest.open(name), options).run():
    print("one", flush=True)
print("done", flush=True)
"""


def killed_until_done(script, args, seed, *, most):
    """Run a script again and again, killed after a random while; how often it was killed."""
    rng = np.random.default_rng(seed)
    for kills in range(most):
        process = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, args)],
            stdout=subprocess.PIPE, text=True, env=dict(os.environ),
        )  # fmt: skip
        patience = rng.integers(1, 6)
        for line in process.stdout:
            patience -= 1
            if line.strip() == "done":
                assert process.wait(timeout=30) == 0
                return kills
            if patience <= 0:
                time.sleep(rng.uniform(0, 0.02))
                process.send_signal(signal.SIGKILL)
                break
        process.communicate(timeout=30)
    done = subprocess.run([sys.executable, "-c", script, *map(str, args)], timeout=100, check=True)
    assert done.returncode == 0
    return most


def published_by_somebody(released, home, tmp_path):
    """Folder of the same volumes as packs."""
    from synthbrain.publish.layout import build

    pull = Pull.of(released.open(), from_tar(released), store=tmp_path / "theirs")
    list(pull.run())
    ds = SynthBrainDataset("tiny-set", generator=None, sources=[], store=tmp_path / "theirs")
    build(ds, tmp_path / "out", progress=False)
    return tmp_path / "out"


@pytest.mark.parametrize("most", [2, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["tar", "url", "packs"])
def test_a_pull_that_is_killed_goes_on_and_shows_no_bad_volume(
    released, home, tmp_path, kind, most
):
    with Nginx(released.tar.parent, tmp_path / "nginx").running() as nginx:
        place = released.tar if kind == "tar" else f"{nginx.url}/SET.tar"
        kills = killed_until_done(
            KILLED, [released.manifest, kind, place], seed=len(kind), most=most
        )
    assert kills >= 1
    manifest = Manifest.open("tiny-set")
    resolver = Resolver(manifest, home / "store")
    assert resolver.stored().all()
    assert same(released, resolver, range(len(manifest)))
    assert not list((home / "manifests").glob(".tiny-set*/manifest.json"))


def test_planning_a_hundred_thousand_rows_is_quick_and_small(home, tmp_path, python):
    out = python(
        r"""
        import json, re, sys, time
        from pathlib import Path
        import numpy as np
        from released import header
        from synthbrain.sources.tar import ArchiveIndex
        from synthbrain.manifest import Manifest
        from synthbrain.participants import read_participants
        from synthbrain.pull import Pull
        from synthbrain.sources.extents import Extent
        from synthbrain.sources.opening import SourceOptions, index_path
        from released import MEMBER, table
        n = 100_000
        tar = Path(sys.argv[1]); tar.write_bytes(bytes(1024))
        ids = [f"sub-{i:06d}" for i in range(n)]
        rows = read_participants(table(ids), header(tar).archive.column_aliases, "x")
        manifest = Manifest.create(header(tar), rows)
        index = ArchiveIndex("SET.tar", None, {
            MEMBER.format(id=id): Extent(512 * (1 + 12_000 * i), 5_900_000)
            for i, id in enumerate(ids)}, complete=True)
        index.save(index_path("tiny-set")); manifest.save(tar.parent / "tiny-set")
        start = time.perf_counter()
        pull = Pull.of(Manifest.open(tar.parent / "tiny-set"), SourceOptions(folders=[tar]))
        plan = pull.plan()
        took = time.perf_counter() - start
        assert plan.missing == n, plan
        assert plan.bytes_to_fetch == n * 5_900_000
        peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]
        print(json.dumps([took, int(peak) / 1e6]))
        """,
        tmp_path / "SET.tar",
        PYTHONPATH=os.pathsep.join(sys.path),
    )
    seconds, gigabytes = json.loads(out)
    print(f"{seconds:.2f} s, {gigabytes:.2f} GB")
    assert gigabytes < 1.0
    assert seconds < 20  # 2 s on an idle machine; benchmarks/pull.md has the figure


def test_hashes_of_a_published_set_hold_after_a_round_trip(tmp_path, home):
    from synthbrain.publish.layout import build

    manifest = tiny_manifest(9)
    ds = SynthBrainDataset(manifest, generator=TinyGenerator(), sources=[], store=tmp_path / "s")
    ds.fill(progress=False)
    built = build(ds, tmp_path / "out", progress=False)
    published = Manifest.open(tmp_path / "out")
    pull = Pull.of(published, SourceOptions(folders=[tmp_path / "out"]), store=tmp_path / "t")
    list(pull.run())
    hashes = [hashlib.sha256(pull.resolver.path(i).read_bytes()).hexdigest() for i in range(9)]
    assert hashes == published.sha256.tolist()
    assert built.manifest.header.content_digest == published.header.content_digest


def test_the_shape_of_the_set_is_checked(released, home):
    header = released.open().header.model_copy(
        update={"geometry": SHAPE.model_copy(update={"shape": (24, 32, 48)})}
    )
    manifest = Manifest(header, released.open().table, released.open().positions)
    with pytest.raises(MissingVolumeError):
        list(Pull.of(manifest, from_tar(released), ids=["sub-000001"]).run())
