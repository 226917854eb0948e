import json
import os
import pickle
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from generation.covariates import AGE, BRAIN_VOLUME, COVARIATES, NAMES, VENTRICULAR_VOLUME
from synthbrain import Manifest, draw_cohort
from synthbrain.errors import ManifestError, UsageError
from synthbrain.header import Header, Licence
from synthbrain.manifest import saved_cohorts, shipped_manifests
from synthbrain.rows import digest_contents, digest_rows, make_table, split_of
from synthbrain.testing import tiny_manifest

UNIT = st.floats(0, 1)


@pytest.fixture
def manifest():
    return tiny_manifest(40)


def assert_same(one, other):
    assert one.header == other.header
    pd.testing.assert_frame_equal(one.table, other.table)
    assert np.array_equal(one.positions, other.positions)


# Selecting


@st.composite
def ranges(draw):
    return tuple(sorted((draw(UNIT), draw(UNIT))))


MANY = tiny_manifest(300)


@settings(max_examples=60)
@given(
    age=st.none() | ranges(),
    ventricles=st.none() | ranges(),
    brain=st.none() | ranges(),
    sex=st.sampled_from([None, "female", "male"]),
    split=st.sampled_from([None, "train", ["test", "validation"]]),
    limit=st.none() | st.integers(1, 400),
)
def test_a_selection_is_what_brute_force_finds(age, ventricles, brain, sex, split, limit):
    def wanted(row):
        bounds = {"age": age, "ventricular_volume": ventricles, "brain_volume": brain}
        return (
            all(b is None or b[0] <= row[name] <= b[1] for name, b in bounds.items())
            and (sex is None or row["sex"] == (sex == "male"))
            and (split is None or row["split"] in ([split] if isinstance(split, str) else split))
        )

    expected = [id for id, row in MANY.table.iterrows() if wanted(row)][:limit]
    arguments = {
        "age_range": age, "ventricular_range": ventricles, "brain_range": brain,
        "sex": sex, "split": split, "limit": limit,
    }  # fmt: skip
    if not expected:
        with pytest.raises(UsageError, match="none of the 300 rows"):
            MANY.select(**arguments)
        return
    chosen = MANY.select(**arguments)
    assert chosen.table.index.tolist() == expected
    assert [MANY.table.index[p] for p in chosen.positions] == expected


@given(ranges())
def test_natural_ranges_are_normalised_ones(bounds):
    for covariate, natural, normalised in (
        (AGE, "age_years", "age_range"),
        (VENTRICULAR_VOLUME, "ventricular_mm3", "ventricular_range"),
        (BRAIN_VOLUME, "brain_mm3", "brain_range"),
    ):
        low, high = bounds[0] - 0.001, bounds[1] + 0.001
        units = tuple(covariate.denormalise((low, high)).tolist())
        try:
            expected = MANY.select(extrapolate=True, **{normalised: (low, high)})
        except UsageError:
            with pytest.raises(UsageError):
                MANY.select(extrapolate=True, **{natural: units})
        else:
            found = MANY.select(extrapolate=True, **{natural: units})
            assert found.table.index.equals(expected.table.index)


def test_both_ends_of_a_range_are_included():
    for covariate in COVARIATES[1:]:
        low, high = MANY.table[covariate.name].min(), MANY.table[covariate.name].max()
        argument = {"age": "age_range", "ventricular_volume": "ventricular_range"}.get(
            covariate.name, "brain_range"
        )
        assert len(MANY.select(**{argument: (low, high)})) == 300
        assert len(MANY.select(**{argument: (high, high)})) >= 1


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("age > 0.5", lambda t: t["age"] > 0.5),
        ("age_years > 63", lambda t: t["age"] > 0.5),
        ("split == 'train' and sex == 1", lambda t: (t["split"] == "train") & (t["sex"] == 1)),
        ("seed % 2 == 0", lambda t: t["seed"].astype(int) % 2 == 0),
        ("brain_mm3 < 1.4e6", lambda t: BRAIN_VOLUME.denormalise(t["brain_volume"]) < 1.4e6),
        ("ventricular_mm3 > 9e4 or age < 0.1", lambda t: (
            (VENTRICULAR_VOLUME.denormalise(t["ventricular_volume"]) > 9e4) | (t["age"] < 0.1))),
        ("origin == 'recipe'", lambda t: t["age"] > -1),
        ("id == 'tiny000003'", lambda t: t.index == "tiny000003"),
    ],
)  # fmt: skip
def test_where_is_a_query_over_the_rows(where, expected):
    kept = MANY.table.index[np.asarray(expected(MANY.table))]
    assert MANY.select(where=where).table.index.equals(kept)


