"""A smoke run of the loading benchmark on tiny volumes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from synthbrain.testing import TinyGenerator, tiny_manifest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PATCH = 8
ALWAYS_HERE = {"synthbrain, `ds[i]`", "synthbrain, batches of 4", "nibabel", "zarr-python"}


@pytest.fixture
def loading(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import loading

    return loading


@pytest.fixture
def volumes(loading, tmp_path):
    from volumes import prepare

    return prepare(tmp_path, tiny_manifest(3), TinyGenerator(), PATCH)


def _missing(_):
    raise ImportError("no module of that name")


def test_every_method_delivers_the_same_voxels_and_the_page_renders(loading, monkeypatch, tmp_path):
    # benchmark() itself compares every volume and patch with the generator's
    monkeypatch.setitem(loading.READERS, "not here", _missing)
    report = loading.benchmark(
        tiny_manifest(3), TinyGenerator(), folder=tmp_path, patch=PATCH, rounds=1, loader_volumes=4
    )
    assert {row.name for row in report.rows} >= ALWAYS_HERE
    assert {row.name for row in report.rows} | set(report.absent) == set(loading.READERS)
    assert all((row.whole > 0).all() and (row.patch > 0).all() for row in report.rows)
    assert all(row.size > 0 for row in report.rows)
    assert [row.name for row in report.pinned] == [row.name for row in report.rows]
    assert len(report.loaders) == 6

    page = loading.render(report, ["# Title"])
    for title in ("Whole volumes", "Patches", "DataLoader", "Targets"):
        assert f"\n## {title}" in page
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {9, 10, 6}
    assert page.count("| not here | not installed |") == 4
    verdicts = [line for line in page.splitlines() if line.startswith(("- PASS: ", "- FAIL: "))]
    assert len(verdicts) == 5


@pytest.mark.parametrize("fault", ["voxels", "type", "shape", "left out", "patch"])
def test_a_method_that_delivers_something_else_is_refused(loading, volumes, fault):
    from readers import Reader, each, memory_map

    sound = memory_map(volumes)
    loading.check("sound", sound, volumes)
    read = dict(sound.whole(range(3)))
    whole, patches = {
        "voxels": (each(lambda i: read[i] + 0.01), sound.patches),
        "type": (each(lambda i: read[i].double()), sound.patches),
        "shape": (each(lambda i: read[i][0]), sound.patches),
        "left out": (lambda order: sound.whole(order[1:]), sound.patches),
        "patch": (sound.whole, lambda order, boxes: sound.patches(order, boxes[::-1])),
    }[fault]
    faulty = Reader("", False, [], whole, patches)
    with pytest.raises(AssertionError, match="faulty, "):
        loading.check("faulty", faulty, volumes)


def test_verdicts_compare_round_by_round(loading):
    """A slow machine in one round changes both methods, so it must not change their ratio."""
    steady, other = np.array([1.0, 1.0, 1.0]), np.array([4.0, 4.0, 4.0])
    load = np.array([1.0, 7.0, 30.0])
    assert loading.ratio(other * load, steady * load) == 4


def test_boxes_move_with_the_epoch_and_stay_inside(volumes):
    first = volumes.boxes()
    volumes.patches.set_epoch(1)
    assert volumes.boxes() != first
    for box in (*first, *volumes.boxes()):
        assert all(s.start >= 0 and s.stop <= n for s, n in zip(box, volumes.shape, strict=True))


def test_scaled_covers_the_unit_interval(loading):
    from volumes import scaled

    image = scaled(np.array([[[0, 255]]], np.uint8))
    assert torch.equal(image, torch.tensor([[[[0.0, 1.0]]]]))
