"""From raw files, sound and broken, to a manifest one can load."""

import base64
import html.parser
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import fake_unires
import nibabel
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import synthbrain
from generation.atlas import ORIGIN, template_images
from synthbrain import SynthBrainDataset
from synthbrain.cli import prepare as command
from synthbrain.errors import ManifestError, SynthBrainError, UsageError
from synthbrain.header import Geometry
from synthbrain.manifest import Manifest
from synthbrain.prepare import Preparation, read_table
from synthbrain.scans import Scan, prepare_file

SMALL = Geometry(
    shape=(80, 112, 80),
    chunks=(80, 112, 80),
    affine=((-2, 0, 0, 80), (0, 2, 0, -125), (0, 0, 2, -60), (0, 0, 0, 1)),
)
TABLE = (
    "participant_id\tage\tsex\tventricular_volume\tbrain_volume\thandedness\n"
    "sub-01\t60\tF\t40000\t1400000\tn/a\n"
    "sub-02\t70\tM\t60000\t1350000\tright\n"
    "sub-03\tn/a\tM\t60000\t1350000\tright\n"
)


@pytest.fixture(scope="module")
def head():
    """The template at 4 mm: a scan that is quick to register."""
    t1 = template_images()[0]
    shape = [n // 4 for n in t1.shape]
    small = t1[tuple(slice(n * 4) for n in shape)]
    blocks = np.ravel([[n, 4] for n in shape]).tolist()
    affine = np.diag((4.0, 4.0, 4.0, 1.0))
    affine[:3, 3] = np.add(ORIGIN, 1.5)
    return small.reshape(blocks).mean(axis=(1, 3, 5)), affine


def put(path, voxels, affine, slope=None):
    """Write a NIfTI file; with a slope, as int16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(voxels.astype(np.float32), affine)
    if slope:
        image = nibabel.Nifti1Image(np.round(voxels / slope).astype(np.int16), affine)
        image.header.set_slope_inter(slope, 0)
    nibabel.save(image, path)
    return path


@pytest.fixture(scope="module")
def raw(tmp_path_factory, head):
    """Two sound scans of a BIDS dataset, and one of everything that goes wrong."""
    voxels, affine = head
    folder = tmp_path_factory.mktemp("raw")

    def place(id):
        return folder / id.split("_")[0] / "anat" / f"{id}_T1w.nii.gz"

    put(place("sub-01_ses-1"), voxels, affine)
    put(place("sub-01_ses-2"), voxels + 1, affine, slope=0.25)
    data = put(place("sub-02"), voxels, affine).read_bytes()
    place("sub-02").write_bytes(data[: len(data) // 2])
    put(place("sub-02_run-1"), np.stack([voxels, voxels], axis=3), affine)
    put(place("sub-02_run-2"), np.zeros_like(voxels), affine)
    put(place("sub-02_run-3"), np.where(voxels > 200, np.nan, voxels), affine)
    place("sub-02_run-4").write_bytes(b"no scan at all")
    place("sub-02_run-5").write_bytes(b"")
    place("sub-02_run-6").write_bytes(data[:-8] + bytes([data[-8] ^ 1]) + data[-7:])
    put(place("sub-03"), voxels, affine)
    put(folder / "sub-01" / "anat" / "sub-01_T2w.nii.gz", voxels, affine)
    put(folder / "derivatives" / "sub-09" / "anat" / "sub-09_T1w.nii.gz", voxels, affine)
    (folder / "participants.tsv").write_text(TABLE)
    return folder


@pytest.fixture(scope="module")
def done(raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("done") / "ready"
    return out, Preparation(raw, out, geometry=SMALL).run(progress=False)


def test_sound_scans_become_volumes_of_a_manifest(done):
    out, _ = done
    manifest = Manifest.open(out / "manifest")
    assert manifest.table.index.tolist() == ["sub-01_ses-1", "sub-01_ses-2"]
    assert manifest.header.conditional
    assert set(manifest.table["origin"]) == {"published"}
    assert manifest.table["split"].nunique() == 1  # one person, one split
    dataset = SynthBrainDataset(manifest, store=out / "store", generator=None)
    image = np.asarray(dataset[0]["image"])
    assert image.shape[-3:] == SMALL.shape
    assert 0 <= image.min() < image.max() <= 1


@pytest.mark.parametrize(
    ("id", "words"),
    [
        ("sub-02", "cut short"),
        ("sub-02_run-1", "expected one volume"),
        ("sub-02_run-2", "every voxel is 0"),
        ("sub-02_run-3", "NaN"),
        ("sub-02_run-4", "cannot be read"),
        ("sub-02_run-5", "cannot be read"),
        ("sub-02_run-6", "damaged gzip"),
        ("sub-03", "no complete row"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_and_the_rest_done(done, id, words):
    reasons = {record.id: record.reason for record in done[1]}
    assert words in reasons[id]


class _Tags(html.parser.HTMLParser):
    VOID = ("meta", "img")

    def __init__(self):
        super().__init__()
        self.open, self.images = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attrs)["src"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_lists_everything_and_needs_nothing_beside_it(done):
    out, records = done
    text = (out / "report.html").read_text()
    tags = _Tags()
    tags.feed(text)
    assert tags.open == []
    assert all(f"<b>{record.id}</b>" in text for record in records)
    assert len(tags.images) == 2
    for source in tags.images:
        head, _, data = source.partition(",")
        assert head == "data:image/jpeg;base64"
        assert base64.b64decode(data)[:2] == b"\xff\xd8"
    assert not re.search(r"https?://|src=\"(?!data:)", text)
    listed = json.loads((out / "report.json").read_text())["scans"]
    assert [scan["id"] for scan in listed] == [record.id for record in records]
    assert listed[0]["measures"]["low"] < listed[0]["measures"]["high"]


def contents(out):
    """Bytes of every shard of the store, in order."""
    return [path.read_bytes() for path in sorted((out / "store").rglob("c.*"))]


def test_two_processes_give_what_one_gives(raw, done, tmp_path):
    out, records = done
    other = tmp_path / "ready"
    found = Preparation(raw, other, geometry=SMALL).run(jobs=2, progress=False)
    assert found == records
    assert contents(other) == contents(out)
    assert len(contents(other)) == 2


def test_a_second_run_does_nothing_anew(raw, done, monkeypatch):
    out, records = done
    job = Preparation(raw, out, geometry=SMALL)
    assert job.todo() == []
    monkeypatch.setattr("synthbrain.scans.prepare", None)
    assert job.run(progress=False) == records


def test_a_killed_run_goes_on(raw, done, tmp_path):
    out = tmp_path / "ready"
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[3])\n"
        "from synthbrain.header import Geometry; from synthbrain.prepare import Preparation\n"
        "small = Geometry.model_validate_json(sys.argv[4])\n"
        "Preparation(Path(sys.argv[1]), Path(sys.argv[2]), geometry=small).run()\n"
    )
    root = str(Path(synthbrain.__file__).parents[1])
    command = [sys.executable, "-c", script, raw, out, root, SMALL.model_dump_json()]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(out.glob("scans/*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("scans/*.json")}
    assert kept
    assert not (out / "report.html").exists()
    job = Preparation(raw, out, geometry=SMALL)
    assert len(job.todo()) == 9 - len(kept)
    assert job.run(progress=False) == done[1]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert contents(out) == contents(done[0])


def test_a_lost_volume_is_made_again(raw, done, tmp_path):
    out = tmp_path / "scans"
    out.mkdir()
    scan = Scan(raw / "sub-01" / "anat" / "sub-01_ses-1_T1w.nii.gz", "sub-01_ses-1")
    (record,) = [r for r in done[1] if r.id == scan.id]
    (out / f"{record.key}.json").write_text(json.dumps({"reason": "", "measures": {}}))
    assert prepare_file(out, SMALL, "", scan) == record
    assert (out / f"{record.key}.shard").exists()


def test_a_corrected_scan_replaces_its_volume(head, tmp_path):
    voxels, affine = head
    out = tmp_path / "ready"
    job = Preparation(put(tmp_path / "raw" / "a.nii.gz", voxels, affine).parent, out,
                      unconditional=True, geometry=SMALL)  # fmt: skip
    job.run(progress=False)
    (before,) = contents(out)
    put(tmp_path / "raw" / "a.nii.gz", voxels**0.8, affine)
    (record,) = job.run(progress=False)
    (after,) = contents(out)
    assert after != before
    assert after == record.kept(out / "scans", ".shard").read_bytes()
    times = [path.stat().st_mtime_ns for path in out.rglob("c.*")]
    job.run(progress=False)
    assert [path.stat().st_mtime_ns for path in out.rglob("c.*")] == times


def test_the_command_says_what_it_did(raw, done):
    app = typer.Typer()
    app.callback()(lambda: None)
    command.register(app)
    arguments = ["prepare", str(raw), str(done[0]), "--participants", str(raw / "participants.tsv")]
    said = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert said.exit_code == 0
    assert "10 scans, 9 to prepare" in said.stdout  # on another grid


def test_two_files_of_one_id_are_not_mixed_up(tmp_path):
    for name in ("one", "two"):
        (tmp_path / "raw" / name).mkdir(parents=True)
        (tmp_path / "raw" / name / "t1.nii").write_bytes(b"")
    job = Preparation(tmp_path / "raw", tmp_path / "out", unconditional=True)
    with pytest.raises(SynthBrainError, match="none of 2 scans"):
        job.run(progress=False)
    scans = json.loads((tmp_path / "out" / "report.json").read_text())["scans"]
    assert "has the id of" in scans[1]["reason"]


def test_gaps_in_columns_that_do_not_matter_do_not_matter(raw):
    assert read_table(raw / "participants.tsv").index.tolist() == ["sub-01", "sub-02"]


def test_what_cannot_be_prepared_is_refused_at_once(raw, tmp_path):
    with pytest.raises(UsageError, match="not a folder"):
        Preparation(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no \.nii"):
        Preparation(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(UsageError, match="lies inside"):
        Preparation(raw, raw / "out")
    with pytest.raises(UsageError, match="not both"):
        Preparation(raw, tmp_path / "out", raw / "participants.tsv", unconditional=True)
    with pytest.raises(UsageError, match="no table"):
        Preparation(raw, tmp_path / "out", raw / "nowhere.tsv")
    (tmp_path / "ages.tsv").write_text("participant_id\tage\nsub-01\t60\n")
    with pytest.raises(ManifestError, match="columns for sex"):
        Preparation(raw, tmp_path / "out", tmp_path / "ages.tsv")
    (tmp_path / "latin.tsv").write_bytes(TABLE.replace("right", "dr\xfcben").encode("latin-1"))
    with pytest.raises(ManifestError, match="is not UTF-8 text"):
        Preparation(raw, tmp_path / "out", tmp_path / "latin.tsv")


def test_unires_is_used_where_it_is_installed(head, tmp_path):
    raw = tmp_path / "raw"
    put(raw / "a.nii.gz", *head)
    put(raw / "b.nii.gz", head[0] * (1000 / head[0].max()), head[1])
    with fake_unires.installed(tmp_path / "packages"):
        job = Preparation(raw, tmp_path / "out", unconditional=True, geometry=SMALL)
        good, bad = job.run(progress=False)
        without = Preparation(raw, job.out, unconditional=True, geometry=SMALL, unires=False)
        assert len(without.todo()) == 2
    assert not good.reason
    assert "cannot estimate" in bad.reason
    assert Manifest.open(job.out / "manifest").header.provenance["reconstructed"] == "UniRes 0.3"


def test_unires_that_is_not_there_is_refused(raw, tmp_path):
    with pytest.raises(UsageError, match="UniRes is not installed"):
        Preparation(raw, tmp_path / "out", unires=True)
