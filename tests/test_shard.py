import errno
import itertools
import os
import struct
from concurrent.futures import ThreadPoolExecutor

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthbrain.errors import DamagedShardError, GeometryError
from synthbrain.shard import ShardLayout

SMALL = ShardLayout(shape=(4, 6, 4), chunks=(2, 3, 4))
FULL = ShardLayout(shape=(160, 224, 160), chunks=(80, 112, 80))


def values(layout, seed=0):
    draw = np.random.default_rng(seed)
    if layout.dtype == "uint8":
        return draw.integers(0, 256, layout.shape, dtype=np.uint8)
    return draw.random(layout.shape).astype(layout.dtype)


@st.composite
def layouts(draw):
    axes = draw(st.integers(1, 4))
    chunks = tuple(draw(st.integers(1, 5)) for _ in range(axes))
    grid = tuple(draw(st.integers(1, 3)) for _ in range(axes))
    shape = tuple(c * g for c, g in zip(chunks, grid, strict=True))
    dtype = draw(st.sampled_from(["uint8", "float16", "float32", "int16"]))
    return ShardLayout(shape, chunks, dtype, level=draw(st.integers(-3, 3)))


@st.composite
def boxes(draw, shape):
    start = [draw(st.integers(0, n - 1)) for n in shape]
    size = [draw(st.integers(1, n - s)) for n, s in zip(shape, start, strict=True)]
    return start, size


def box_of(start, size):
    return tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))


@given(layouts(), st.integers(0, 2**32))
def test_what_is_encoded_is_read_back(tmp_path, layout, seed):
    volume = values(layout, seed)
    path = tmp_path / "shard"
    path.write_bytes(layout.encode(volume))
    assert layout.check(path)
    found = layout.read(path)
    assert found.dtype == volume.dtype
    assert np.array_equal(found, volume)


@given(st.data())
def test_a_patch_is_a_slice_of_the_volume(tmp_path, data):
    layout = data.draw(layouts())
    volume = values(layout)
    path = tmp_path / "shard"
    path.write_bytes(layout.encode(volume))
    start, size = data.draw(boxes(layout.shape))
    assert np.array_equal(layout.read_patch(path, start, size), volume[box_of(start, size)])


def test_strided_and_transposed_volumes_are_encoded_as_they_look(tmp_path):
    volume = np.ascontiguousarray(values(SMALL).T).T
    (tmp_path / "shard").write_bytes(SMALL.encode(volume))
    assert np.array_equal(SMALL.read(tmp_path / "shard"), volume)


def test_encoding_is_deterministic():
    assert SMALL.encode(values(SMALL)) == SMALL.encode(values(SMALL))


def test_a_black_volume_has_all_its_chunks(tmp_path):
    shard = SMALL.encode(np.zeros(SMALL.shape, np.uint8))
    index = struct.unpack("<8Q", shard[-SMALL.footer_size : -4])
    assert max(index) < len(shard)
    (tmp_path / "shard").write_bytes(shard)
    assert SMALL.check(tmp_path / "shard")
    assert not SMALL.read(tmp_path / "shard").any()


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "shard"
    path.write_bytes(SMALL.encode(values(SMALL)))
    return path


def refuses(path, layout=SMALL):
    try:
        layout.read(path)
    except DamagedShardError:
        return True
    return False


def test_any_flipped_bit_is_noticed(shard):
    sound = shard.read_bytes()
    for position, bit in itertools.product(range(len(sound)), range(8)):
        flipped = bytearray(sound)
        flipped[position] ^= 1 << bit
        shard.write_bytes(flipped)
        assert refuses(shard), f"bit {bit} of byte {position} went unnoticed"


def test_any_truncation_is_noticed(shard):
    sound = shard.read_bytes()
    for length in range(len(sound)):
        shard.write_bytes(sound[:length])
        assert refuses(shard), f"a shard cut to {length} bytes was read"
        assert not SMALL.check(shard), f"a shard cut to {length} bytes counts as present"


@pytest.mark.parametrize("tail", [b"\0", b"\0" * 4096, b"\xff", bytes(range(256)), b"shard"])
def test_anything_appended_is_noticed(shard, tail):
    shard.write_bytes(shard.read_bytes() + tail)
    assert refuses(shard)
    assert not SMALL.check(shard)


def test_a_file_of_zeros_as_after_a_power_cut_is_noticed(shard):
    for size in (1, SMALL.footer_size, SMALL.footer_size + 1, shard.stat().st_size, 10**6):
        shard.write_bytes(b"\0" * size)
        assert refuses(shard)
        assert not SMALL.check(shard)


@pytest.mark.parametrize("hole", [0.0, 0.3, 0.9])
def test_a_hole_in_the_file_is_noticed(shard, hole):
    sound = bytearray(shard.read_bytes())
    start = int(hole * len(sound))
    sound[start : start + 16] = b"\0" * len(sound[start : start + 16])
    shard.write_bytes(sound)
    assert refuses(shard)


