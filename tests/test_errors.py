"""Bad input, one row each: which error, and what its one line says.

A message names what was found, what was expected, and what to do.
"""

import contextlib
import json
import math
import os
import re

import numpy as np
import pandas as pd
import pytest
import torch

from synthbrain import FolderSource, Manifest, Store, SynthBrainDataset, draw_cohort, errors
from synthbrain.errors import (
    CovariateError,
    DamagedShardError,
    GeneratorError,
    GeometryError,
    ManifestError,
    MissingVolumeError,
    SourceError,
    StoreError,
    SynthBrainError,
    UsageError,
)
from synthbrain.testing import TINY, TinyGenerator, tiny_manifest

KINDS = (
    SynthBrainError,
    CovariateError,
    errors.EvaluationError,
    errors.TrainingError,
    errors.WeightsError,
)
"""Bases of what the command line tells in one line."""


@pytest.fixture(scope="module")
def manifest():
    return tiny_manifest(60)


@pytest.fixture
def saved(manifest, home):
    """A manifest that ``Manifest.open("tiny")`` finds."""
    return manifest.save(home / "cohorts" / "tiny")


def assert_refused(act, kind, *says):
    with pytest.raises(kind) as refused:
        act()
    message = str(refused.value)
    assert "\n" not in message
    assert isinstance(refused.value, KINDS)
    for part in says:
        assert part in message, message


# Selections: arguments of Manifest.select and of the dataset alike

SELECTIONS = {
    "unknown split": ({"split": "training"}, UsageError, "'training'", "'test', 'train'"),
    "unknown split of several": ({"split": ["train", "dev"]}, UsageError, "'dev'", "'train'"),
    "split in capitals": ({"split": "Train"}, UsageError, "'Train'", "did you mean 'train'?"),
    "split nearly spelled": ({"split": "validaton"}, UsageError, "did you mean 'validation'?"),
    "unknown column": ({"where": "weight > 3"}, UsageError, "'weight'", "columns are split, sex"),
    "no query": ({"where": "age >"}, UsageError, "where='age >'", "not a query"),
    "two lines": ({"where": "age > 0\nsex == 1"}, UsageError, r"where='age > 0\nsex == 1'"),
    "no condition": ({"where": "age + 1"}, UsageError, "'age + 1'", "such as 'age_years > 70'"),
    "assignment": ({"where": "old = age > 1"}, UsageError, "must be a condition"),
    "constant": ({"where": "True"}, UsageError, "must be a condition"),
    "empty query": ({"where": ""}, UsageError, "where=''", "columns are"),
    "mixed types": ({"where": "age == split"}, UsageError, "age == split"),
    "reversed": ({"age_range": (0.8, 0.2)}, CovariateError, "age_range", "write (0.2, 0.8)"),
    "reversed years": ({"age_years": (75, 70)}, CovariateError, "age_years", "write (70, 75)"),
    "beyond": ({"brain_range": (0.5, 1.5)}, CovariateError, "(0.5, 1.5)", "extrapolate=True"),
    "beyond years": ({"age_years": (20, 60)}, CovariateError, "(20, 60)", "44 to 82 years"),
    "beyond mm3": ({"brain_mm3": (1, 2)}, CovariateError, "(1, 2)", "1,144,240 to 1,793,910 mm³"),
    "not a number": ({"age_range": (math.nan, 1)}, CovariateError, "(nan, 1.0)", "finite"),
    "infinite": ({"age_range": (0, math.inf), "extrapolate": True}, CovariateError, "finite"),
    "one number": ({"age_range": 0.5}, CovariateError, "found 0.5", "two numbers (low, high)"),
    "one year": ({"age_years": 60}, CovariateError, "age_years", "found 60"),
    "words": ({"age_range": ("young", "old")}, CovariateError, "('young', 'old')"),
    "both forms": (
        {"age_range": (0, 1), "age_years": (50, 60)}, UsageError, "age_range or age_years, not both"
    ),
    "both ventricles": (
        {"ventricular_range": (0, 1), "ventricular_mm3": (1e4, 2e4)}, UsageError, "not both"
    ),
    "unknown sex": ({"sex": "unknown"}, CovariateError, "'unknown'", '"female" or "male"'),
    "balanced sex": ({"sex": "balanced"}, CovariateError, "'balanced'"),
    "unknown ids": (
        {"ids": ["tiny000001", "tiny9", "x"]}, UsageError, "2 of 3", "'tiny9'", "'tiny000000'"
    ),
    "a single id": ({"ids": "tiny000001"}, UsageError, "list of ids", "found 'tiny000001'"),
    "limit zero": ({"limit": 0}, UsageError, "limit must be at least 1", "found 0"),
    "limit below zero": ({"limit": -3}, UsageError, "found -3"),
    "limit a fraction": ({"limit": 0.5}, UsageError, "found 0.5"),
    "nothing left": (
        {"age_range": (0.5, 0.5)}, UsageError, "none of the 60 rows of tiny", "it spans age",
        "Widen", "draw_cohort()",
    ),
    "nothing left of two": (
        {"where": "age > 0.9", "sex": "male", "age_range": (0, 0.1)}, UsageError, "none of the 60"
    ),
    "no ids": ({"ids": []}, UsageError, "none of the 60 rows"),
    "no splits": ({"split": []}, UsageError, "none of the 60 rows"),
}  # fmt: skip


