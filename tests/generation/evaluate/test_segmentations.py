"""Volumes of label maps."""

import nibabel
import numpy as np
import pytest

from generation.errors import EvaluationError
from generation.evaluate.segmentations import (
    BRAIN,
    VENTRICLES,
    Measurer,
    PhantomMeasurer,
    find_map,
    measure_each,
    measure_folder,
    measure_labels,
    measure_tissues,
)
from generation.volumetry import REFERENCE_ICV


def a_map(seed=0, shape=(12, 14, 10)):
    """Random labels of a head, fluid among them."""
    draw = np.random.default_rng(seed)
    return draw.choice([0, 2, 3, 4, 5, 14, 24, 41, 42, 43, 44, 1005, 2035, 16], shape)


def counted(labels, wanted):
    return sum(int((labels == label).sum()) for label in wanted)


def save(path, labels, affine=None, dtype=np.int16):
    affine = np.eye(4) if affine is None else affine
    nibabel.save(nibabel.Nifti1Image(labels.astype(dtype), affine), path)
    return path


class TestLabels:
    def test_volumes_are_voxels_times_their_size(self):
        labels = a_map()
        found = measure_labels(labels, np.diag((-0.5, 2.0, 1.5, 1)))
        inside = int((labels > 0).sum())
        assert found["ventricular_volume"] == pytest.approx(1.5 * counted(labels, VENTRICLES))
        assert found["intracranial_volume"] == pytest.approx(1.5 * inside)
        share = counted(labels, BRAIN) / inside
        assert found["brain_volume"] == pytest.approx(share * REFERENCE_ICV)

    def test_head_size_does_not_matter_but_to_ventricles(self):
        small, large = measure_labels(a_map(), np.eye(4)), measure_labels(a_map(), 2 * np.eye(4))
        assert large["brain_volume"] == pytest.approx(small["brain_volume"])
        assert large["ventricular_volume"] == pytest.approx(8 * small["ventricular_volume"])

    def test_a_scaling_of_ones_own(self):
        found = measure_labels(a_map(), np.eye(4), scaling=1.3)
        assert found["brain_volume"] == pytest.approx(1.3 * counted(a_map(), BRAIN))

    def test_maps_without_fluid_about_the_brain_do_not_tell_its_size(self):
        labels = np.where(a_map() == 24, 0, a_map())
        found = measure_labels(labels, np.eye(4))
        assert found["ventricular_volume"] == counted(labels, VENTRICLES)
        assert np.isnan([found["brain_volume"], found["intracranial_volume"]]).all()
        assert measure_labels(labels, np.eye(4), scaling=1)["brain_volume"] > 0

    def test_third_and_fourth_ventricle_choroid_plexus_and_fluid_are_not_brain(self):
        assert not {0, 14, 15, 24, 31, 63, 30, 62, *VENTRICLES} & set(BRAIN)
        assert len(set(BRAIN)) == len(BRAIN)

    @pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32, np.float32])
    @pytest.mark.parametrize("codes", ["RAS", "LIA", "PSR"])
    def test_files_of_any_orientation_type_and_voxel_size(self, tmp_path, dtype, codes):
        affine = np.diag((0.8, 1.0, 1.5, 1))
        affine[:3, 3] = (5, -7, 3)
        image = nibabel.Nifti1Image(a_map().astype(dtype), affine)
        turned = nibabel.orientations.ornt_transform(
            nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(codes)
        )
        nibabel.save(image.as_reoriented(turned), tmp_path / "s1.nii.gz")
        found = measure_folder(tmp_path, ["s1"])
        assert found.failures == {}
        expected = measure_labels(a_map(), affine)
        assert found.values["s1"] == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize(
        ("labels", "affine", "says"),
        [
            (np.full((3, 3, 3), 0.5), np.eye(4), "holds whole numbers, found fractions"),
            (np.full((3, 3, 3), np.nan), np.eye(4), "holds whole numbers"),
            (np.zeros((3, 3, 3)), np.eye(4), "found labels 0 alone"),
            (np.full((3, 3, 3), 4), np.eye(4), "no brain in the label map: found labels 4"),
            (np.ones((3, 3)), np.eye(4), r"three axes, found shape \(3, 3\)"),
            (np.full((3, 3, 3), 2), np.zeros((4, 4)), "affine gives its voxels no volume"),
        ],
    )
    def test_what_is_no_label_map_is_refused(self, labels, affine, says):
        with pytest.raises(EvaluationError, match=says):
            measure_labels(labels, affine)

    def test_a_scaling_must_be_a_positive_number(self):
        with pytest.raises(EvaluationError, match="positive number, found nan"):
            measure_labels(a_map(), np.eye(4), scaling=float("nan"))


