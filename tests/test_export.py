import csv
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest

from generation.covariates import AGE, BRAIN_VOLUME, NAMES, VENTRICULAR_VOLUME
from synthbrain import FolderSource, Manifest, SynthBrainDataset
from synthbrain.cohort import recipes
from synthbrain.errors import MissingVolumeError, StoreError, UsageError
from synthbrain.export import FORMATS, Export, export_bids, export_nifti, nifti_bytes
from synthbrain.header import Geometry, Header, Licence
from synthbrain.rows import bids_label, make_table
from synthbrain.testing import TINY, TinyGenerator, tiny_manifest

VALIDATOR = Path(sys.executable).parent / "bids-validator-deno"


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def dataset(store):
    return SynthBrainDataset(tiny_manifest(6), generator=TinyGenerator(), store=store)


def with_ids(ids, store):
    columns = {name: np.full(len(ids), 0.5) for name in NAMES}
    table = recipes(columns, stem="x", seed=0)
    table.index = pd.Index(ids, name="id", dtype="str")
    header = Header(name="odd", geometry=TINY, rows=0, licence=Licence(status="unknown"))
    return SynthBrainDataset(Manifest.create(header, table), generator=TinyGenerator(), store=store)


def rows_of(folder):
    with (folder / "participants.tsv").open() as file:
        return {row["row_id"]: row for row in csv.DictReader(file, delimiter="\t")}


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def issues(folder):
    found = subprocess.run(
        [VALIDATOR, folder, "--json"], capture_output=True, text=True, check=False, timeout=120
    )
    return json.loads(found.stdout)["issues"]["issues"]


@pytest.mark.skipif(not VALIDATOR.exists(), reason="bids-validator-deno is not installed")
class TestValidator:
    def test_the_bids_validator_finds_nothing_to_say(self, dataset, tmp_path):
        export_bids(dataset, tmp_path / "bids", progress=False)
        assert issues(tmp_path / "bids") == []

    def test_nor_does_it_with_citations_extrapolated_ages_and_floats(self, tmp_path, store):
        columns = {name: np.array([0.5, 1.9]) for name in NAMES} | {"sex": np.array([0.0, 1.0])}
        header = Header(
            name="old", geometry=TINY, rows=0, citations=("Somebody et al., A paper, 2022",),
            licence=Licence(status="unknown", note="ask"),
        )  # fmt: skip
        manifest = Manifest.create(header, recipes(columns, stem="old", seed=0))
        dataset = SynthBrainDataset(manifest, generator=TinyGenerator(), store=store)
        export_bids(dataset, tmp_path / "bids", dtype="float32", progress=False)
        assert float(rows_of(tmp_path / "bids")["old000001"]["age"]) > 89
        assert issues(tmp_path / "bids") == []

    def test_it_would_have_found_something(self, dataset, tmp_path):
        export_bids(dataset, tmp_path / "bids", progress=False)
        (tmp_path / "bids" / "T1w.json").unlink()
        assert issues(tmp_path / "bids") != []

    def test_a_full_size_head_validates_too(self, tmp_path, store):
        table = recipes({n: np.array([0.5]) for n in NAMES}, stem="head", seed=0)
        header = Header(name="head", rows=0, licence=Licence(status="stated", name="CC0"))
        generator = TinyGenerator(shape=Geometry().shape)
        dataset = SynthBrainDataset(
            Manifest.create(header, table), generator=generator, store=store
        )
        export_bids(dataset, tmp_path / "bids", progress=False)
        assert issues(tmp_path / "bids") == []


@pytest.mark.parametrize("export", [export_bids, export_nifti])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_folder_source_reads_back_the_stored_bytes(dataset, tmp_path, export, dtype):
    assert export(dataset, tmp_path / "out", dtype=dtype, progress=False) == 6
    source = FolderSource(tmp_path / "out", made_by=dataset.resolver.made_by)
    ids = dataset.table.index.tolist()
    back = dict(source.fetch(ids, TINY))
    assert sorted(back) == ids
    for id, stored in zip(ids, dataset.resolver.volumes(range(6)), strict=True):
        assert np.array_equal(back[id], stored)


