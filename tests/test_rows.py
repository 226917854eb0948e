import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from generation.covariates import NAMES
from synthbrain.errors import ManifestError
from synthbrain.rows import (
    COLUMNS,
    check_table,
    digest_contents,
    digest_rows,
    make_table,
    read_rows,
    split_of,
    write_rows,
)

words = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9_-]{0,8}\Z")


@st.composite
def tables(draw, max_size=6):
    ids = draw(st.lists(words, unique=True, min_size=1, max_size=max_size))
    count = len(ids)
    origins = [draw(st.sampled_from(["recipe", "published"])) for _ in ids]
    seeds = [
        draw(st.integers(0, 2**63 - 1) if origin == "recipe" else st.none()) for origin in origins
    ]
    columns = {
        name: draw(st.lists(st.floats(-2, 3), min_size=count, max_size=count)) for name in NAMES
    }
    columns["split"] = [draw(st.sampled_from(["train", "test", "fold-1"])) for _ in ids]
    columns["origin"] = origins
    columns["seed"] = pd.array(seeds, dtype="Int64")
    return make_table(columns, ids)


def table(**changes):
    columns = {name: [0.1, 0.2, 0.3] for name in NAMES}
    columns |= {"split": ["train"] * 3, "seed": [1, 2, 3], "origin": ["recipe"] * 3}
    return make_table(columns | changes, ["a", "b", "c"])


@given(tables(), st.booleans(), st.booleans())
def test_rows_survive_their_file(tmp_path, rows, selected, hashed):
    positions = np.arange(len(rows), dtype=np.uint32)[::-1] if selected else None
    sha256 = pd.Series(["ab" * 32] * len(rows), index=rows.index, dtype="str") if hashed else None
    write_rows(tmp_path / "rows.parquet", rows, positions, sha256)
    found, found_positions, found_sha256 = read_rows(tmp_path / "rows.parquet")
    pd.testing.assert_frame_equal(found, rows)
    assert digest_rows(found) == digest_rows(rows)
    assert (found_positions is None) == (positions is None)
    assert positions is None or np.array_equal(found_positions, positions)
    assert sha256 is None or found_sha256.tolist() == sha256.tolist()


@given(tables(), st.data())
def test_the_digest_changes_with_every_column_and_with_the_order(rows, data):
    before = digest_rows(rows)
    assert digest_rows(rows.copy()) == before
    assert digest_rows(rows[list(reversed(rows.columns))]) == before
    number = data.draw(st.integers(0, len(rows) - 1))
    for name in NAMES:
        changed = rows.copy()
        changed.iloc[number, changed.columns.get_loc(name)] += 0.5
        assert digest_rows(changed) != before, name
    for name, value in (("split", "other"), ("seed", 2**62 + 12345)):
        changed = rows.copy()
        changed.iloc[number, changed.columns.get_loc(name)] = value
        assert digest_rows(changed) != before, name
    flipped = rows.copy()
    other = "published" if rows["origin"].iloc[number] == "recipe" else "recipe"
    flipped.iloc[number, flipped.columns.get_loc("origin")] = other
    assert digest_rows(flipped) != before
    renamed = rows.rename(index={rows.index[number]: "another-id"})
    assert digest_rows(renamed) != before
    if len(rows) > 1:
        assert digest_rows(rows.iloc[::-1]) != before
        assert digest_rows(rows.iloc[1:]) != before


def test_the_digest_is_the_same_for_ever():
    assert digest_rows(table()).startswith("e9d6c12703a3d780")


def test_contents_have_a_digest_once_all_are_known():
    known = pd.Series(["a" * 64, "b" * 64])
    assert digest_contents(known) == digest_contents(known.copy())
    assert digest_contents(known) != digest_contents(known[::-1])
    assert digest_contents(pd.Series(["a" * 64, None])) is None
    assert digest_contents(pd.Series([], dtype="str")) is None


def test_columns_have_their_documented_types():
    found = table().dtypes
    assert list(found.index) == list(COLUMNS)
    assert found["seed"] == "Int64"
    assert all(found[name] == "float64" for name in NAMES)
    assert table().index.name == "id"


