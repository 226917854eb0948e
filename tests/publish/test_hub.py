import json
import os
import time

import pytest
from local_hub import LocalHub

from synthbrain import Manifest, SynthBrainDataset
from synthbrain.errors import UsageError
from synthbrain.publish import hub as uploading
from synthbrain.publish.errors import PublishError
from synthbrain.publish.hub import publish
from synthbrain.publish.layout import build
from synthbrain.testing import TinyGenerator, tiny_manifest

REPO = "datasets/org/tiny"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with LocalHub({}).running() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def sent(hub, method="PUT"):
    return [path for found, path, _ in hub.log if found == method]


def local_files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def paths(operations):
    return [item["value"]["path"] for item in operations if item["key"] != "header"]


def test_everything_arrives_and_the_manifest_comes_last(hub, folder):
    commit = publish(folder, "org/tiny", progress=False)
    assert hub.repos[REPO] == local_files(folder)
    assert commit == hub.head(REPO, "main")
    assert paths(hub.commits[-1][2]) == ["manifest.json"]
    assert all("manifest.json" not in paths(done) for *_, done in hub.commits[:-1])
    assert hub.tokens == {"Bearer hf_secret", None}  # blobs go to addresses that are keys


def test_what_is_there_is_not_sent_again(hub, folder):
    commit = publish(folder, "org/tiny", progress=False)
    before = len(sent(hub)), len(hub.commits)
    assert publish(folder, "org/tiny", progress=False) == commit
    assert (len(sent(hub)), len(hub.commits)) == before


@pytest.mark.parametrize("broken", [0, 3])
def test_an_interrupted_upload_goes_on(hub, folder, broken, monkeypatch):
    monkeypatch.setattr(uploading, "COMMIT_FILES", 2)
    wanted = local_files(folder)
    passed = iter(range(broken))
    hub.fails = lambda method, path: (
        "break" if method == "PUT" and next(passed, None) is None else None
    )
    with pytest.raises(PublishError, match=r"connection to the Hub failed .*run the same again"):
        publish(folder, "org/tiny", progress=False)
    assert "manifest.json" not in hub.repos[REPO]
    assert len(hub.blobs) == broken
    there, hub.fails = set(hub.blobs), lambda method, path: None
    hub.log.clear()
    publish(folder, "org/tiny", progress=False)
    assert hub.repos[REPO] == wanted
    assert not {path.removeprefix("/lfs/") for path in sent(hub)} & there
    assert len(sent(hub)) == len(hub.blobs) - broken


def test_a_passing_fault_is_sat_out(hub, folder):
    faults = iter([429, 503, "break", 429])
    hub.fails = lambda method, path: next(faults, None) if method == "PUT" else None
    publish(folder, "org/tiny", progress=False)
    assert hub.repos[REPO] == local_files(folder)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (401, "answered 401 for org/tiny; log in with `hf auth login`"),
        (403, "answered 403 .*write access"),
        (404, "answered 404 .*look at the name"),
        (429, "answered 429 .*slow down"),
        (500, "answered 500 .*run the same again later"),
    ],
)
def test_refusals_are_one_line(hub, folder, fault, message):
    hub.fault = fault
    with pytest.raises(PublishError, match=message) as caught:
        publish(folder, "org/tiny", progress=False)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, OSError)
    hub.fault = None
    assert publish(folder, "org/tiny", progress=False)


def test_a_token_that_may_not_upload(hub, folder):
    hub.fails = lambda method, path: 403 if "/commit/" in path or method == "PUT" else None
    with pytest.raises(PublishError, match=r"403 .*write access") as caught:
        publish(folder, "org/tiny", progress=False)
    assert "\n" not in str(caught.value)


def test_nobody_logged_in_nobody_there_and_offline(hub, folder, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PublishError, match="connection to the Hub failed"):
        publish(folder, "org/tiny", progress=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PublishError, match="HF_HUB_OFFLINE is set"):
        publish(folder, "org/tiny", progress=False)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PublishError, match=r"nobody is logged in .*HF_TOKEN"):
        publish(folder, "org/tiny", progress=False)


def test_what_cannot_be_published_is_told_first(hub, folder, tmp_path):
    with pytest.raises(UsageError, match="cannot be a repository"):
        publish(folder, "not a name", progress=False)
    pack = folder / "packs" / "block-0000.zarr.zip"
    data = pack.read_bytes()
    pack.write_bytes(data[:-1])
    with pytest.raises(UsageError, match=r"block-0000.zarr.zip is gone or not of .*build"):
        publish(folder, "org/tiny", progress=False)
    pack.write_bytes(data)
    (folder / "manifest.json").unlink()
    with pytest.raises(UsageError, match=r"holds no manifest.json.*build it"):
        publish(folder, "org/tiny", progress=False)
    assert hub.log == []


def test_only_what_belongs_to_the_set_is_sent(hub, folder):
    (folder / "notes.txt").write_text("private")
    (folder / "packs" / ".block-0000.zarr.zip.x.partial").write_bytes(b"half")
    publish(folder, "org/tiny", progress=False)
    assert {"notes.txt", "packs/.block-0000.zarr.zip.x.partial"}.isdisjoint(hub.repos[REPO])