def test_an_export_serves_as_the_source_of_another_store(dataset, tmp_path):
    export_nifti(dataset, tmp_path / "out", progress=False)
    source = FolderSource(tmp_path / "out", made_by=dataset.resolver.made_by)
    copy = SynthBrainDataset(
        dataset.manifest, generator=None, made_by=dataset.resolver.made_by,
        sources=[source], store=tmp_path / "copy",
    )  # fmt: skip
    assert copy.fill(progress=False) == 6
    for i in range(6):
        assert np.array_equal(copy.resolver.volumes([i])[0], dataset.resolver.volumes([i])[0])


def test_headers_carry_affine_units_and_scale(dataset, tmp_path):
    export_bids(dataset, tmp_path / "out", progress=False)
    (path,) = (tmp_path / "out" / "sub-tiny000002").rglob("*.nii.gz")
    image = nibabel.load(path)
    assert np.allclose(image.affine, TINY.affine)
    for read in (image.get_sform, image.get_qform):
        affine, code = read(coded=True)
        assert np.allclose(affine, TINY.affine, atol=1e-5)
        assert code == 2
    assert image.header.get_xyzt_units()[0] == "mm"
    assert image.get_data_dtype() == np.uint8
    assert image.dataobj.slope == pytest.approx(1 / 255)
    assert np.array_equal(image.dataobj.get_unscaled(), dataset.resolver.volumes([2])[0])
    assert np.allclose(image.get_fdata(), dataset[2]["image"][0].numpy(), atol=1e-6)


def test_participants_are_exact_and_in_natural_units(dataset, tmp_path):
    export_bids(dataset, tmp_path / "out", progress=False)
    rows, table = rows_of(tmp_path / "out"), dataset.table
    assert sorted(rows) == sorted(table.index)
    for id, row in rows.items():
        truth = table.loc[id]
        assert float(row["age"]) == float(AGE.denormalise(truth["age"]))
        for covariate in (VENTRICULAR_VOLUME, BRAIN_VOLUME):
            natural = float(covariate.denormalise(truth[covariate.name]))
            assert float(row[covariate.name]) == natural
        assert row["sex"] == ("male" if truth["sex"] else "female")
        assert int(row["seed"]) == truth["seed"]
        assert row["made_by"] == "tiny-01234567"
    described = json.loads((tmp_path / "out" / "participants.json").read_text())
    assert described["age"]["Units"] == "years"
    assert set(row) - {"participant_id"} <= set(described)


def test_sidecars_say_how_a_volume_came_to_be(dataset, tmp_path):
    few = SynthBrainDataset(
        dataset.manifest, limit=2, generator=TinyGenerator(), store=dataset.resolver.folder
    )
    export_bids(few, tmp_path / "out", progress=False)
    (path,) = (tmp_path / "out" / "sub-tiny000001").rglob("*.json")
    sidecar, truth = json.loads(path.read_text()), dataset.table.loc["tiny000001"]
    assert sidecar["Row"] == "tiny000001"
    assert sidecar["Generator"] == "tiny-01234567"
    assert sidecar["Seed"] == truth["seed"]
    assert sidecar["NormalisedCovariates"] == {name: truth[name] for name in NAMES}
    assert sidecar["Manifest"] == "tiny"
    assert sidecar["ManifestRowsDigest"] == dataset.manifest.header.rows_digest
    assert sidecar["ExportedBy"].startswith("synthbrain ")


def test_published_rows_have_no_seed(tmp_path, store):
    columns = {name: [0.5] for name in NAMES}
    columns |= {"split": ["test"], "seed": [None], "origin": ["published"]}
    table = make_table(columns, ["a"])
    header = Header(name="pub", geometry=TINY, rows=0, licence=Licence(status="unknown"))
    dataset = SynthBrainDataset(Manifest.create(header, table), generator=None, store=store)
    dataset.resolver.published.write(0, np.zeros(TINY.shape, "uint8"))
    export_bids(dataset, tmp_path / "out", progress=False)
    assert rows_of(tmp_path / "out")["a"]["seed"] == "n/a"
    assert rows_of(tmp_path / "out")["a"]["made_by"] == "published"
    assert "Seed" not in json.loads(next((tmp_path / "out").rglob("*_T1w.json")).read_text())


def test_two_exports_have_the_same_bytes(dataset, tmp_path):
    export_bids(dataset, tmp_path / "one", progress=False)
    time.sleep(1.1)  # a time stamp would show
    export_bids(dataset, tmp_path / "two", progress=False)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_gzip_headers_hold_no_time(dataset):
    data = nifti_bytes(dataset.resolver.volumes([0])[0], TINY)
    assert data[4:8] == b"\0\0\0\0"
    assert len(gzip.decompress(data)) == 352 + np.prod(TINY.shape)