@pytest.mark.parametrize("shape", [(2, 6, 4), (4, 6, 8)])
def test_a_sound_shard_of_another_geometry_is_refused_not_padded(tmp_path, shape):
    other = ShardLayout(shape, tuple(n // g for n, g in zip(shape, SMALL.grid, strict=True)))
    path = tmp_path / "shard"
    path.write_bytes(other.encode(values(other)))
    assert refuses(path)
    with pytest.raises(DamagedShardError, match="does not decode"):
        SMALL.read_patch(path, (0, 0, 0), (1, 1, 1))


def test_an_index_that_points_outside_is_refused(shard):
    sound = shard.read_bytes()
    index = list(struct.unpack("<8Q", sound[-SMALL.footer_size : -4]))
    for wrong in (len(sound), 2**63, 2**64 - 1):
        body = struct.pack("<8Q", wrong, *index[1:])
        shard.write_bytes(
            sound[: -SMALL.footer_size] + body + struct.pack("<I", google_crc32c.value(body))
        )
        assert refuses(shard)
        assert not SMALL.check(shard)


def test_flips_in_a_full_size_shard_are_noticed(tmp_path):
    head = (values(FULL) // 16).astype(np.uint8)
    sound = FULL.encode(head)
    path = tmp_path / "shard"
    path.write_bytes(sound)
    assert np.array_equal(FULL.read(path), head)
    draw = np.random.default_rng(0)
    edges = [0, 1, len(sound) - 1, len(sound) - 4, len(sound) - FULL.footer_size]
    with path.open("r+b", buffering=0) as file:
        for position in [*edges, *draw.integers(0, len(sound), 40).tolist()]:
            os.pwrite(file.fileno(), bytes([sound[position] ^ 0x10]), position)
            assert refuses(path, FULL), f"byte {position} went unnoticed"
            os.pwrite(file.fileno(), sound[position : position + 1], position)
    assert not refuses(path, FULL)


def test_a_patch_reads_only_the_chunks_it_touches(shard):
    volume = values(SMALL)
    sound = bytearray(shard.read_bytes())
    sound[0] ^= 1  # the chunk of voxel (0, 0, 0)
    shard.write_bytes(sound)
    assert np.array_equal(SMALL.read_patch(shard, (2, 3, 0), (2, 3, 4)), volume[2:, 3:])
    with pytest.raises(DamagedShardError):
        SMALL.read_patch(shard, (1, 2, 0), (2, 2, 1))


@pytest.mark.parametrize(
    ("start", "size"),
    [
        ((-1, 0, 0), (1, 1, 1)),
        ((0, 0, 0), (5, 1, 1)),
        ((3, 0, 0), (2, 1, 1)),
        ((0, 0, 0), (0, 1, 1)),
        ((0, 0), (1, 1)),
        ((0, 0, 0), (1, 1)),
    ],
)
def test_a_patch_that_leaves_the_volume_is_refused(shard, start, size):
    with pytest.raises(GeometryError, match="leaves the volume"):
        SMALL.read_patch(shard, start, size)


def test_threads_change_nothing(tmp_path):
    volume = values(FULL)
    path = tmp_path / "shard"
    path.write_bytes(FULL.encode(volume))
    with ThreadPoolExecutor(4) as pool:
        assert np.array_equal(FULL.read(path, threads=pool), volume)
        patch = FULL.read_patch(path, (70, 100, 70), (20, 20, 20), threads=pool)
        assert np.array_equal(patch, volume[70:90, 100:120, 70:90])
        path.write_bytes(b"x" + path.read_bytes()[1:])
        with pytest.raises(DamagedShardError):
            FULL.read(path, threads=pool)


def test_a_volume_is_read_into_the_callers_array(shard):
    many = np.zeros((3, *SMALL.shape), np.uint8)
    assert SMALL.read(shard, out=many[1]) is not None
    assert np.array_equal(many[1], values(SMALL))
    assert not many[[0, 2]].any()


def test_the_callers_array_must_fit(shard):
    for wrong in (np.zeros((4, 6, 5), np.uint8), np.zeros(SMALL.shape, np.float32)):
        with pytest.raises(GeometryError, match="out must have shape"):
            SMALL.read(shard, out=wrong)


def test_only_volumes_of_the_layout_are_encoded():
    for wrong in (np.zeros((4, 6, 5), np.uint8), np.zeros(SMALL.shape, np.float16)):
        with pytest.raises(GeometryError, match="expected a volume of shape"):
            SMALL.encode(wrong)


@pytest.mark.parametrize(("shape", "chunks"), [((4, 4), (3, 4)), ((4, 4), (4,))])
def test_chunks_must_divide_the_volume(shape, chunks):
    with pytest.raises(GeometryError, match="do not divide"):
        ShardLayout(shape, chunks)


def test_a_missing_shard_is_not_a_black_one(tmp_path):
    assert not SMALL.check(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        SMALL.read(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        SMALL.read_patch(tmp_path / "nothing", (0, 0, 0), (1, 1, 1))


def test_a_bad_sector_is_damage(shard, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(DamagedShardError, match="Input/output error"):
        SMALL.read(shard)
    assert not SMALL.check(shard)