@pytest.mark.parametrize("case", SELECTIONS)
def test_a_selection_that_makes_no_sense(manifest, tmp_path, case):
    arguments, kind, *says = SELECTIONS[case]
    assert_refused(lambda: manifest.select(**arguments), kind, *says)
    assert_refused(
        lambda: SynthBrainDataset(manifest, generator=None, store=tmp_path, **arguments),
        kind,
        *says,
    )


# Arguments of the dataset


def ignorant():
    generator = TinyGenerator()
    generator.honours = frozenset({"sex", "age"})
    return generator


DATASETS = {
    "patch too large": ({"patch_size": 17}, UsageError, "(17, 17, 17)", "1 to (16, 24, 16)"),
    "patch too small": ({"patch_size": 0}, UsageError, "(0, 0, 0)", "patch_size"),
    "patch of two axes": ({"patch_size": (8, 8)}, UsageError, "(8, 8)", "three numbers"),
    "patch of fractions": ({"patch_size": (8, 8, 1.5)}, UsageError, "(8, 8, 1.5)"),
    "patch of words": ({"patch_size": "big"}, UsageError, "'big'", "three numbers"),
    "patch a fraction": ({"patch_size": 0.5}, UsageError, "0.5", "three numbers"),
    "dtype": ({"dtype": "float64"}, UsageError, "'float64'", "'float32', 'float16', 'uint8'"),
    "units": ({"units": "metric"}, UsageError, "'metric'", "'normalised', 'natural'"),
    "representation": ({"representation": "mesh"}, UsageError, "'mesh'", "'image', 'latent'"),
    "seed": ({"seed": -1}, UsageError, "seed", "found -1"),
    "unknown generator": ({"generator": "ukb"}, GeneratorError, "'ukb'", "expected one of auto"),
    "generator of another shape": (
        {"generator": TinyGenerator((8, 8, 8))}, GeneratorError, "(8, 8, 8)", "(16, 24, 16)",
        "use another generator",
    ),
    "generator that ignores": (
        {"generator": ignorant()}, GeneratorError, "ignores brain_volume, ventricular_volume",
        "use a conditional generator",
    ),
    "maker of others": (
        {"generator": TinyGenerator(), "made_by": "other-1"}, GeneratorError, "'other-1'",
        "pass generator=None",
    ),
    "source that is not there": (
        {"sources": ["/no/such/folder"]}, SourceError, "/no/such/folder", "NIfTI"
    ),
    "a source twice": ({"sources": ["/tmp", "/tmp"]}, UsageError, "different names", "/tmp"),
    "a single source": ({"sources": "/data"}, UsageError, "list of sources", "'/data'"),
}  # fmt: skip


@pytest.mark.parametrize("case", DATASETS)
def test_a_dataset_that_makes_no_sense(manifest, tmp_path, case):
    arguments, kind, *says = DATASETS[case]
    arguments = {"generator": None, "store": tmp_path} | arguments
    assert_refused(lambda: SynthBrainDataset(manifest, **arguments), kind, *says)


