"""A smoke run of the benchmark of loaders with workers, on tiny volumes."""

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from synthbrain.testing import TinyGenerator, tiny_manifest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
GENERATOR = "synthbrain.testing:TinyGenerator"
PATCH = 8


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def volumes(tmp_path):
    from volumes import prepare

    return prepare(tmp_path, tiny_manifest(8), TinyGenerator(), PATCH)


def _missing(_):
    raise ImportError("no module of that name")


def _unable(_):
    raise OSError("not | today\nor ever")


def test_the_page_has_a_row_for_every_loader_and_a_reason_for_those_that_cannot_run(
    monkeypatch, tmp_path
):
    import loaders
    import workers

    found = loaders.ways(GENERATOR)
    chosen = {name: found[name] for name in (loaders.LOADER, loaders.NAMED, loaders.SHARED)}
    monkeypatch.setattr(
        workers, "ways", lambda _: chosen | {"not here": _missing, "not able": _unable}
    )
    report = workers.benchmark(
        tiny_manifest(8), GENERATOR, folder=tmp_path, patch=PATCH, workers=(0, 2), rounds=1
    )
    assert set(report.stored) == set(chosen)
    assert report.absent == {"not here": "not installed", "not able": "OSError: not / today"}
    assert len(report.visits) == 3 * 2 * 2
    visits = [visit for many in report.visits.values() for visit in many]
    assert all(min(visit.cold, visit.warm) > 0 <= visit.read for visit in visits)
    page = workers.render(report, ["# Title"], (0, 2))
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert len(tables) == 4 * (2 + 5)
    assert {line.count("|") for line in tables} == {7}
    verdicts = list(workers.targets(report, (0, 2)))
    assert len(verdicts) == 2 * 2 * 2
    assert all(line.startswith(("PASS: ", "FAIL: ")) for line in verdicts)


@pytest.mark.parametrize("name", ["WebDataset, .npy.gz", "Hugging Face datasets, map-style"])
def test_other_libraries_deliver_the_same_voxels(volumes, name):
    import loaders
    import workers

    pytest.importorskip("webdataset" if name.startswith("Web") else "datasets")
    factory = loaders.ways(GENERATOR)[name]
    workers.forked(partial(workers._check, factory, volumes))


@pytest.mark.slow
def test_all_libraries_deliver_the_same_voxels(volumes):
    import loaders
    import workers

    opened, absent = workers._opened(volumes, GENERATOR)
    assert set(opened) | set(absent) == set(loaders.ways(GENERATOR))
    assert set(absent.values()) <= {"not installed"}


@pytest.mark.parametrize("fault", ["voxels", "left out", "twice", "shape", "type"])
def test_a_loader_that_delivers_something_else_is_refused(volumes, fault):
    import loaders
    import workers

    batches = list(loaders.ours(volumes).loader(0, False))
    workers.check(batches, volumes, False)
    first = dict(batches[0])
    image = first["image"]
    broken = {
        "voxels": {"image": image + 0.01},
        "shape": {"image": image[:, 0]},
        "type": {"image": image.double()},
    }
    batches[0] = first | broken.get(fault, {})
    if fault == "left out":
        del batches[0]
    if fault == "twice":
        batches.append(batches[0])
    with pytest.raises(AssertionError):
        workers.check(batches, volumes, False)


def test_what_a_forked_task_returns_and_raises_comes_back():
    import workers

    assert workers.forked(os.getpid) != os.getpid()
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        workers.forked(lambda: 1 / 0)
    with pytest.raises(RuntimeError, match="died"):
        workers.forked(lambda: os._exit(1))


def test_ratios_are_taken_within_rounds():
    import workers

    load = np.array([1.0, 7.0, 30.0])
    report = workers.Report({})
    for name, speed in ((workers.LOADER, 100.0), (workers.NAMED, 90.0)):
        report.visits[name, 8, False] += [workers.Visit(speed / x, speed / x, 0, 0) for x in load]
    assert workers.ratio(report, (workers.NAMED, 8, False), "warm") == pytest.approx(0.9)


def test_dropped_files_are_whole_still(tmp_path):
    import workers

    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 100)
    workers.drop([path])
    assert path.read_bytes() == bytes(range(256)) * 100