def test_what_is_exported_is_kept_and_the_rest_is_added(dataset, tmp_path):
    out = tmp_path / "out"
    few = SynthBrainDataset(
        dataset.manifest, ids=["tiny000004", "tiny000001"], generator=TinyGenerator(),
        store=dataset.resolver.folder,
    )  # fmt: skip
    assert export_bids(few, out, progress=False) == 2
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.nii.gz")}
    assert export_bids(dataset, out, progress=False) == 4
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert export_bids(few, out, progress=False) == 0
    assert len(rows_of(out)) == 6, "a smaller export must not drop rows of a larger one"
    export_bids(dataset, tmp_path / "at-once", progress=False)
    assert contents(out) == contents(tmp_path / "at-once")


def test_a_deleted_volume_is_written_again(dataset, tmp_path):
    export_bids(dataset, tmp_path / "out", progress=False)
    before = contents(tmp_path / "out")
    next((tmp_path / "out").rglob("*.nii.gz")).unlink()
    shutil.rmtree(tmp_path / "out" / "sub-tiny000005")
    assert export_bids(dataset, tmp_path / "out", progress=False) == 2
    assert contents(tmp_path / "out") == before


KILLED = """
import sys, time
from synthbrain import SynthBrainDataset, export
from synthbrain.testing import TinyGenerator, tiny_manifest
real = export.nifti_bytes
export.nifti_bytes = lambda *a: (time.sleep(0.02), real(*a))[1]
write = export.Path.write_bytes
def slowly(self, data):
    with self.open("wb") as file:
        file.write(data[: len(data) // 2]); file.flush(); time.sleep(0.02)
        return file.write(data[len(data) // 2 :])
export.Path.write_bytes = slowly
ds = SynthBrainDataset(tiny_manifest(40), generator=TinyGenerator(), store=sys.argv[1])
export.export_bids(ds, sys.argv[2], progress=False)
"""


def test_killed_exports_leave_no_partial_file_and_can_be_resumed(tmp_path, store):
    out = tmp_path / "out"
    dataset = SynthBrainDataset(tiny_manifest(40), generator=TinyGenerator(), store=store)
    dataset.fill(progress=False)
    for target in (3, 12, 20):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(store), str(out)])
        deadline = time.monotonic() + 60
        while len(list(out.rglob("*.nii.gz"))) < target and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        visible = [path for path in out.rglob("*.nii.gz") if ".partial" not in path.parts]
        assert len(visible) >= target
        for path in visible:
            assert nibabel.load(path).get_fdata().shape == TINY.shape
        for path in (p for p in out.rglob("*.json") if ".partial" not in p.parts):
            json.loads(path.read_text())
    left = 40 - sum(1 for i in range(40) if i not in Export(dataset, out, FORMATS["bids"]).todo())
    assert 0 < left < 40
    assert export_bids(dataset, out, progress=False) == left
    shutil.rmtree(out / ".partial", ignore_errors=True)
    export_bids(dataset, tmp_path / "undisturbed", progress=False)
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_an_export_of_other_rows_lists_the_volumes_of_a_killed_one(tmp_path, store):
    out = tmp_path / "out"
    dataset = SynthBrainDataset(tiny_manifest(40), generator=TinyGenerator(), store=store)
    dataset.fill(progress=False)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(store), str(out)])
    until = time.monotonic() + 60
    while len(list(out.rglob("*.nii.gz"))) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    process.wait()
    last = SynthBrainDataset(
        dataset.manifest, ids=["tiny000039"], generator=TinyGenerator(), store=store
    )
    export_bids(last, out, progress=False)
    finished = {path.parents[1].name for path in out.glob("sub-*/anat/*.json")}
    lines = (out / "participants.tsv").read_text().splitlines()[1:]
    assert len(finished) > 1
    assert {line.split("\t")[0] for line in lines} == finished


def test_leftovers_of_killed_exports_are_swept_once_stale(dataset, tmp_path):
    export_bids(dataset, tmp_path / "out", progress=False)
    scratch = tmp_path / "out" / ".partial"
    assert not scratch.exists()
    scratch.mkdir()
    (scratch / "old").touch()
    os.utime(scratch / "old", (0, 0))
    (scratch / "new").touch()
    export_bids(dataset, tmp_path / "out", progress=False)
    assert [path.name for path in scratch.iterdir()] == ["new"]


