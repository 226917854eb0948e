"""A smoke run of the benchmark of sampling while training."""

from pathlib import Path

import numpy as np
import pytest

from synthbrain.testing import check_generator

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def overlap(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import overlap

    return overlap


def test_the_page_has_a_row_for_each_case(overlap, tmp_path, capsys):
    out = tmp_path / "overlap.md"
    arguments = ["--rows", "8", "--rounds", "1", "--generator", "timed:quick", "--out", str(out)]
    assert overlap.main(arguments) in (0, 1)
    page = out.read_text()
    assert page in capsys.readouterr().out
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert len(tables) == 2 + len(overlap.CASES)
    assert {line.count("|") for line in tables} == {13}
    assert page.count("- PASS: ") + page.count("- FAIL: ") == len(overlap.CASES) + 1


def test_a_store_is_half_full_again_and_again(overlap, tmp_path):
    from synthbrain.testing import TINY, tiny_manifest

    manifest = tiny_manifest(6)
    assert manifest.header.geometry == TINY
    bench = overlap.Bench(manifest, "synthbrain.testing:TinyGenerator", tmp_path)
    bench.prepare()
    for _ in range(2):
        with bench.half_full() as store:
            ds = bench._dataset(store)
            assert ds.missing() == manifest.table.index[1::2].tolist()
            assert ds.fill(progress=False) == 3


def test_the_timed_generator_keeps_the_contract(overlap):
    from timed import quick

    check_generator(quick())


def test_ratios_are_taken_within_rounds(overlap):
    load = np.array([1.0, 7.0, 30.0])
    parts = {"training": 2, "sampling": 1, "ours": 2.5, "unforeseen": 3, "naive": 4}
    times = overlap.Times(**{name: (part * load).tolist() for name, part in parts.items()})
    assert times.overlap == pytest.approx(0.8)
    assert times.gain == pytest.approx(1.6)
    assert times.possible == pytest.approx(1.5)
    row = overlap.Row(overlap.BALANCED, "x", 0.1, 0.05, times)
    assert [line[:4] for line in overlap.targets([row])] == ["FAIL", "FAIL"]
