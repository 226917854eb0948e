"""Segmentation programs, real ones, if small."""

import re
import sys
import time

import numpy as np
import psutil
import pytest

from generation.errors import EvaluationError
from generation.evaluate.segmentations import Measurer
from generation.evaluate.segmenters import SEGMENTERS, Segmenter

AFFINE = np.diag((-1.0, 1.0, 2.0, 1.0))

PROGRAM = """
import sys, pathlib, nibabel, numpy
given, made = map(pathlib.Path, sys.argv[1:3])
with open({log!r}, "a") as log:
    print("run", file=log)
for scan in [given] if given.is_file() else sorted(given.iterdir()):
    image = nibabel.load(scan)
    values = image.get_fdata()
    if values.max() == 0:
        sys.exit("no head in this scan")
    labels = numpy.select([values > 0.8, values > 0.5, values > 0.2], [2, 4, 24]).astype("int16")
    path = made / (scan.name[:-7] + "_seg.nii.gz") if made.is_dir() else made
    nibabel.save(nibabel.Nifti1Image(labels, image.affine), path)
"""


def volume(seed):
    return np.random.default_rng(seed).random((6, 5, 4)).astype(np.float32)


def volumes(*keys):
    return [(key, volume(number), AFFINE) for number, key in enumerate(keys)]


def expected(values):
    return {"ventricular_volume": 2.0 * ((values > 0.5) & (values <= 0.8)).sum()}


@pytest.fixture
def program(tmp_path):
    """A program that makes labels by thresholds, and how often it was run."""
    script, log = tmp_path / "a program.py", tmp_path / "runs"
    script.write_text(PROGRAM.format(log=str(log)))
    log.touch()
    line = f"{sys.executable} '{script}'"
    return line, lambda: len(log.read_text().splitlines())


def python(code):
    return f'{sys.executable} -c "{code}" {{in}} {{out}}'


