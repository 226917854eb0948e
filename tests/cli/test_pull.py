import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from faulty import FaultyServer
from released import release
from servers import Nginx

from synthbrain.manifest import Manifest
from synthbrain.resolver import Resolver
from synthbrain.sources.tar import ArchiveIndex


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return release(tmp_path_factory.mktemp("released"), 30)


def lines(result):
    return result.stderr.splitlines()


def test_a_dry_run_says_what_from_where_and_how_many_bytes(run, released, home):
    result = run("pull", released.manifest, "--from", released.tar, "--dry-run")
    assert result.exit_code == 0, result.output
    assert f"30 to fetch from {released.tar}" in result.stderr
    assert "to transfer" in result.stderr
    assert "free disk" in result.stderr
    assert not (home / "store").exists()


def test_pulling_ends_with_what_comes_next(run, released, home):
    result = run("pull", released.manifest, "--from", released.tar, "--sex", "female")
    assert result.exit_code == 0, result.output
    assert "licence CC-BY-4.0" in result.stderr
    assert "15 new volumes" in result.stderr
    assert lines(result)[-1].startswith("next: synthbrain export")
    again = run("pull", "tiny-set", "--from", released.tar, "--sex", "female")
    assert "15 stored" in again.stderr
    assert "0 new volumes" in again.stderr


def test_what_came_first_can_be_saved_as_a_cohort(run, released, home):
    line = ("pull", released.manifest, "--from", released.tar, "--limit", "4", "--save", "four")
    result = run(*line)
    assert result.exit_code == 0, result.output
    assert "those that come first are taken" in result.stderr
    cohort = Manifest.open("four")
    assert len(cohort) == 4
    assert Resolver(cohort, home / "store").stored().all()
    assert run("verify", "four").exit_code == 0
    run(*line[:-1], "more", "--limit", "7")
    run(*line[:-1], "two", "--limit", "2")
    assert (len(Manifest.open("more")), len(Manifest.open("two"))) == (7, 2)
    for name, why in (("two", "already exists"), ("Too Many", "cannot name a manifest")):
        refused = run(*line[:-1], name, "--limit", "30")
        assert refused.exit_code == 2
        assert why in refused.stderr
        assert "to fetch" not in refused.stderr


def next_line(result):
    """The command that comes next, as words."""
    return shlex.split(lines(result)[-1].removeprefix("next: synthbrain "))


def test_what_comes_next_works(run, released, home, tmp_path):
    line = ("pull", released.manifest, "--from", released.tar, "--store", tmp_path / "elsewhere")
    pulled = run(*line, "--age", "60y:82y")  # not the first rows
    exported = run(*next_line(pulled), "--format", "nifti")
    assert exported.exit_code == 0, exported.output
    assert len(list((tmp_path / "volumes").rglob("*.nii.gz"))) == 15
    first = run(*line, "--limit", "17")
    saved = run(*next_line(first))
    assert saved.exit_code == 0, saved.output
    assert run(*next_line(saved)).exit_code == 0


