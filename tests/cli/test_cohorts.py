"""select, draw and info."""

import io
import json

import pandas as pd
import pytest

from generation.covariates import AGE
from synthbrain import Manifest
from synthbrain.header import Header, Licence


def test_select_prints_one_id_a_line_into_a_pipe(run, cohort):
    result = run("select", cohort, "--age", "0:0.5")
    expected = Manifest.open(cohort).select(age_range=(0, 0.5)).table.index
    assert result.stdout.split() == list(expected)
    assert f"{len(expected)} rows" in result.stderr


def test_selections_read_back_the_ids_they_print(run, cohort, tmp_path):
    ids = run("select", cohort, "--limit", "3").stdout
    (tmp_path / "ids.txt").write_text(ids)
    assert run("select", cohort, "--ids", "ids.txt").stdout == ids
    assert run("select", cohort, "--ids", "-", input=ids).stdout == ids


def test_csv_has_both_units_and_is_exact(run, cohort):
    result = run("select", cohort, "--csv")
    table = pd.read_csv(io.StringIO(result.stdout), index_col="id")
    rows = Manifest.open(cohort).table
    assert table["age"].tolist() == rows["age"].tolist()
    assert table["age_years"].tolist() == AGE.denormalise(rows["age"]).tolist()
    assert table["seed"].tolist() == rows["seed"].tolist()
    assert set(table["sex"]) == {"female", "male"}


def test_json_is_a_list_of_rows(run, cohort):
    rows = json.loads(run("select", cohort, "--sex", "male", "--json").stdout)
    assert {row["sex"] for row in rows} == {"male"}
    assert isinstance(rows[0]["seed"], int)


def test_a_saved_selection_prints_its_folder_and_hints_at_fill(run, cohort, tmp_path):
    result = run("select", cohort, "--limit", "4", "--out", "few")
    assert result.stdout.strip() == str(tmp_path / "few")
    assert "next: synthbrain fill few" in result.stderr
    assert len(Manifest.open("few")) == 4
    assert run("select", cohort, "--limit", "5", "--out", "few", "--overwrite").exit_code == 0
    assert len(Manifest.open("few")) == 5


def test_several_splits_and_a_query(run, cohort):
    both = run("select", cohort, "--split", "train", "--split", "validation", "--json")
    assert {row["split"] for row in json.loads(both.stdout)} <= {"train", "validation"}
    old = run("select", cohort, "--where", "age_years > 60", "--json")
    assert min(row["age_years"] for row in json.loads(old.stdout)) > 60


@pytest.mark.parametrize("sex", ["female", "balanced"])
def test_draw_keeps_to_its_ranges_and_is_reproducible(run, sex):
    line = ["draw", "-n", "20", "--age", "60y:75y", "--ventricles", "20mL:60mL", "--sex", sex]
    first = run(*line, "--seed", "3", "--out", "first/older")
    assert first.exit_code == 0, first.output
    assert "next: synthbrain fill first/older" in first.stderr
    table = Manifest.open("first/older").table
    years = AGE.denormalise(table["age"])
    assert 60 - 1e-4 <= years.min() <= years.max() <= 75 + 1e-4
    assert table["sex"].sum() == (0 if sex == "female" else 10)
    assert run(*line, "--seed", "3", "--out", "again/older").exit_code == 0
    assert Manifest.open("again/older").header == Manifest.open("first/older").header
    assert run(*line, "--seed", "4", "--out", "other/older").exit_code == 0
    assert not Manifest.open("other/older").table.equals(table)


def test_a_single_value_fixes_a_covariate(run):
    assert run("draw", "-n", "3", "--age", "70y", "--out", "seventy").exit_code == 0
    years = AGE.denormalise(Manifest.open("seventy").table["age"])
    assert years.round(3).tolist() == [70.0] * 3


def test_beyond_the_trained_range_only_on_the_word(run):
    line = ["draw", "-n", "2", "--ventricles", "1.2:1.4", "--out", "large"]
    refused = run(*line)
    assert (refused.exit_code, "--extrapolate" in refused.stderr) == (2, True)
    assert run(*line, "--extrapolate").exit_code == 0
    assert Manifest.open("large").table["ventricular_volume"].min() >= 1.2


def test_info_tells_what_is_here(run, home):
    facts = json.loads(run("info", "--json").stdout)
    assert facts["home"] == str(home)
    assert facts["store_bytes"] == 0
    assert "tiny" in facts["generators"]
    assert {"python", "synthbrain", "torch"} <= set(facts["versions"])
    text = run("info").stdout
    assert str(home) in text
    assert "device" in text


def test_info_tells_what_a_manifest_holds(run, cohort):
    facts = json.loads(run("info", cohort, "--json").stdout)
    table = Manifest.open(cohort).table
    assert facts["rows"] == 12
    assert sum(facts["splits"].values()) == 12
    assert facts["licence"]["name"] == "CC0"
    assert facts["covariates"]["age"]["normalised"] == [table["age"].min(), table["age"].max()]
    assert facts["covariates"]["age"]["years"][0] == AGE.denormalise(table["age"].min())
    assert facts["stored"] == {"none": {"stored": 0, "missing": 12}}


def test_info_counts_stored_rows_by_their_maker(run, cohort):
    run("fill", cohort, "--generator", "tiny", "--limit", "5")
    facts = json.loads(run("info", cohort, "--json").stdout)
    assert facts["stored"] == {"tiny-01234567": {"stored": 5, "missing": 7}}
    assert "5, missing 7  (made by tiny-01234567)" in run("info", cohort).stdout


def test_info_reads_a_manifest_without_rows(run, tmp_path):
    folder = tmp_path / "header-only"
    folder.mkdir()
    header = Header(name="header-only", rows=0, licence=Licence(status="unknown", note="ask"))
    (folder / "manifest.json").write_text(header.text())
    result = run("info", folder)
    assert result.exit_code == 0
    assert "unknown: ask" in result.stdout
    refused = run("select", folder)
    assert (refused.exit_code, refused.stderr.count("error: ")) == (2, 1)
