"""fill, verify and export."""

import json

import pytest

from synthbrain import SynthBrainDataset
from synthbrain.testing import TinyGenerator


def shard(cohort, index):
    return SynthBrainDataset(cohort, generator=TinyGenerator()).resolver.path(index)


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


def test_a_dry_run_prints_the_plan_and_changes_nothing(run, cohort, home):
    result = run("fill", cohort, "--generator", "tiny", "--dry-run")
    assert result.exit_code == 0
    assert result.stdout.startswith("0 stored, 12 to sample")
    assert not home.exists()


def test_fill_makes_what_is_missing_once(run, cohort):
    first = run("fill", cohort, "--generator", "tiny", "--limit", "5")
    assert "5 new, 5 stored" in first.stderr
    second = run("fill", cohort, "--generator", "tiny")
    assert "7 new, 12 stored" in second.stderr
    assert f"next: synthbrain export {cohort}" in second.stderr
    assert "0 new, 12 stored" in run("fill", cohort, "--generator", "tiny").stderr


def test_fill_takes_selections_and_another_store(run, cohort, tmp_path, home):
    result = run("fill", cohort, "--generator", "tiny", "--sex", "male", "--store", "elsewhere")
    assert result.exit_code == 0
    assert "--store elsewhere" in result.stderr
    assert list((tmp_path / "elsewhere").glob("*/tiny-*/volumes/*/c.*"))
    assert not home.exists()


def test_an_interrupt_in_process_exits_with_130(run, cohort, monkeypatch):
    def interrupt(self, rows):
        raise KeyboardInterrupt

    monkeypatch.setattr(TinyGenerator, "sample", interrupt)
    result = run("fill", cohort, "--generator", "tiny")
    assert result.exit_code == 130
    assert "interrupted: 0 of 12 volumes are kept" in result.stderr
    assert f"to continue: synthbrain fill {cohort} --generator tiny" in result.stderr


def test_verify_finds_nothing_wrong_with_sound_volumes(run, filled):
    result = run("verify", filled)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "12 checked, 0 damaged, 0 not stored" in result.stderr


def test_verify_names_exactly_the_damaged_rows(run, filled):
    flip(shard(filled, 3), 40)  # in a chunk: the footer stays sound
    shard(filled, 8).write_bytes(b"")
    shard(filled, 5).unlink()
    result = run("verify", filled)
    assert result.exit_code == 1
    ids = [line.split("\t")[0] for line in result.stdout.splitlines()]
    assert ids == ["tiny000003", "tiny000008"]
    assert all(line.split("\t")[1] for line in result.stdout.splitlines())
    assert "11 checked, 2 damaged, 1 not stored" in result.stderr
    assert f"next: synthbrain verify {filled} --repair" in result.stderr


def test_verify_json(run, filled):
    flip(shard(filled, 3), 40)
    result = run("verify", filled, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 1
    assert (report["rows"], report["checked"]) == (12, 12)
    assert [found["id"] for found in report["damaged"]] == ["tiny000003"]
    assert report["damaged"][0]["path"] == str(shard(filled, 3))


def test_repair_sets_aside_and_fill_makes_again(run, filled):
    sound = shard(filled, 3).read_bytes()
    flip(shard(filled, 3), 40)
    assert run("verify", filled, "--repair").exit_code == 1
    assert not shard(filled, 3).exists()
    assert "1 new" in run("fill", filled, "--generator", "tiny").stderr
    assert run("verify", filled).exit_code == 0
    assert shard(filled, 3).read_bytes() == sound


def test_verify_of_a_selection_looks_only_there(run, filled):
    flip(shard(filled, 3), 40)
    assert run("verify", filled, "--limit", "3").exit_code == 0


def test_verify_where_nothing_is_stored(run, cohort):
    result = run("verify", cohort)
    assert result.exit_code == 0
    assert "0 checked, 0 damaged, 12 not stored" in result.stderr


def test_several_makers_must_be_told_apart(run, filled, monkeypatch):
    monkeypatch.setattr(TinyGenerator, "digest", "fedcba9876543210")
    assert run("fill", filled, "--generator", "tiny").exit_code == 0
    refused = run("verify", filled)
    assert refused.exit_code == 2
    assert "holds volumes of 2 generators" in refused.stderr
    assert run("verify", filled, "--made-by", "tiny-01234567").exit_code == 0
    assert run("verify", filled, "--generator", "tiny").exit_code == 0


@pytest.mark.parametrize("format", ["bids", "nifti"])
def test_export_writes_what_is_stored_and_says_what_is_left_out(run, cohort, tmp_path, format):
    run("fill", cohort, "--generator", "tiny", "--limit", "5")
    result = run("export", cohort, "--out", "out", "--format", format)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "out")
    assert "7 rows are not stored and left out" in result.stderr
    assert len(list((tmp_path / "out").rglob("*.nii.gz"))) == 5
    assert len((tmp_path / "out" / "participants.tsv").read_text().splitlines()) == 6


def test_export_makes_what_is_missing_on_the_word(run, cohort, tmp_path):
    result = run("export", cohort, "--out", "out", "--generator", "tiny")
    assert "12 new, 12 volumes" in result.stderr
    assert "0 new, 12 volumes" in run("export", cohort, "--out", "out").stderr


def test_export_dry_run(run, filled, tmp_path):
    result = run("export", filled, "--out", "out", "--dry-run")
    assert result.stdout == "0 exported already, 12 to export to out\n"
    assert not (tmp_path / "out").exists()


def test_export_names_its_authors(run, filled, tmp_path):
    run("export", filled, "--out", "out", "--author", "A. Author", "--author", "B. Author")
    description = json.loads((tmp_path / "out" / "dataset_description.json").read_text())
    assert description["Authors"] == ["A. Author", "B. Author"]


def test_an_interrupted_export_says_how_to_continue(run, filled, monkeypatch):
    from synthbrain import export

    real, calls = export.nifti_bytes, []

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(export, "nifti_bytes", interrupt)
    result = run("export", filled, "--out", "out")
    assert result.exit_code == 130
    assert "of 12 volumes are exported to out" in result.stderr
    assert f"to continue: synthbrain export {filled} --out out" in result.stderr
    monkeypatch.undo()