def test_an_archive_that_grew_is_searched_anew(run, released, tmp_path):
    data = released.tar.read_bytes()
    tar = tmp_path / "SET.tar"
    tar.write_bytes(data[: len(data) // 1024 * 512])
    assert run("pull", released.manifest, "--from", tar).exit_code == 2
    tar.write_bytes(data)
    result = run("pull", "tiny-set", "--from", tar)
    assert result.exit_code == 0, result.output
    assert "index of an archive of" in result.stderr
    assert "30 checked, 0 damaged" in run("verify", "tiny-set").stderr


def test_an_index_of_another_copy_is_told(run, released, tmp_path):
    run("pull", released.manifest, "--from", released.tar)
    shorter = tmp_path / "SET.tar"
    shorter.write_bytes(released.tar.read_bytes()[:-10240])
    index = tmp_path / "home" / "indexes" / "tiny-set.parquet"
    given = run("pull", "tiny-set", "--from", shorter, "--index", index, "--store", "s")
    assert given.exit_code == 2
    assert "make one of it with `synthbrain index`" in given.stderr
    with FaultyServer({"SET.tar": shorter.read_bytes()}).running() as server:
        remote = run("pull", "tiny-set", "--url", f"{server.url}/SET.tar", "--store", "s")
    assert remote.exit_code == 2
    assert f"delete {index}" in remote.stderr


def test_an_index_is_made_and_used(run, released, home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("pull", released.manifest, "--from", released.tar, "--dry-run")
    result = run("index", released.tar, "--manifest", "tiny-set")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == "SET.tar.index.parquet"
    index = ArchiveIndex.load(tmp_path / "SET.tar.index.parquet")
    assert index.complete
    assert len(index.members) == 32
    again = run("index", released.tar, "--json")
    assert json.loads(again.stdout)["files"] == 32
    line = ("pull", "tiny-set", "--from", released.tar, "--limit", "3", "--index")
    pulled = run(*line, tmp_path / "SET.tar.index.parquet")
    assert "those that come first" not in pulled.stderr
    assert "3 new volumes" in pulled.stderr


def test_an_index_of_another_archive_is_refused(run, released, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("index", released.tar)
    (tmp_path / "SET.tar").write_bytes(bytes(10240))
    result = run("index", tmp_path / "SET.tar")
    assert result.exit_code == 2
    assert "delete it, or write another with --out" in result.stderr


def test_damage_is_mended_from_a_source(run, released, home, tmp_path):
    from synthbrain.header import ArchiveSource

    with Nginx(released.tar.parent, tmp_path / "nginx").running() as nginx:
        manifest = released.open()
        mirror = ArchiveSource(kind="archive", url=f"{nginx.url}/SET.tar")
        header = manifest.header.model_copy(update={"sources": {"web": mirror}})
        folder = tmp_path / "tiny-set"
        folder.mkdir()
        (folder / "manifest.json").write_text(header.text())
        assert run("pull", folder).exit_code == 0
        resolver = Resolver(Manifest.open("tiny-set"), home / "store")
        sound = resolver.path(5).read_bytes()
        resolver.path(5).write_bytes(sound[:100] + b"x" + sound[101:])
        told = run("verify", "tiny-set")
        assert (told.exit_code, "1 damaged" in told.stderr) == (1, True)
        mended = run("verify", "tiny-set", "--repair")
        assert mended.exit_code == 0, mended.output
        assert "1 damaged, 1 of them mended" in mended.stderr
    assert resolver.path(5).read_bytes() == sound
    assert run("verify", "tiny-set").exit_code == 0


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["pull", "nowhere"], "no manifest 'nowhere'"),
        (["pull", "SET", "--from", "nowhere"], "no folder"),
        (["pull", "SET", "--url", "ftp://host/a.tar"], "expected an address of"),
        (["pull", "SET", "--peer", "localhost"], "--peer must be HOST:PORT"),
        (["pull", "SET", "--download-limit", "fast"], "a size such as 500kB"),
        (["pull", "SET", "--to", "x"], "--to is for the files of a .torrent"),
        (["pull", "SET"], "--torrent, --url or --from"),
        (["pull", "x.torrent"], "--to DIR"),
        (["pull", "x.torrent", "--to", "y", "--limit", "1"], "is fetched whole"),
        (["pull", "x.torrent", "--to", "y", "--save", "z"], "is fetched whole"),
        (["pull", "SET", "--peer", "localhost:65536"], "--peer must be HOST:PORT"),
        (["pull", "SET", "--upload-limit", "0"], "must be 1 bytes or more"),
        (["pull", "ldm-100k", "--url", "https://host/LDM_100k"], "lie in its archive"),
        (["pull", "x.torrent", "--to", "y"], "x.torrent"),
        (["pull", "SET", "--torrent", "x.torrent"], "x.torrent"),
        (["pull", "hf://nobody"], "is no address on the Hub"),
        (["pull", "https://127.0.0.1:9/set"], "gave up after"),
        (["index", "nowhere.tar"], "cannot read nowhere.tar"),
        (["seed", "nowhere.torrent", "--folder", "x"], "nowhere.torrent"),
        (["torrent", "nowhere"], "nowhere"),
        (["cite", "SET", "--format", "endnote"], "--format must be one of"),
        (["publish", "synthbrain-100k", "--limit", "2", "--hub", "a/b"], "not stored"),
        (["pack", "synthbrain-100k", "--limit", "2", "--out", "x"], "not stored"),
    ],
)
def test_an_error_is_one_line(run, released, line, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("synthbrain.sources.url.time.sleep", lambda seconds: None)
    result = run(*[str(released.manifest) if word == "SET" else word for word in line])
    assert result.exit_code == 2, result.output
    errors = [text for text in lines(result) if text.startswith("error: ")]
    assert len(errors) == 1
    assert says in errors[0]
    assert "Traceback" not in result.output


def test_an_interrupt_says_what_is_kept_and_how_to_continue(released, home):
    script = (
        "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from synthbrain.store import Store\n"
        "write = Store.write\n"
        "Store.write = lambda *a: (time.sleep(0.1), write(*a))[1]\n"
        "from synthbrain.cli import main\n"
        "main()\n"
    )
    line = ["pull", str(released.manifest), "--from", str(released.tar)]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *line], stderr=subprocess.PIPE, text=True,
        env=dict(os.environ),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(home.glob("store/*/*/volumes/*/c.*.0")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "volumes are kept in" in stderr
    assert f"to continue: synthbrain pull {released.manifest} --from {released.tar}" in stderr
    assert "Traceback" not in stderr


def test_citing(run, released):
    assert run("cite", "ldm-100k").stdout.startswith("@")
    assert "cff-version" in run("cite", "ldm-100k", "--format", "cff").stdout
    assert "2209.07162" in run("cite", "ldm-100k", "--format", "text").stdout
