import logging

import nibabel
import numpy as np
import pytest

from synthbrain import FolderSource, SynthBrainDataset
from synthbrain.errors import MissingVolumeError, SourceError
from synthbrain.manifest import Manifest
from synthbrain.nifti import read_nifti
from synthbrain.quantise import intensities
from synthbrain.rows import make_table
from synthbrain.sources.folder import LAYOUTS
from synthbrain.testing import TINY, check_source, tiny_manifest


def values(seed=0):
    return np.random.default_rng(seed).random(TINY.shape).astype(np.float32)


def put(path, volume=None, affine=TINY.affine):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(
        nibabel.Nifti1Image(values() if volume is None else volume, np.array(affine)), path
    )
    return path


def published(n):
    """A manifest of published rows, whose voxels only a source has."""
    tiny = tiny_manifest(n)
    columns = {name: tiny.table[name].to_numpy() for name in tiny.table.columns}
    columns["origin"] = np.full(n, "published", dtype=object)
    return Manifest.create(tiny.header, make_table(columns, tiny.table.index))


@pytest.fixture
def source(tmp_path):
    for number in range(3):
        put(tmp_path / f"brain{number}.nii.gz", values(number))
    return FolderSource(tmp_path)


def test_the_contract_of_a_source(source):
    check_source(source, ["brain0", "brain1", "brain2"], TINY)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("id", ["brain7", "sub-brain7"])
def test_files_are_found_however_they_are_laid_out(tmp_path, layout, id):
    path = put(tmp_path / layout.format(id=id, label="brain7"))
    source = FolderSource(str(tmp_path))
    assert source.find(id) == path
    ((found, volume),) = source.fetch([id, "other"], TINY)
    assert found == id
    assert np.abs(intensities(volume, TINY) - values()).max() <= 1 / 510 + 1e-6


def test_stored_bytes_survive_export_and_import(tmp_path):
    stored = np.arange(np.prod(TINY.shape), dtype=np.uint32).astype(np.uint8).reshape(TINY.shape)
    image = nibabel.Nifti1Image(stored, np.array(TINY.affine))
    image.header.set_slope_inter(1 / 255, 0)
    nibabel.save(image, tmp_path / "a.nii.gz")
    assert np.array_equal(read_nifti(tmp_path / "a.nii.gz", TINY), stored)


def test_halves_are_kept_as_halves(tmp_path):
    geometry = TINY.model_copy(update={"dtype": "float16"})
    found = read_nifti(put(tmp_path / "a.nii"), geometry)
    assert np.array_equal(found, values().astype(np.float16))


@pytest.mark.parametrize(
    ("volume", "affine", "says"),
    [
        (values()[:-1], TINY.affine, "has shape (15, 24, 16), expected (16, 24, 16)"),
        (values()[..., None], TINY.affine, "has shape (16, 24, 16, 1)"),
        (values(), np.eye(4), "resample it to the manifest's grid"),
        (values() * 255, TINY.affine, "must lie in [0, 1]"),
        (values() * np.nan, TINY.affine, "must be finite"),
    ],
)
def test_what_is_not_the_volume_asked_for_is_refused(tmp_path, volume, affine, says):
    path = put(tmp_path / "a.nii", volume, affine)
    with pytest.raises(SourceError) as refused:
        read_nifti(path, TINY)
    assert says in str(refused.value)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kept", [0, 100, -100])
def test_damaged_files_are_refused(tmp_path, kept):
    path = put(tmp_path / "a.nii.gz")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(SourceError, match="cannot read") as refused:
        read_nifti(path, TINY)
    assert "\n" not in str(refused.value)


def test_one_bad_file_does_not_keep_the_others_back(source, caplog):
    (source.path / "brain1.nii.gz").write_bytes(b"not gzip")
    with caplog.at_level(logging.WARNING, "synthbrain"):
        found = dict(source.fetch(["brain0", "brain1", "brain2"], TINY))
    assert sorted(found) == ["brain0", "brain2"]
    assert "brain1.nii.gz" in caplog.text
    assert "left out" in caplog.text


def test_rows_whose_file_is_bad_are_missing_and_the_rest_is_there(tmp_path, caplog):
    manifest = published(4)
    for number, id in enumerate(manifest.table.index):
        put(tmp_path / "nifti" / f"{id}.nii.gz", values(number))
    (tmp_path / "nifti" / "tiny000001.nii.gz").write_bytes(b"")
    ds = SynthBrainDataset(
        manifest, generator=None, sources=[tmp_path / "nifti"], store=tmp_path / "store"
    )
    with pytest.raises(MissingVolumeError, match="1 rows, 'tiny000001' first"):
        ds.fill(progress=False)
    assert ds.missing() == ["tiny000001"]
    assert ds[3]["made_by"] == "published"
    assert np.abs(ds[3]["image"][0].numpy() - values(3)).max() <= 1 / 510 + 1e-6
    assert "tiny000001.nii.gz" in caplog.text


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SourceError, match=r"no folder .*nowhere"):
        FolderSource(tmp_path / "nowhere")


def test_costs_count_what_is_there(source):
    size = (source.path / "brain0.nii.gz").stat().st_size
    assert source.cost(["brain0", "stranger"]).bytes == size
    assert source.cost([]).seconds == 0
