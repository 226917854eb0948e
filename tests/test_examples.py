"""The examples run as users run them, on tiny volumes."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from synthbrain import SynthBrainDataset, draw_cohort
from synthbrain.testing import TinyGenerator, tiny_manifest

EXAMPLES = Path(__file__).parent.parent / "examples"

TINY = "synthbrain.testing:TinyGenerator"

pytestmark = [pytest.mark.timeout(200), pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def like(tmp_path):
    """A manifest of tiny volumes, for cohorts to resemble."""
    return tiny_manifest(60).save(tmp_path / "like")


@pytest.fixture
def example(monkeypatch, capsys):
    """Runs an example and returns what it printed."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def in_store(folder):
    return len(list(folder.rglob("c.*.0.0.0")))


def test_brain_age_with_stand_ins(example, like, tmp_path):
    small = ["--generator", TINY, "--like", like, "--store", tmp_path / "store", "--width", 2]
    some = ["--stand-ins", 60, "--pool", 50, "--steps", 6, "--ratio", 0.4]
    printed = example("brain_age.py", *small, *some, "--lr", 0.01)
    assert "another cohort of the generator stands in" in printed
    errors = re.findall(r"([\d.]+) years", printed)
    assert len(errors) == 3
    assert all(0 < float(error) < 100 for error in errors)
    counts = re.search(r"(\d+) real volumes .* (\d+) held out; .*: (\d+) real and (\d+) s", printed)
    real, held_out, drawn, synthetic = map(int, counts.groups())
    assert real == drawn
    assert held_out > 0
    assert synthetic == round(real * 2 / 3)


def test_brain_age_with_what_prepare_wrote(example, like, tmp_path):
    ready = tmp_path / "ready"
    rows = tiny_manifest(60, name="scans", seed=4)
    rows.save(ready / "manifest")
    SynthBrainDataset(rows, generator=TinyGenerator(), store=ready / "store").fill(progress=False)
    small = ["--generator", TINY, "--like", like, "--store", tmp_path / "store", "--width", 2]
    printed = example("brain_age.py", "--real", ready, *small, "--pool", 50, "--steps", 3)
    assert "stands in" not in printed
    assert len(re.findall(r"standard error [\d.]+", printed)) == 2


def test_ventricles_are_learnt_from_a_cohort_made_on_the_way(example, like, tmp_path):
    store = tmp_path / "store"
    options = ["-n", 60, "--like", like, "--generator", TINY, "--store", store, "--epochs", 2]
    printed = example("ventricles.py", *options, "--width", 2)
    assert re.findall(r"epoch (\d): loss [\d.]+, 0 volumes missing", printed) == ["0", "1"]
    assert re.search(r"\d+ volumes held out: mean error [\d.]+ ml", printed)
    made = in_store(store)
    assert 40 < made <= 60
    again = example("ventricles.py", *options, "--width", 2)
    assert re.findall(r"epoch.*", again) == re.findall(r"epoch.*", printed)
    assert in_store(store) == made


def test_brain_age_by_lightning(example, like, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = tmp_path / "store"
    options = ["-n", 40, "--like", like, "--generator", TINY, "--store", store, "--epochs", 2]
    printed = example("brain_age_lightning.py", *options, "--width", 2, "--workers", 1)
    assert re.search(r"mean error [\d.]+ years", printed)
    rows = draw_cohort(40, like=str(like), name="ages").table["split"]
    assert in_store(store) == rows.isin(["train", "validation"]).sum()


def test_two_processes_train_the_same_model_on_one_mix(like, tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
        EXAMPLES / "ddp.py", "-n", 12, "--like", like, "--generator", TINY,
        "--store", tmp_path / "store", "--epochs", 2, "--width", 2,
    ]  # fmt: skip
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True, text=True, timeout=150, env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for epoch in range(2):
        assert f"epoch {epoch}: 12 + 12 samples, 24 of 24 volumes" in done.stdout
    weights = re.findall(r"rank \d: weights ([0-9a-f]{16})", done.stdout)
    assert len(weights) == 2
    assert weights[0] == weights[1]


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_help_says_how_to_run_it(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert end.value.code == 0
    assert f"examples/{name} --" in capsys.readouterr().out
