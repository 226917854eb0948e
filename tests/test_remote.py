import shutil

import pytest
from faulty import FaultyServer
from local_hub import LocalHub

from synthbrain import Manifest
from synthbrain.errors import ManifestError, SourceError
from synthbrain.header import Header, PacksSource
from synthbrain.testing import tiny_manifest


@pytest.fixture
def files(tmp_path):
    """A published manifest's two files."""
    manifest = tiny_manifest(5)
    packs = PacksSource(kind="packs", url="hf://datasets/org/tiny", made_by="tiny-01234567")
    header = manifest.header.model_copy(update={"sources": {"hub": packs}})
    folder = Manifest(header, manifest.table, manifest.positions).save(tmp_path / "tiny")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(files, tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with LocalHub({"datasets/org/tiny": files}).running() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def test_a_manifest_on_the_hub_opens_and_its_packs_are_of_the_same_commit(hub):
    manifest = Manifest.open("hf://datasets/org/tiny")
    assert len(manifest) == 5
    (source,) = manifest.header.sources.values()
    commit = hub.head("datasets/org/tiny", "main")
    assert source.url == f"hf://datasets/org/tiny@{commit}"


def test_offline_the_cache_serves(hub, monkeypatch):
    import huggingface_hub.constants as constants

    Manifest.open("hf://datasets/org/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert len(Manifest.open("hf://datasets/org/tiny")) == 5
    shutil.rmtree(constants.HF_HUB_CACHE)
    with pytest.raises(SourceError, match="not in the Hub's cache and the Hub cannot be reached"):
        Manifest.open("hf://datasets/org/tiny")


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("hf://datasets/org/other", "does not exist or is closed to you"),
        ("hf://datasets/nobody", "is no address on the Hub"),
        ("ftp://host/set", "expected an address of"),
    ],
)
def test_addresses_that_lead_nowhere_are_one_line(hub, address, says):
    with pytest.raises(SourceError, match=says) as refused:
        Manifest.open(address)
    assert "\n" not in str(refused.value)


def test_a_repository_without_a_manifest_is_told(hub):
    del hub.repos["datasets/org/tiny"]["rows.parquet"]
    with pytest.raises(SourceError, match="was not published here"):
        Manifest.open("hf://datasets/org/tiny")


def test_a_manifest_on_a_web_server_opens_and_its_rows_are_kept(files, home):
    with FaultyServer({f"set/{name}": data for name, data in files.items()}).running() as server:
        first = Manifest.open(f"{server.url}/set")
        asked = len([path for path, _ in server.log if path.endswith("rows.parquet")])
        again = Manifest.open(f"{server.url}/set/manifest.json")
        assert first.table.equals(again.table)
        after = len([path for path, _ in server.log if path.endswith("rows.parquet")])
        assert after == asked


def test_what_is_no_manifest_is_refused(home):
    with FaultyServer({"set/manifest.json": b"<html>"}).running() as server:
        with pytest.raises(ManifestError, match="not valid JSON"):
            Manifest.open(f"{server.url}/set")
        server.files["set/manifest.json"] = b""
        with pytest.raises((ManifestError, SourceError)):
            Manifest.open(f"{server.url}/set")
        with pytest.raises(SourceError, match="is not there"):
            Manifest.open(f"{server.url}/other")


def test_rows_of_another_manifest_are_refused_and_not_kept(files, home, tmp_path):
    other = tiny_manifest(7).save(tmp_path / "other")
    served = {f"set/{name}": data for name, data in files.items()}
    with FaultyServer(served).running() as server:
        for wrong in ((other / "rows.parquet").read_bytes(), b"no Parquet"):
            server.files["set/rows.parquet"] = wrong
            with pytest.raises(ManifestError, match="does not belong to its header"):
                Manifest.open(f"{server.url}/set")
        server.files["set/rows.parquet"] = files["rows.parquet"]
        assert len(Manifest.open(f"{server.url}/set")) == 5


def packed(files, **update):
    """A set's header as `synthbrain pack` writes it without --hub."""
    header = Header.parse(files["manifest.json"].decode(), "here")
    told = {"sources": {}, "provenance": {"made_by": "tiny-01234567"}} | update
    return header.model_copy(update=told).text().encode()


def test_a_set_packed_for_nowhere_has_its_packs_where_it_lies(files, hub):
    files["manifest.json"] = packed(files)
    with FaultyServer({f"set/{name}": data for name, data in files.items()}).running() as server:
        (source,) = Manifest.open(f"{server.url}/set/").header.sources.values()
        assert (source.url, source.made_by) == (f"{server.url}/set", "tiny-01234567")
    hub.repos["datasets/org/tiny"]["manifest.json"] = files["manifest.json"]
    (source,) = Manifest.open("hf://datasets/org/tiny").header.sources.values()
    assert source.url == f"hf://datasets/org/tiny@{hub.head('datasets/org/tiny', 'main')}"


def test_a_manifest_without_packs_is_given_none(files):
    for about in ({}, {"made_by": "me and my friends"}):
        files["manifest.json"] = packed(files, provenance=about)
        with FaultyServer({f"s/{name}": data for name, data in files.items()}).running() as server:
            assert Manifest.open(f"{server.url}/s").header.sources == {}


def test_packs_of_another_repository_are_not_of_this_ones_commit(files, hub):
    elsewhere = PacksSource(kind="packs", url="hf://datasets/org/first", made_by="tiny-01234567")
    copy = packed(files, sources={"hub": elsewhere})
    hub.repos["datasets/org/tiny"]["manifest.json"] = copy
    (source,) = Manifest.open("hf://datasets/org/tiny").header.sources.values()
    assert source.url == elsewhere.url