def test_a_condition_on_seeds_that_are_missing_does_not_hold(manifest):
    columns = {name: manifest.table[name].to_numpy() for name in manifest.table.columns}
    columns["origin"] = np.full(40, "published", dtype=object)
    columns["seed"] = pd.array([pd.NA] * 39 + [5], dtype="Int64")
    mixed = Manifest.create(manifest.header, make_table(columns, manifest.table.index))
    assert mixed.select(where="seed > 1").table.index.tolist() == ["tiny000039"]


def test_ids_choose_in_the_manifests_order(manifest):
    chosen = manifest.select(ids=["tiny000030", "tiny000002", "tiny000002"])
    assert chosen.table.index.tolist() == ["tiny000002", "tiny000030"]


def test_selecting_nothing_is_the_manifest_itself(manifest):
    assert manifest.select() is manifest


def test_selections_of_selections_point_at_the_root(manifest):
    once = manifest.select(age_range=(0.2, 1.0))
    twice = once.select(sex="male")
    assert twice.header.parent.name == "tiny"
    assert twice.header.parent.rows_digest == manifest.header.rows_digest
    assert twice.header.parent.selection == ("age in [0.2, 1]", "sex == male")
    assert twice.store_key == once.store_key == manifest.store_key
    for id, position in zip(twice.table.index, twice.positions, strict=True):
        assert manifest.table.index[position] == id


def test_identity_is_what_the_rows_are(manifest):
    half = manifest.select(limit=20)
    assert half.header.rows_digest == digest_rows(half.table) != manifest.header.rows_digest
    assert half.header.rows == 20
    assert repr(half) == "<Manifest tiny: 20 rows, selected from tiny>"
    assert tiny_manifest(40, seed=1).store_key != manifest.store_key


# Saving and opening


@settings(max_examples=25)
@given(n=st.integers(1, 30), seed=st.integers(0, 1000), age=st.none() | ranges())
def test_what_is_saved_is_opened(tmp_path_factory, n, seed, age):
    manifest = tiny_manifest(n, seed=seed)
    try:
        manifest = manifest.select(age_range=age)
    except UsageError:
        return
    folder = manifest.save(tmp_path_factory.mktemp("manifests") / "tiny")
    assert_same(Manifest.open(folder), manifest)
    assert_same(Manifest.open(folder / "manifest.json"), manifest)
    assert sorted(os.listdir(folder)) == ["manifest.json", "rows.parquet"]
    assert os.listdir(folder.parent) == ["tiny"]


def test_a_cohort_is_saved_by_name_and_found_by_it(manifest, home):
    chosen = manifest.select(sex="female")
    folder = chosen.save(home / "cohorts" / "women")
    assert saved_cohorts() == ["women"]
    found = Manifest.open("women")
    assert found.name == "women"
    assert found.table.index.equals(chosen.table.index)
    assert manifest.save() == home / "cohorts" / "tiny"
    assert_same(Manifest.open("tiny"), manifest)
    assert Manifest.open(str(folder)).name == "women"


