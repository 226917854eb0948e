import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthbrain.errors import UsageError
from synthbrain.sizes import byte_count, size_text


@pytest.mark.parametrize(
    ("size", "count"),
    [(7, 7), ("0", 0), ("12", 12), ("20GB", 20 * 10**9), ("1.5 k", 1500), ("3MB", 3e6)],
)
def test_sizes_are_bytes_or_texts(size, count):
    assert byte_count(size, "room") == count


@pytest.mark.parametrize("size", [-1, "", "20 giga", "-3GB", 1.5, True, None])
def test_other_sizes_are_refused(size):
    with pytest.raises(UsageError, match=r"room must be 0 bytes or more, .* such as 500kB"):
        byte_count(size, "room")


def test_too_small_a_size_is_refused():
    assert byte_count(1, "room", least=1) == 1
    with pytest.raises(UsageError, match="room must be 1 bytes or more"):
        byte_count("0", "room", least=1)


@given(st.integers(0, 10**14))
def test_sizes_read_what_was_told(count):
    assert byte_count(size_text(count), "room") == pytest.approx(count, rel=0.005)