def test_tissues_are_mixtures_of_neighbours():
    tissues = np.array([0, 0.5, 1, 1.25, 2, 2.5, 3, 3]).reshape(2, 2, 2)
    found = measure_tissues(tissues, 2 * np.eye(4))
    assert found["intracranial_volume"] == pytest.approx(8 * 6.5)
    assert found["brain_volume"] == pytest.approx(REFERENCE_ICV * 4.25 / 6.5)
    assert np.isnan(found["ventricular_volume"])
    for bad in (tissues * 10, tissues - 2, tissues * np.nan):
        with pytest.raises(EvaluationError, match="holds 0 to 3"):
            measure_tissues(bad, np.eye(4))
    with pytest.raises(EvaluationError, match="nothing is above 1"):
        measure_tissues(tissues.clip(0, 1), np.eye(4))


class TestFiles:
    @pytest.mark.parametrize(
        ("name", "key"),
        [
            ("s1.nii", "s1"),
            ("s1_synthseg.nii.gz", "s1"),
            ("sub-01_space-T1w_dseg.nii.gz", "01"),
            ("sub-01_dseg.nii.gz", "sub-01"),
            ("sub-01/anat/sub-01_dseg.nii.gz", "sub-01"),
            ("s1.mgz", "s1"),
        ],
    )
    def test_names(self, tmp_path, name, key):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        for other in ("s10.nii.gz", "sub-012_dseg.nii.gz", "s1.csv", "xs1.nii"):
            (tmp_path / other).touch()
        assert find_map(tmp_path, key) == tmp_path / name

    def test_none_and_several(self, tmp_path):
        with pytest.raises(EvaluationError, match=r"no label map of s1 in .*, expected s1\*"):
            find_map(tmp_path, "s1")
        for name in ("s1_a.nii.gz", "s1_b.nii.gz"):
            (tmp_path / name).touch()
        with pytest.raises(EvaluationError, match=r"2 label maps of s1 .*\(s1_a.nii.gz, s1_b"):
            find_map(tmp_path, "s1")

    def test_a_segmentation_is_preferred_to_its_scan(self, tmp_path):
        for name in ("sub-1_T1w.nii.gz", "sub-1_dseg.nii.gz"):
            (tmp_path / name).touch()
        assert find_map(tmp_path, "1").name == "sub-1_dseg.nii.gz"

    def test_failures_are_told_and_the_rest_measured(self, tmp_path):
        save(tmp_path / "good.nii.gz", a_map())
        (tmp_path / "bad.nii.gz").write_bytes(b"rubbish")
        save(tmp_path / "empty.nii.gz", np.zeros((3, 3, 3)))
        found = measure_folder(tmp_path, ["good", "bad", "empty", "gone"], scalings={"good": 2})
        assert list(found.values) == ["good"]
        assert found.values["good"]["brain_volume"] == 2 * counted(a_map(), BRAIN)
        assert "cannot read bad.nii.gz" in found.failures["bad"]
        assert "no brain" in found.failures["empty"]
        assert "no label map of gone" in found.failures["gone"]
        column = found.column("ventricular_volume", ["gone", "good"])
        assert np.isnan(column[0])
        assert column[1] == counted(a_map(), VENTRICLES)

    def test_a_folder_that_is_not_there_is_refused(self, tmp_path):
        with pytest.raises(EvaluationError, match=r"there is no folder .*gone; give the one"):
            measure_folder(tmp_path / "gone", ["a"])


class TestPhantomMeasurer:
    def test_it_is_a_measurer_and_says_what_it_cannot_do(self):
        measurer = PhantomMeasurer()
        assert isinstance(measurer, Measurer)
        volume = np.zeros((160, 224, 160), np.float32)
        with pytest.raises(EvaluationError, match="measures 1 mm voxels, found 2 x 2 x 2 mm"):
            measurer.measure(volume, 2 * np.eye(4))
        found = measure_each(measurer, [("small", volume[:8], np.eye(4))])
        assert found.values == {}
        assert "expected one volume of (160, 224, 160)" in found.failures["small"]

    def test_it_measures_as_volumetry_does(self, heads):
        given = [("p", heads.volumes[0], np.diag((-1, 1, 1, 1)))]
        found = measure_each(PhantomMeasurer(), given)
        assert found.values["p"] == {
            "ventricular_volume": heads.measured[0].ventricular_volume,
            "brain_volume": heads.measured[0].brain_volume,
        }
