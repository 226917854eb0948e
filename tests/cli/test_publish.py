import hashlib
import os
from pathlib import Path

import pytest
from local_hub import LocalHub

from synthbrain import Manifest, SynthBrainDataset
from synthbrain.testing import TinyGenerator

PULL = """
import sys
from synthbrain.cli import main
sys.argv = ["synthbrain", *sys.argv[1:]]
main()
"""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with LocalHub({}).running() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def digests(dataset):
    paths = [dataset.resolver.path(index) for index in range(len(dataset))]
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def test_what_is_published_is_pulled_elsewhere_with_the_same_digests(
    run, filled, hub, python, tmp_path
):
    result = run("publish", filled, "--hub", "org/tiny")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("hf://datasets/org/tiny@")
    other = {"SYNTHBRAIN_HOME": str(tmp_path / "other"), "HF_HOME": str(tmp_path / "hf"),
             "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    script = PULL.replace("main()\n", "try: main()\nexcept SystemExit as e: assert not e.code\n")
    python(script, "pull", "hf://datasets/org/tiny", **other)
    mine = SynthBrainDataset(filled, generator=TinyGenerator())
    os.environ["HF_HUB_CACHE"] = str(tmp_path / "hf" / "hub")
    theirs = python(
        """
        import hashlib
        from synthbrain import SynthBrainDataset
        ds = SynthBrainDataset("hf://datasets/org/tiny", generator=None)
        assert not ds.missing(), ds.missing()
        for i in range(len(ds)):
            print(hashlib.sha256(ds.resolver.path(i).read_bytes()).hexdigest())
        """,
        **other,
    ).split()
    del os.environ["HF_HUB_CACHE"]
    assert theirs == digests(mine)


def test_a_published_set_streams_without_pulling(run, filled, hub, python, tmp_path):
    run("publish", filled, "--hub", "org/tiny")
    out = python(
        """
        from synthbrain import SynthBrainDataset
        ds = SynthBrainDataset("hf://datasets/org/tiny", limit=3)  # "auto": what was published
        print(len(ds.missing()), ds[1]["made_by"], len(ds.missing()))
        """,
        SYNTHBRAIN_HOME=str(tmp_path / "other"), HF_HOME=str(tmp_path / "hf"),
    ).split()  # fmt: skip
    assert out[0] == "3"
    assert out[1].startswith("tiny-")
    assert out[2] == "2"


def test_packs_are_made_and_pulled_from_a_folder(run, filled, tmp_path):
    result = run("pack", filled, "--out", tmp_path / "packs", "--hub", "org/tiny")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "packs")
    line = ("pull", tmp_path / "packs", "--from", tmp_path / "packs", "--only")
    pulled = run(*line, "--store", tmp_path / "elsewhere")
    assert pulled.exit_code == 0, pulled.output
    assert "12 new volumes" in pulled.stderr
    assert len(Manifest.open(tmp_path / "packs").sha256) == 12


def test_a_dry_run_uploads_nothing(run, filled, hub):
    result = run("publish", filled, "--hub", "org/tiny", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "MB for org/tiny" in result.stderr
    assert hub.log == []


def test_an_unknown_licence_is_not_published(run, filled, tmp_path):
    path = filled / "manifest.json"
    path.write_text(path.read_text().replace('"status": "stated"', '"status": "unknown"'))
    result = run("pack", filled, "--out", tmp_path / "packs")
    assert result.exit_code == 2
    assert "licence" in result.stderr
    allowed = run("pack", filled, "--out", tmp_path / "packs", "--rights", "I hold the rights: me")
    assert allowed.exit_code == 0, allowed.output


def test_a_torrent_of_packs(run, filled, tmp_path):
    run("pack", filled, "--out", tmp_path / "packs")
    result = run("torrent", tmp_path / "packs", "--version", "v1", "--piece-size", "64")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "packs.torrent")
    assert "pieces of 64 KiB" in result.stderr
    assert run("torrent", tmp_path / "packs", "--version", "3").exit_code == 2


def test_a_folder_of_packs_is_uploaded_as_it_is(run, filled, hub, tmp_path):
    run("pack", filled, "--out", tmp_path / "packs")
    (tmp_path / "packs" / "notes.txt").write_text("mine")
    line = ("publish", tmp_path / "packs", "--hub", "org/tiny")
    for option in (("--limit", "1"), ("--voxels",), ("--rights", "mine"), ("--folder", "x")):
        refused = run(*line, *option)
        assert refused.exit_code == 2
        assert "is uploaded as it is" in refused.stderr
    assert hub.log == []
    assert "9 files" in run(*line, "--dry-run").stderr


def test_the_files_of_a_torrent_are_listed_once(run, filled, tmp_path, monkeypatch):
    run("pack", filled, "--out", tmp_path / "packs")
    listed, rglob = [], Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda path, *a: listed.append(path) or rglob(path, *a))
    result = run("torrent", tmp_path / "packs", "--piece-size", "16")
    assert result.exit_code == 0, result.output
    assert len(listed) <= 2, "it takes as many listings as there are pieces"
