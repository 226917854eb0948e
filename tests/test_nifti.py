import gzip
import struct

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthbrain.errors import SourceError
from synthbrain.header import Archive
from synthbrain.nifti import decode_nifti, gunzip
from synthbrain.testing import TINY

VALUES = np.random.default_rng(0).random(TINY.shape).astype(np.float32)
UNCROPPED = ((-1.0, 0, 0, 5.0), (0, 1.0, 0, 6.0), (0, 0, 1.0, 7.0), (0, 0, 0, 1.0))


def packed(values=VALUES, affine=TINY.affine):
    return gzip.compress(nibabel.Nifti1Image(values, np.array(affine)).to_bytes(), 1)


def archive(**facts):
    return Archive(name="a.tar", size=1, member="{id}.nii.gz", participants="p.tsv",
                   column_aliases={}, **facts)  # fmt: skip


def refused(data, **options):
    with pytest.raises(SourceError) as error:
        decode_nifti(data, TINY, "brain 7", **options)
    assert "brain 7" in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


@given(st.binary(max_size=2000), st.integers(1, 9))
def test_unpacking_agrees_with_the_standard_library(data, level):
    assert gunzip(gzip.compress(data, level), 2000) == data
    assert gunzip(gzip.compress(data, level) + gzip.compress(data), 4000) == data * 2


@given(st.binary(min_size=1, max_size=500), st.data())
def test_what_is_cut_or_flipped_is_never_unpacked_as_sound(data, drawn):
    sound = gzip.compress(data)
    with pytest.raises(ValueError, match=r"cut short|damaged"):
        gunzip(sound[: drawn.draw(st.integers(12, len(sound) - 1))], 500)


def test_a_bomb_is_refused_before_it_goes_off():
    bomb = gzip.compress(bytes(200_000_000), 9)
    assert "unpacks to more than" in refused(bomb)


def test_a_bomb_of_many_members_is_refused_too():
    assert "unpacks to more than" in refused(gzip.compress(bytes(1_000_000)) * 100)


def test_other_affines_an_archive_is_known_for_are_accepted():
    data = packed(affine=UNCROPPED)
    assert "resample it" in refused(data)
    assert "resample it" in refused(data, archive=archive())
    known = decode_nifti(data, TINY, "x", archive=archive(affines=(UNCROPPED,)))
    assert np.array_equal(known, decode_nifti(data, TINY, "x", any_affine=True))


def test_intensities_of_another_range_are_brought_to_ours():
    data = packed((VALUES * 250 + 5).astype(np.float32))
    assert "must lie in [0, 1]" in refused(data)
    found = decode_nifti(data, TINY, "x", archive=archive(values=(5, 255)))
    assert np.abs(found / 255 - VALUES).max() < 1 / 500


@pytest.mark.parametrize(
    ("offset", "format", "value", "says"),
    [
        (40, "<8h", (3, 30000, 30000, 30000, 1, 1, 1, 1), "has shape (30000, 30000, 30000)"),
        (40, "<8h", (3, -16, 24, 16, 1, 1, 1, 1), ""),
        (70, "<h", (32,), ""),  # complex64
        (70, "<h", (1536,), ""),  # float128
        (108, "<f", (1e9,), ""),  # where voxels start
        (344, "<4s", (b"oops",), ""),
    ],
)
def test_headers_that_lie_are_refused(offset, format, value, says):
    data = bytearray(nibabel.Nifti1Image(VALUES, np.array(TINY.affine)).to_bytes())
    struct.pack_into(format, data, offset, *value)
    assert says in refused(bytes(data))