def running(pid):
    """Whether a process lives; one that nobody waits for stays in the table as a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def check(found, keys):
    for number, key in enumerate(keys):
        assert (
            found.values[key]["ventricular_volume"]
            == expected(volume(number))["ventricular_volume"]
        )


def test_one_volume_and_nothing_left_behind(program, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    segmenter = Segmenter(name="mine", version="3", command=f"{program[0]} {{in}} {{out}}")
    assert isinstance(segmenter, Measurer)
    found = segmenter.measure(volume(0), AFFINE)
    assert found["ventricular_volume"] == expected(volume(0))["ventricular_volume"]
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "runs", "result"),
    [
        ("{in} {out}", 3, ""),
        ("{in_dir} {out_dir}", 1, ""),
        ("{in} {out_dir}", 3, "{out_dir}/{id}_seg.nii.gz"),
        ("{in} {out_dir}", 3, ""),
    ],
)
def test_maps_are_kept_and_gone_on_with(program, tmp_path, fields, runs, result):
    line, count = program
    segmenter = Segmenter(name="mine", command=f"{line} {fields}", result=result)
    keys = ("a", "a_b", "sub-1")
    found = segmenter.measure_all(volumes(*keys), tmp_path / "maps")
    assert found.failures == {}
    check(found, keys)
    assert count() == runs
    assert {path.name for path in (tmp_path / "maps").iterdir()} == {
        "a.nii.gz", "a_b.nii.gz", "sub-1.nii.gz"
    }  # fmt: skip
    assert segmenter.measure_all(volumes(*keys), tmp_path / "maps") == found
    assert count() == runs
    (tmp_path / "maps" / "a.nii.gz").write_bytes(b"half")
    assert segmenter.measure_all(volumes(*keys), tmp_path / "maps").values == found.values
    assert count() == runs + 1


def test_what_fails_is_told_and_tried_again(program, tmp_path):
    line, count = program
    segmenter = Segmenter(name="mine", command=f"{line} {{in}} {{out}}")
    black = ("black", np.zeros((6, 5, 4), np.float32), AFFINE)
    for runs in (2, 3):
        found = segmenter.measure_all([*volumes("a"), black], tmp_path / "maps")
        check(found, ["a"])
        assert found.failures == {"black": "mine ended with 1: no head in this scan"}
        assert count() == runs


def test_of_a_run_over_many_that_failed_what_is_there_counts(program, tmp_path):
    segmenter = Segmenter(name="mine", command=f"{program[0]} {{in_dir}} {{out_dir}}")
    black = ("black", np.zeros((6, 5, 4), np.float32), AFFINE)
    found = segmenter.measure_all([*volumes("a"), black, ("b", volume(1), AFFINE)], tmp_path / "m")
    check(found, ["a"])
    assert set(found.failures) == {"black", "b"}
    again = segmenter.measure_all([*volumes("a", "b")], tmp_path / "m")
    check(again, ["a", "b"])


def test_a_program_that_hangs_is_ended_with_all_it_started(tmp_path):
    script, pid = tmp_path / "hang.sh", tmp_path / "pid"
    script.write_text(f"sleep 60 & echo $! > {pid}; wait\n")
    segmenter = Segmenter(name="slow", command=f"sh {script} {{in}} {{out}}", timeout=0.5)
    began = time.monotonic()
    found = segmenter.measure_all(volumes("a"), tmp_path / "maps")
    assert time.monotonic() - began < 10
    assert found.failures == {"a": "slow took more than 0.5 s and was ended"}
    child = int(pid.read_text())
    while running(child) and time.monotonic() - began < 10:
        time.sleep(0.05)
    assert not running(child)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (python("import sys; open(sys.argv[2], 'wb').write(b'rubbish')"), "cannot read v000000"),
        (python("pass"), "mine left no v000000.nii.gz"),
        (python("raise SystemExit(3)"), "mine ended with 3: it said nothing"),
        ("/no/such/program {in} {out}", "cannot run /no/such/program .No such file"),
        (python("import shutil, sys; shutil.copy(*sys.argv[1:])"), "holds whole numbers"),
    ],
)
def test_rubbish_is_no_map(tmp_path, command, says):
    segmenter = Segmenter(name="mine", command=command)
    found = segmenter.measure_all(volumes("a"), tmp_path / "maps")
    assert found.values == {}
    assert re.search(says, found.failures["a"])
    assert list((tmp_path / "maps").iterdir()) == []
    with pytest.raises(EvaluationError, match=says):
        segmenter.measure(volume(0), AFFINE)


def test_nothing_is_interpreted_by_a_shell(tmp_path):
    command = python("import sys; sys.exit(' '.join(sys.argv[3:]))") + " $HOME '; touch x' *"
    found = Segmenter(name="mine", command=command).measure_all(volumes("a"), tmp_path / "maps")
    assert found.failures["a"] == "mine ended with 1: $HOME ; touch x *"


def test_ids_that_leave_the_folder_are_refused(program, tmp_path):
    segmenter = Segmenter(name="mine", command=f"{program[0]} {{in}} {{out}}")
    found = segmenter.measure_all(volumes("../a", "b"), tmp_path / "maps")
    assert "cannot name a file" in found.failures["../a"]
    assert list(found.values) == ["b"]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("tool {in} {where}", r"cannot read the command .*where"),
        ("tool 'x {in} {out}", "No closing quotation"),
        ("tool {in}", "must say what goes in"),
        ("tool {0} {in} {out}", "cannot read the command"),
        ("", "must say what goes in"),
    ],
)
def test_commands_that_make_no_sense_are_refused(command, says):
    with pytest.raises(EvaluationError, match=says):
        Segmenter(name="mine", command=command)


def test_known_programs_say_where_their_command_lines_come_from():
    assert set(SEGMENTERS) == {"synthseg", "fastsurfer", "deepmriprep"}
    assert all(one.source and one.name == name for name, one in SEGMENTERS.items())
    assert SEGMENTERS["synthseg"].at_once
    assert not SEGMENTERS["fastsurfer"].at_once
