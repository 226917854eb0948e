"""Smoke runs of the benchmark of many rows."""

from pathlib import Path

import pytest

from synthbrain.manifest import Manifest
from synthbrain.testing import tiny_manifest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def scale(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import scale

    return scale


@pytest.fixture
def filled(scale, tmp_path):
    """Some rows of a small manifest are stored."""
    manifest = scale.shrunk(tiny_manifest(90))
    manifest.save(tmp_path / "manifest")
    rows = list(range(0, 90, 2))
    scale.fill(manifest, rows, tmp_path / "store")
    return tmp_path, rows


def test_workers_go_over_the_rows_asked_for(scale, filled):
    folder, rows = filled
    found = scale.go_over("fork", rows, folder)
    assert found.rows == len(rows)
    assert 0 < found.unique <= found.resident
    assert found.main_peak > 0


def test_a_row_is_found_in_some_time(scale, filled):
    folder, rows = filled
    assert -1e6 < scale.overhead_of("uint8", rows, folder) < 1e6


def test_files_have_no_more_names_than_they_may(scale, tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "LINKS", 4)
    manifest = scale.shrunk(tiny_manifest(10))
    scale.fill(manifest, range(10), tmp_path)
    shards = [path for path in tmp_path.rglob("c.*") if path.is_file()]
    assert len(shards) == 10
    assert len({path.stat().st_ino for path in shards}) == 3


def test_the_page_judges_every_target(scale):
    report = scale.Report(
        [scale.Construction(100_000, 0.5, 200, 250), scale.Construction(100_000, 0.7, 200, 260)],
        [scale.Memory("fork", 100, 280, 310, 20, 30, 300)],
        {"uint8": 49.0, "float32": 80.0},
    )
    page = scale.render(report, ["# Title"])
    assert "| 100,000 | 0.60 | 0.50 | 200 | 260 |" in page
    verdicts = [line[2:6] for line in page.splitlines() if line.startswith("- ")]
    assert verdicts == ["PASS", "FAIL", "PASS"]


@pytest.mark.slow
def test_a_short_run_of_everything(scale, tmp_path):
    manifest = Manifest.open(scale.MANIFEST)
    report = scale.benchmark(tmp_path, manifest, rows=512, calls=1, lookups=50)
    assert [found.method for found in report.memory] == [*scale.METHODS, scale.NOTHING]
    assert {found.rows for found in report.memory} == {512}
