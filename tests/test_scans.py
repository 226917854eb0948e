"""Raw files, one at a time."""

import nibabel
import numpy as np

from synthbrain.header import Geometry
from synthbrain.scans import Scan, find_scans, prepare_file


def test_flat_folders_and_odd_names(tmp_path):
    for name in ("b x.nii", "a.nii.gz", "deep/c.nii", "notes.txt", ".hidden.nii"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [scan.id for scan in find_scans(tmp_path)] == ["a", "b-x", "c"]


def test_a_file_without_orientation_is_refused(tmp_path):
    image = nibabel.Nifti1Image(np.zeros((20, 20, 20), np.float32), None)
    nibabel.save(image, tmp_path / "a.nii")
    found = prepare_file(tmp_path, Geometry(), "", Scan(tmp_path / "a.nii", "a"))
    assert "no orientation" in found.reason