def test_splits_are_80_10_10_and_never_move():
    counts = pd.Series([split_of(f"row{i}") for i in range(20_000)]).value_counts(normalize=True)
    assert counts["train"] == pytest.approx(0.8, abs=0.01)
    assert counts["validation"] == pytest.approx(0.1, abs=0.01)
    assert counts["test"] == pytest.approx(0.1, abs=0.01)
    assert [split_of(f"sb{i:06d}") for i in range(6)] == [*["train"] * 4, "validation", "train"]


def test_seeds_keep_all_their_63_bits(tmp_path):
    rows = table(seed=[2**63 - 1, 2**53 + 1, 0])
    write_rows(tmp_path / "rows.parquet", rows, None, None)
    assert read_rows(tmp_path / "rows.parquet")[0]["seed"].tolist() == [2**63 - 1, 2**53 + 1, 0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"age": [0.1, np.nan, 0.3]}, "row 'b' has age = nan"),
        ({"brain_volume": [0.1, 0.2, np.inf]}, "row 'c' has brain_volume = inf"),
        ({"seed": pd.array([1, None, 3], dtype="Int64")}, "recipe 'b' has no seed"),
        ({"seed": [1, 2, -3]}, "seeds must not be negative"),
        ({"origin": ["recipe", "found", "recipe"]}, "unknown origin 'found'"),
        ({"split": ["train", "a b", "test"]}, "split 'a b'"),
        ({"split": ["train", "a\nb", "test"]}, r"split 'a\nb'"),
        ({"split": ["train", None, "test"]}, "split "),
    ],
)
def test_tables_nobody_could_trust_are_refused(changes, says):
    with pytest.raises(ManifestError) as refused:
        table(**changes)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (["a", "b", "a"], "id 'a' repeats"),
        (["a", "b", "c/d"], "id 'c/d'"),
        (["a", "..", "c"], "id '..'"),
        (["a", "", "c"], "id ''"),
        (["a", "b", None], "id "),
    ],
)
def test_ids_must_be_plain_and_unique(ids, says):
    columns = {name: table()[name].to_numpy() for name in COLUMNS}
    with pytest.raises(ManifestError) as refused:
        make_table(columns, ids)
    assert says in str(refused.value)


def test_a_missing_column_is_named():
    with pytest.raises(ManifestError, match="sex missing"):
        check_table(table().drop(columns="sex"), "here")


# Files


@pytest.fixture
def path(tmp_path):
    write_rows(tmp_path / "rows.parquet", table(), None, None)
    return tmp_path / "rows.parquet"


def rewrite(path, change):
    change(pd.read_parquet(path)).to_parquet(path, index=False)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.drop(columns="age"), "'age' is missing"),
        (lambda t: t.drop(columns="id"), "expected the columns id"),
        (lambda t: t.assign(colour="red"), "found ['id'"),
        (lambda t: t.assign(age=np.nan), "has age = nan"),
        (lambda t: t.assign(age="old"), "old"),
        (lambda t: t.assign(id="same"), "id 'same' repeats"),
        (lambda t: t.assign(seed=None), "has no seed"),
        (lambda t: t.assign(seed=0.5), "cannot safely cast"),
        (lambda t: t.assign(position=[0.0, 1.0, np.nan]), "positions must be uint32"),
        (lambda t: t.assign(position=[0, 1, -1]), "positions must be uint32"),
        (lambda t: t.assign(position=np.array([0, 1, 1], np.uint32)), "unique"),
    ],
)
def test_a_damaged_table_is_refused_in_one_line(path, change, says):
    rewrite(path, change)
    with pytest.raises(ManifestError) as refused:
        read_rows(path)
    assert says in str(refused.value)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kept", [0, 4, 100, -1, -50])
def test_a_file_cut_short_is_refused(path, kept):
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ManifestError, match="not a readable Parquet file"):
        read_rows(path)


def test_a_missing_file_is_named_with_its_remedy(tmp_path):
    with pytest.raises(ManifestError, match="is missing; restore it"):
        read_rows(tmp_path / "rows.parquet")