def test_a_relative_path_is_opened_from_where_one_stands(manifest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    manifest.save("here")
    assert_same(Manifest.open("here"), manifest)
    assert_same(Manifest.open("./here/manifest.json"), manifest)


def test_a_root_keeps_its_name_wherever_it_is_saved(manifest, tmp_path):
    assert Manifest.open(manifest.save(tmp_path / "renamed")).store_key == manifest.store_key


def test_hashes_of_contents_are_saved_and_checked(manifest, tmp_path):
    hashes = pd.Series(["ab" * 32] * 40, index=manifest.table.index, dtype="str")
    header = manifest.header.model_copy(update={"content_digest": digest_contents(hashes)})
    known = Manifest(header, manifest.table, manifest.positions, hashes)
    part = known.select(limit=3)
    assert part.header.content_digest == digest_contents(hashes.iloc[:3])
    for saved in (known, part):
        folder = saved.save(tmp_path / f"of{len(saved)}")
        assert Manifest.open(folder).sha256.tolist() == saved.sha256.tolist()
    rows = pd.read_parquet(folder / "rows.parquet")
    rows.loc[0, "sha256"] = "cd" * 32
    rows.to_parquet(folder / "rows.parquet", index=False)
    with pytest.raises(ManifestError, match="content digest"):
        Manifest.open(folder)


def test_nothing_is_overwritten_unless_asked(manifest, tmp_path):
    folder = manifest.save(tmp_path / "tiny")
    other = tiny_manifest(5, seed=3)
    with pytest.raises(UsageError, match="already exists; choose another folder or overwrite it"):
        other.save(folder)
    assert_same(Manifest.open(folder), manifest)
    other.save(folder, overwrite=True)
    assert_same(Manifest.open(folder), other)
    assert os.listdir(tmp_path) == ["tiny"]


def test_what_a_link_leads_to_is_overwritten(manifest, tmp_path):
    folder = manifest.save(tmp_path / "disk" / "cohort")
    link = tmp_path / "here"
    link.symlink_to(folder)
    other = tiny_manifest(5, seed=3)
    other.save(link, overwrite=True)
    assert link.is_symlink()
    assert_same(Manifest.open(folder), other)
    assert os.listdir(tmp_path / "disk") == ["cohort"]


def test_what_is_no_manifest_is_never_overwritten(manifest, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("thesis", "file"):
        with pytest.raises(UsageError, match="already exists"):
            manifest.save(tmp_path / name, overwrite=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "precious"
    assert (tmp_path / "file").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    assert_same(Manifest.open(manifest.save(tmp_path / "empty")), manifest)


def test_a_failed_save_leaves_the_old_manifest_and_no_litter(manifest, tmp_path, monkeypatch):
    folder = manifest.save(tmp_path / "tiny")

    def fail(*_):
        raise OSError("disk on fire")

    monkeypatch.setattr("synthbrain.manifest.write_rows", fail)
    with pytest.raises(OSError, match="on fire"):
        tiny_manifest(5).save(folder, overwrite=True)
    assert_same(Manifest.open(folder), manifest)
    assert os.listdir(tmp_path) == ["tiny"]


def test_a_saved_manifest_is_as_readable_as_the_umask_says(manifest, tmp_path):
    before = os.umask(0o022)
    try:
        folder = manifest.save(tmp_path / "tiny")
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o755
    assert (folder / "rows.parquet").stat().st_mode & 0o777 == 0o644


def test_any_text_survives_any_locale(manifest, tmp_path, python):
    header = manifest.header.model_copy(update={"description": "ventricles in mm³, 脳"})
    folder = Manifest.create(header, manifest.table).save(tmp_path / "tiny")
    python(
        """
        import sys
        from synthbrain import Manifest
        manifest = Manifest.open(sys.argv[1])
        assert manifest.header.description == "ventricles in mm\\u00b3, \\u8133"
        manifest.save(sys.argv[1], overwrite=True)
        """,
        folder,
        LC_ALL="C",
        PYTHONUTF8="0",
        PYTHONCOERCECLOCALE="0",
    )
    assert Manifest.open(folder).header.description == "ventricles in mm³, 脳"


@pytest.fixture
def saved(manifest, tmp_path):
    return manifest.select(limit=10).save(tmp_path / "tiny")


def edit(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_rows_of_another_manifest_are_refused(saved, manifest, tmp_path):
    other = manifest.select(sex="male").save(tmp_path / "other")
    shutil.copy(other / "rows.parquet", saved / "rows.parquet")
    with pytest.raises(ManifestError, match="does not belong to its header"):
        Manifest.open(saved)


@pytest.mark.parametrize("changes", [{"rows": 9}, {"rows_digest": "0" * 64}])
def test_a_header_that_contradicts_its_rows_is_refused(saved, changes):
    edit(saved, **changes)
    with pytest.raises(ManifestError, match="does not belong to its header"):
        Manifest.open(saved)


def test_positions_and_parents_come_together(saved):
    edit(saved, parent=None)
    with pytest.raises(ManifestError, match="positions and parent"):
        Manifest.open(saved)


def test_rows_that_have_yet_to_be_read_are_no_rows(manifest, tmp_path):
    header = Header(name="later", rows=0, licence=Licence(status="unknown"))
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "manifest.json").write_text(header.text())
    later = Manifest.open(tmp_path / "later")
    assert len(later) == 0
    for act in (later.select, later.save, lambda: later.store_key):
        with pytest.raises(ManifestError, match="lie in its archive"):
            act()


def test_threads_share_what_was_pickled(manifest):
    packed, seconds = pickle.dumps(manifest), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            for _ in range(150):
                twin, together = pickle.loads(packed), threading.Barrier(8)

                def table_of(_, twin=twin, together=together):
                    together.wait()
                    return twin.table

                first, *others = pool.map(table_of, range(8))
                assert all(other is first for other in others)
    finally:
        sys.setswitchinterval(seconds)
    assert_same(twin, manifest)


def test_a_hundred_thousand_rows(tmp_path):
    many = tiny_manifest(100_000)
    folder = many.save(tmp_path / "many")
    found = Manifest.open(folder)
    assert_same(found, many)
    assert (found.select(age_range=(0.5, 1.0)).table["age"] >= 0.5).all()
    assert found.select(ids=["tiny099999"]).positions.tolist() == [99_999]


# The shipped manifests


def test_the_shipped_manifests_are_there():
    assert {"synthbrain-100k", "ldm-100k"} <= set(shipped_manifests())


def test_the_shipped_cohort_is_what_it_says():
    manifest = Manifest.open("synthbrain-100k")
    table = manifest.table
    assert len(table) == manifest.header.rows == 100_000
    assert table.index.is_unique
    assert table["seed"].is_unique
    assert set(table["origin"]) == {"recipe"}
    assert table["split"].tolist() == [split_of(id) for id in table.index]
    share = table["split"].value_counts(normalize=True)
    assert share["train"] == pytest.approx(0.8, abs=0.005)
    assert share["validation"] == pytest.approx(0.1, abs=0.005)
    assert share["test"] == pytest.approx(0.1, abs=0.005)
    assert table[list(NAMES)].min().min() >= 0
    assert table[list(NAMES)].max().max() <= 1
    years = AGE.denormalise(table["age"])
    assert years.mean() == pytest.approx(63.6, abs=0.15)
    assert years.std() == pytest.approx(7.5, abs=0.15)
    assert table["sex"].mean() == pytest.approx(0.47, abs=0.01)
    assert set(table["sex"]) == {0.0, 1.0}


def test_the_shipped_cohort_is_small():
    from synthbrain.manifest import _shipped

    sizes = [path.stat().st_size for path in (_shipped() / "synthbrain-100k").iterdir()]
    assert 1_000_000 < sum(sizes) <= 6_000_000


def test_the_released_set_is_known_but_its_rows_are_not_shipped():
    released = Manifest.open("ldm-100k")
    assert len(released) == 0
    assert released.header.sources
    for act in (lambda: released.select(limit=1), lambda: draw_cohort(3, like="ldm-100k")):
        with pytest.raises(ManifestError, match="synthbrain pull ldm-100k"):
            act()
