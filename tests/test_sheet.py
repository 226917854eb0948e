import nibabel
import numpy as np
import pytest

from synthbrain.header import Geometry
from synthbrain.sheet import Sheet, contact_sheet, cut

AFFINE = np.array(Geometry().affine)
SHAPE = Geometry().shape


def sheet(rows, columns, **options):
    labels = {
        "title": "Heads", "subtitle": "Synthetic", "column_title": "ventricles",
        "rows": [f"age {50 + i} y" for i in range(rows)],
        "columns": [f"{20 + i} mL" for i in range(columns)],
        "captions": ["female"] * (rows * columns),
    }  # fmt: skip
    return Sheet(**(labels | options))


def head(left_brighter=True):
    """A dark volume with a bright ball; its left half is brighter."""
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    ball = np.linalg.norm(grid - np.array(SHAPE) / 2, axis=-1) < 60
    left = grid[..., 0] > SHAPE[0] / 2  # LAS: the first axis grows to the left
    return (ball * (0.5 + 0.5 * (left == left_brighter))).astype(np.float32)


def test_a_cut_lies_where_the_affine_says():
    volume = np.zeros(SHAPE, np.float32)
    volume[:, :, 76] = 1  # z = -60.55 + 76 = 15.45 mm
    assert cut(volume, AFFINE, "axial", 15.4).min() == 1
    assert cut(volume, AFFINE, "axial", 14.0).max() == 0
    volume = np.zeros(SHAPE, np.float32)
    volume[70] = 1  # x = 80.48 - 70 = 10.48 mm
    assert cut(volume, AFFINE, "sagittal", 10.4).min() == 1
    volume = np.zeros(SHAPE, np.float32)
    volume[:, 100] = 1  # y = -125.48 + 100 = -25.48 mm
    assert cut(volume, AFFINE, "coronal", -25.5).min() == 1


def test_a_cut_beyond_the_volume_is_its_edge():
    volume = np.random.default_rng(0).random((4, 5, 6))
    assert np.array_equal(cut(volume, np.eye(4), "axial", 99), cut(volume, np.eye(4), "axial", 5))


def test_pictures_show_the_head_from_its_front_with_up_on_top():
    volume = np.zeros(SHAPE, np.float32)
    volume[SHAPE[0] // 2 :, SHAPE[1] // 2 :, SHAPE[2] // 2 :] = 1  # left, front, top
    axial = cut(volume, AFFINE, "axial", 60)
    assert axial.shape == (224, 160)
    assert axial[:112, 80:].min() == 1, "front is up, left is on the right"
    assert axial[112:].max() == 0
    coronal = cut(volume, AFFINE, "coronal", 60)
    assert coronal.shape == (160, 160)
    assert coronal[:80, 80:].min() == 1
    assert coronal[80:].max() == 0


@pytest.mark.parametrize("codes", ["RAS", "LPI", "SAR", "PIR"])
def test_the_same_head_looks_the_same_in_any_orientation(codes):
    volume = np.random.default_rng(0).random((8, 10, 12)).astype(np.float32)
    image = nibabel.Nifti1Image(volume, np.diag([-1.0, 1, 1, 1]))
    orientations = nibabel.orientations
    turn = orientations.ornt_transform(
        orientations.axcodes2ornt("LAS"), orientations.axcodes2ornt(codes)
    )
    turned = image.as_reoriented(turn)
    for plane, position in (("axial", 4), ("coronal", 3), ("sagittal", -2)):
        expected = cut(volume, image.affine, plane, position)
        found = cut(turned.get_fdata(dtype=np.float32), turned.affine, plane, position)
        assert np.array_equal(expected, found)


def test_a_sheet_is_a_dark_page_with_a_picture_in_every_cell():
    page = contact_sheet([head()] * 6, AFFINE, sheet(2, 3))
    pixels = np.asarray(page.convert("L"))
    assert np.median(pixels) < 40
    middle_rows, middle_columns = pixels.shape[0], pixels.shape[1]
    bright = (pixels > 150).mean()
    assert 0.1 < bright < 0.7
    assert middle_columns > middle_rows * 0.8
    assert page.mode == "RGB"


def test_all_pictures_share_one_window():
    dim, bright = head() * 0.5, head()
    page = np.asarray(contact_sheet([dim, bright], AFFINE, sheet(1, 2)).convert("L"))
    half = page.shape[1] // 2
    labels = page.shape[0] // 4
    assert page[labels:, :half].max() < page[labels:, half:].max() - 40


def test_a_sheet_of_black_volumes_is_still_a_sheet():
    page = contact_sheet([np.zeros(SHAPE, np.float32)] * 2, AFFINE, sheet(1, 2))
    assert page.size[0] > 100


def test_a_sheet_is_deterministic():
    pages = [contact_sheet([head()], AFFINE, sheet(1, 1)).tobytes() for _ in range(2)]
    assert pages[0] == pages[1]


def test_the_grid_must_be_full():
    with pytest.raises(ValueError, match="3 volumes do not fill 2 rows of 2"):
        contact_sheet([head()] * 3, AFFINE, sheet(2, 2))