def test_a_set_that_replaces_another_is_not_whole_meanwhile(hub, folder, dataset, tmp_path):
    hub.repos[REPO] = {}
    publish(folder, "org/tiny", progress=False)
    mine = {"docs/mine.txt": b"kept", "data/others/mine.parquet": b"kept"}
    hub.repos[REPO] |= mine
    few = SynthBrainDataset(
        dataset.manifest, limit=5, generator=TinyGenerator(), store=dataset.resolver.folder
    )
    build(few, tmp_path / "few", progress=False)
    before = len(hub.commits)
    publish(tmp_path / "few", "org/tiny", progress=False)
    first, last = hub.commits[before][2], hub.commits[-1][2]
    assert {"key": "deletedFile", "value": {"path": "manifest.json"}} in first
    deleted = [item["value"]["path"] for item in last if item["key"] == "deletedFile"]
    assert deleted
    assert all(path.startswith(("volumes/", "data/")) for path in deleted)
    assert hub.repos[REPO] == local_files(tmp_path / "few") | mine


def test_branches(hub, folder):
    publish(folder, "org/tiny", revision="v2", progress=False)
    assert hub.repos[REPO] == {}
    assert hub.branches[REPO, "v2"] == local_files(folder)


def test_another_process_finds_the_same_volumes(hub, folder, dataset, python, tmp_path):
    commit = publish(folder, "org/tiny", progress=False)
    script = """
        import hashlib, json, sys
        from pathlib import Path
        import datasets, huggingface_hub, torch
        from synthbrain import Manifest
        from synthbrain.hf import from_hf

        repo, commit = "org/tiny", sys.argv[1]
        files = [huggingface_hub.hf_hub_download(repo, name, repo_type="dataset", revision=commit)
                 for name in ("manifest.json", "rows.parquet")]
        manifest = Manifest.open(Path(files[0]).parent)
        hashes, pictures, kinds = {}, {}, {}
        for split in manifest.table["split"].unique():
            rows = datasets.load_dataset(repo, split=split, streaming=True, revision=commit)
            for row in rows:
                pictures[row["id"]] = row["image"].size
            for sample in from_hf(rows, repo=f"{repo}@{commit}", dtype="uint8"):
                data = sample["image"].numpy().tobytes()
                hashes[sample["id"]] = hashlib.sha256(data).hexdigest()
            voxels = datasets.load_dataset(repo, "volumes", split=split, streaming=True)
            for sample in from_hf(voxels, dtype="uint8"):
                assert hashes[sample["id"]] == hashlib.sha256(
                    sample["image"].numpy().tobytes()).hexdigest()
            for row in voxels.with_format("numpy"):
                assert row["volume"].shape == (16, 24, 16)
        whole = datasets.load_dataset(repo)
        rows = from_hf(whole["train"], repo=f"{repo}@{commit}", dtype="uint8")
        for batch in torch.utils.data.DataLoader(rows, batch_size=3, num_workers=2):
            for id, image in zip(batch["id"], batch["image"]):
                assert hashes[id] == hashlib.sha256(image.numpy().tobytes()).hexdigest()
        print(json.dumps([manifest.header.content_digest, hashes, pictures,
                          {k: len(v) for k, v in whole.items()}]))
    """
    env = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    env |= {"HF_ENDPOINT": hub.url, "PYTHONPATH": os.getcwd()}
    hub.log.clear()
    printed = python(script, commit, **env).splitlines()[-1]
    digest, hashes, pictures, counts = json.loads(printed)
    assert digest == Manifest.open(folder).header.content_digest
    volumes = dataset.resolver.volumes(range(12))
    import hashlib

    ids = dataset.table.index
    assert hashes == {
        id: hashlib.sha256(volume.tobytes()).hexdigest()
        for id, volume in zip(ids, volumes, strict=True)
    }
    assert set(pictures) == set(ids)
    assert sum(counts.values()) == 12
    reads = [span for _, path, span in hub.log if "packs/" in path and span]
    sizes = {path.stat().st_size for path in map(dataset.resolver.path, range(12))}
    spans = [tuple(map(int, span.removeprefix("bytes=").split("-"))) for span in reads]
    assert {end - start + 1 for start, end in spans} == sizes
    assert len(spans) == 12 + counts["train"]


def test_progress_is_shown_or_not(hub, folder, capfd):
    publish(folder, "org/tiny", progress=False)
    assert "upload" not in capfd.readouterr().err.lower()
    hub.repos[REPO].clear()
    publish(folder, "org/tiny")
    assert "uploading: 1/1" in capfd.readouterr().err


def test_a_cohort_grows_and_only_the_new_is_sent(hub, tmp_path):
    store, began = tmp_path / "store", time.monotonic()
    manifest = tiny_manifest(6)
    dataset = SynthBrainDataset(manifest, generator=TinyGenerator(), store=store)
    dataset.fill(progress=False)
    build(dataset, tmp_path / "set", progress=False)
    publish(tmp_path / "set", "org/tiny", progress=False)
    hub.log.clear()
    build(dataset, tmp_path / "set", voxels=True, progress=False)
    publish(tmp_path / "set", "org/tiny", progress=False)
    added = sorted(path.name for path in (tmp_path / "set" / "volumes").iterdir())
    assert len(sent(hub)) == len(added)
    assert time.monotonic() - began < 60