def test_volumes_nobody_can_give(manifest, tmp_path):
    ds = SynthBrainDataset(manifest, generator=None, store=tmp_path)
    says = ("tiny000000", str(tmp_path), "synthbrain fill")
    assert_refused(lambda: ds[0], MissingVolumeError, *says)
    assert_refused(ds.fill, MissingVolumeError, "60 of the volumes", *says)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x * math.nan, "must be finite, found NaN"),
        (lambda x: x + 1, "must lie in [0, 1], found 1"),
        (lambda x: x - 1, "must lie in [0, 1], found -0."),
        (lambda x: x[:, 0], "(1, 16, 24, 16) for 1 rows, expected (1, 1, 16, 24, 16)"),
        (lambda x: torch.cat((x, x)), "(2, 1, 16, 24, 16) for 1 rows"),
    ],
)
def test_generators_that_make_what_is_no_volume(manifest, tmp_path, change, says):
    class Wrong(TinyGenerator):
        def sample(self, rows):
            return change(super().sample(rows))

    ds = SynthBrainDataset(manifest, generator=Wrong(), store=tmp_path)
    assert_refused(lambda: ds[0], GeneratorError, says, "tiny-01234567")
    assert ds.resolver.recipes.positions() == []


# Manifests on disk


def header(folder, change):
    path = folder / "manifest.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def rows(folder, change):
    path = folder / "rows.parquet"
    change(pd.read_parquet(path)).to_parquet(path, index=False)


def cut(name, kept):
    def change(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(kept * len(data))])

    return change


def put(column, value):
    return lambda folder: rows(folder, lambda t: t.assign(**{column: [value, *t[column][1:]]}))


MANIFESTS = {
    "JSON cut short": (cut("manifest.json", 0.5), "manifest.json", "not valid JSON", "restore"),
    "JSON empty": (cut("manifest.json", 0), "manifest.json", "not valid JSON"),
    "JSON not text": (
        lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), "cannot read", "manifest.json"
    ),
    "JSON a list": (lambda f: (f / "manifest.json").write_text("[1]"), "holds list"),
    "unknown key": (
        lambda f: header(f, lambda h: h.update(licenses="x")), "'licenses'", "did you mean"
    ),
    "missing key": (lambda f: header(f, lambda h: h.pop("licence")), "'licence' is missing"),
    "wrong type": (lambda f: header(f, lambda h: h.update(rows="many")), "'rows'", "'many'"),
    "from the future": (
        lambda f: header(f, lambda h: h.update(schema_version=7)), "schema 7", "upgrade synthbrain"
    ),
    "wrong digest": (
        lambda f: header(f, lambda h: h.update(rows_digest="0" * 64)), "expected 60 with 000000",
        "restore the folder",
    ),
    "wrong count": (lambda f: header(f, lambda h: h.update(rows=61)), "expected 61 with"),
    "rows missing": (lambda f: (f / "rows.parquet").unlink(), "rows.parquet is missing", "restore"),
    "rows cut short": (cut("rows.parquet", 0.5), "not a readable Parquet file", "restore it"),
    "rows empty": (cut("rows.parquet", 0), "rows.parquet", "not a readable Parquet file"),
    "column missing": (
        lambda f: rows(f, lambda t: t.drop(columns="age")), "rows.parquet", "'age' is missing",
    ),
    "column unknown": (lambda f: rows(f, lambda t: t.assign(weight=1)), "'weight'", "expected"),
    "covariate NaN": (put("age", math.nan), "rows.parquet", "row 'tiny000000' has age = nan"),
    "id twice": (put("id", "tiny000001"), "id 'tiny000001' repeats"),
    "id a path": (put("id", "../etc"), "id '../etc'", "letters, digits"),
    "seed missing": (put("seed", None), "recipe 'tiny000000' has no seed"),
    "covariate altered": (put("age", 0.123), "does not belong to its header"),
    "split altered": (put("split", "other"), "does not belong to its header"),
    "origin unknown": (put("origin", "found"), "'found'", "recipe, published"),
    "row lost": (lambda f: rows(f, lambda t: t[1:]), "59 rows", "expected 60"),
    "rows in another order": (lambda f: rows(f, lambda t: t[::-1]), "does not belong"),
}  # fmt: skip


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_damaged_manifest(saved, case):
    damage, *says = MANIFESTS[case]
    damage(saved)
    assert_refused(lambda: Manifest.open("tiny"), ManifestError, *says)
    assert_refused(lambda: SynthBrainDataset(saved, generator=None), ManifestError, *says)