def test_missing_volumes_are_refused_before_anything_is_written(dataset, tmp_path, store):
    SynthBrainDataset(dataset.manifest, limit=2, generator=TinyGenerator(), store=store).fill()
    bare = SynthBrainDataset(dataset.manifest, generator=None, store=store)
    with pytest.raises(MissingVolumeError, match=r"4 of 6 volumes are not stored, 'tiny000002'"):
        export_bids(bare, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_labels_that_collide_are_refused(tmp_path, store):
    for ids in (["a_1", "a1"], ["sub-a1", "a1"], ["a1", "A1"]):
        with pytest.raises(UsageError, match="would both become"):
            export_bids(with_ids(ids, store), tmp_path / "out")
    assert export_nifti(with_ids(["a_1", "a1"], store), tmp_path / "plain", progress=False) == 2
    with pytest.raises(UsageError, match="a file of the dataset's own"):
        export_nifti(with_ids(["participants"], store), tmp_path / "out")


def test_ids_become_labels(tmp_path, store):
    assert bids_label("sub-000012") == "000012"
    dataset = with_ids(["sub-a_1-b"], store)
    export_bids(dataset, tmp_path / "out", progress=False)
    path = tmp_path / "out" / "sub-a1b" / "anat" / "sub-a1b_T1w.nii.gz"
    assert path.is_file()
    assert FolderSource(tmp_path / "out").find("sub-a_1-b") == path


def test_folders_of_others_are_left_alone(dataset, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("precious")
    with pytest.raises(UsageError, match=r"is not empty and holds no bids export"):
        export_bids(dataset, tmp_path / "mine")
    assert contents(tmp_path / "mine") == {"README.md": b"precious"}
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "dataset_description.json").write_text('{"Name": "a study"}')
    with pytest.raises(UsageError, match="holds something else"):
        export_bids(dataset, foreign)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="not a folder"):
        export_bids(dataset, tmp_path / "file")


def test_a_folder_holds_one_manifest_one_maker_and_one_type(dataset, tmp_path, store):
    out = tmp_path / "out"
    export_bids(dataset, out, progress=False)
    before = contents(out)
    other = SynthBrainDataset(tiny_manifest(6, seed=1), generator=TinyGenerator(), store=store)
    with pytest.raises(UsageError, match=r"holds uint8 volumes of tiny \("):
        export_bids(other, out)
    with pytest.raises(UsageError, match=r"this would be float32 volumes"):
        export_bids(dataset, out, dtype="float32")
    with pytest.raises(UsageError, match="no nifti export"):
        export_nifti(dataset, out)
    assert contents(out) == before


def test_halves_are_exported_as_floats_only(tmp_path, store):
    geometry = Geometry(shape=TINY.shape, chunks=TINY.chunks, dtype="float16", scale=1.0)
    header = Header(name="half", geometry=geometry, rows=0, licence=Licence(status="unknown"))
    table = tiny_manifest(2).table
    dataset = SynthBrainDataset(
        Manifest.create(header, table), generator=TinyGenerator(), store=store
    )
    with pytest.raises(UsageError, match="stored as float16; export them as float32"):
        export_bids(dataset, tmp_path / "out")
    assert export_bids(dataset, tmp_path / "out", dtype="float32", progress=False) == 2
    path = next((tmp_path / "out").rglob("*.nii.gz"))
    assert nibabel.load(path).get_data_dtype() == np.float32


def test_a_folder_that_cannot_be_written_is_a_store_error(dataset, tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("synthbrain.export.Path.write_bytes", full)
    with pytest.raises(StoreError, match=r"No space left on device.*run again"):
        export_nifti(dataset, tmp_path / "out", progress=False)


def test_patches_transforms_and_units_do_not_matter(dataset, tmp_path, store):
    odd = SynthBrainDataset(
        dataset.manifest, generator=TinyGenerator(), store=store, patch_size=4,
        units="natural", transform=lambda sample: None, dtype="float16",
    )  # fmt: skip
    export_bids(dataset, tmp_path / "one", progress=False)
    export_bids(odd, tmp_path / "two", progress=False)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_latents_are_refused(tmp_path):
    from synthbrain.testing import TinyLatentGenerator

    ds = SynthBrainDataset(
        tiny_manifest(2), generator=TinyLatentGenerator(), representation="latent", store=tmp_path
    )
    with pytest.raises(UsageError, match="exports are of volumes, not of latents"):
        export_nifti(ds, tmp_path / "out")