def test_every_damaged_byte_of_a_header_is_refused_or_changes_nothing_that_counts(saved, manifest):
    path = saved / "manifest.json"
    sound = path.read_bytes()
    for position in range(0, len(sound), 7):
        path.write_bytes(sound[:position] + b"#" + sound[position + 1 :])
        with contextlib.suppress(ManifestError):
            assert Manifest.open(saved).header.rows_digest == manifest.header.rows_digest


def test_an_unknown_manifest(saved):
    assert_refused(lambda: Manifest.open("tny"), ManifestError, "'tny'", "tiny", "manifest.json")
    assert_refused(lambda: Manifest.open("/no/where"), ManifestError, "'/no/where'")
    assert_refused(lambda: SynthBrainDataset("tny"), ManifestError, "'tny'")


def test_saving_over_something_else(manifest, saved, tmp_path):
    assert_refused(lambda: manifest.save(saved), UsageError, str(saved), "overwrite it")
    assert_refused(lambda: manifest.save(tmp_path / "A b"), UsageError, "'A b'", "lower-case")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    act = lambda: manifest.save(tmp_path / "full", overwrite=True)  # noqa: E731
    assert_refused(act, UsageError, "already exists")
    assert os.listdir(tmp_path / "full") == ["file"]


def test_cohorts_nobody_can_draw():
    assert_refused(lambda: draw_cohort(0), UsageError, "n must be at least 1", "found 0")
    assert_refused(lambda: draw_cohort(3, name="Old Men"), UsageError, "'Old Men'", "lower-case")
    assert_refused(lambda: draw_cohort(3, sex="x"), CovariateError, "'x'", '"female"')
    assert_refused(lambda: draw_cohort(3, like="nobody"), ManifestError, "'nobody'")


def test_rows_that_are_not_shipped(tmp_path):
    says = ("ldm-100k", "lie in its archive", "synthbrain pull ldm-100k")
    assert_refused(lambda: SynthBrainDataset("ldm-100k", store=tmp_path), ManifestError, *says)
    assert_refused(lambda: Manifest.open("ldm-100k").select(), ManifestError, *says)


# Stores and sources


def test_a_store_of_another_geometry(manifest, tmp_path):
    ds = SynthBrainDataset(manifest, generator=TinyGenerator(), store=tmp_path)
    ds[0]
    other = Store(ds.resolver.recipes.root, TINY.model_copy(update={"chunks": TINY.shape}))
    says = ("zarr.json", "[1, 8, 12, 8]", "[1, 16, 24, 16]", "use another store folder")
    assert_refused(lambda: other.read(0), GeometryError, *says)
    wrong = np.zeros((4, 4, 4), np.uint8)
    says = ("(16, 24, 16)", "(4, 4, 4)")
    assert_refused(lambda: ds.resolver.recipes.write(1, wrong), GeometryError, *says)


def test_a_damaged_volume(manifest, tmp_path):
    ds = SynthBrainDataset(manifest, generator=TinyGenerator(), store=tmp_path, heal=False)
    ds[0]
    path = ds.resolver.path(0)
    path.write_bytes(path.read_bytes()[:100])
    assert_refused(lambda: ds[0], DamagedShardError, str(path))


def test_a_store_that_is_a_file(manifest, tmp_path):
    (tmp_path / "store").write_text("in the way")
    ds = SynthBrainDataset(manifest, generator=TinyGenerator(), store=tmp_path / "store")
    assert_refused(lambda: ds.fill(progress=False), StoreError, str(tmp_path / "store"))


def test_a_source_that_is_not_there(tmp_path):
    assert_refused(lambda: FolderSource(tmp_path / "no"), SourceError, str(tmp_path / "no"))


# The errors themselves


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_is_also_the_builtin_one_would_expect(name):
    kind = getattr(errors, name)
    if kind is not SynthBrainError:
        assert issubclass(kind, (ValueError, OSError, LookupError))
        assert issubclass(kind, KINDS)
    assert re.match(r"[A-Z].*\.", kind.__doc__ or "")
