"""Ranks that train together on one node, and what is left when one of their processes is killed."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
from sampled import Noise

from synthbrain import SynthBrainDataset
from synthbrain.testing import tiny_manifest

HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.fixture
def cohort(tmp_path):
    """The rows of a run, of which age and split leave about a quarter."""
    manifest = tiny_manifest(100)
    manifest.save(tmp_path / "cohort")
    return manifest.select(split="train", age_range=(0.4, 0.8))


@pytest.fixture
def ranks(cohort, tmp_path, home):
    """Starts the ranks of a run; at the end no process of it may be left."""
    started = []

    def start(size=2, *, epochs=2, workers=2, context="fork", pause=0.0, seconds=0.0):
        (tmp_path / "meet").unlink(missing_ok=True)
        for rank in range(size):
            env = {
                "RANK": str(rank), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1",
                "NOISE_LOG": str(tmp_path / "log"), "NOISE_SECONDS": str(seconds),
                "PYTHONPATH": str(HELPERS),
            }  # fmt: skip
            given = (tmp_path, epochs, workers, context, pause)
            process = subprocess.Popen(
                [sys.executable, HELPERS / "rank.py", *map(str, given)],
                env=os.environ | env, stderr=(tmp_path / f"stderr-{rank}").open("w"),
            )  # fmt: skip
            started.append(process)
        return started[-size:]

    yield start
    for process in started:
        process.kill()
        process.wait()


def of_run(home):
    """All processes that live in this home, by what they are."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SYNTHBRAIN_HOME") == str(home) and process.pid != os.getpid():
                found.append(process)
        except psutil.Error:
            continue
    return found


def orphans():
    """Shared memory that no process maps: other programs' come and go."""
    used = ""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            used += maps.read_text()
    shm = Path("/dev/shm")
    return {path.name for path in shm.iterdir() if str(path) not in used} if shm.exists() else set()


def wait(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def seeds_made(folder):
    return Counter(int(seed) for seed in (folder / "log").read_text().split())


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_ranks_see_every_row_once_and_have_each_made_once(ranks, cohort, tmp_path, context):
    for process in ranks(2, workers=4, context=context):
        assert process.wait(200) == 0
    plain = SynthBrainDataset(cohort, generator=Noise(), store=tmp_path / "plain")
    alone = {
        sample["id"]: sample["image"].numpy()
        for sample in map(plain.__getitem__, range(len(plain)))
    }
    orders = []
    for epoch in range(2):
        seen = [np.load(tmp_path / f"seen-{rank}-{epoch}.npz") for rank in range(2)]
        ids = [list(one) for one in seen]
        assert len(set(ids[0]) & set(ids[1])) == len(cohort) % 2  # all ranks get as many
        assert {*ids[0], *ids[1]} == set(alone)
        assert len(ids[0]) == len(ids[1])
        for one in seen:
            assert all(np.array_equal(one[id], alone[id]) for id in one)
        orders.append(ids)
    assert orders[0] != orders[1]
    assert seeds_made(tmp_path) == Counter(cohort.table["seed"])  # none in the second epoch


def kill_some(victim, home, processes, rng):
    """Kill the service, a worker or a rank; whether there was one."""
    service, workers = [], []
    for process in of_run(home):
        try:
            if "synthbrain.sampling" in process.cmdline():
                service.append(process)
            elif process.ppid() in {one.pid for one in processes}:
                workers.append(process)
        except psutil.Error:
            continue
    pids = {
        "service": [one.pid for one in service],
        "worker": [one.pid for one in workers],
        "rank": [one.pid for one in processes if one.poll() is None],
    }[victim]
    if pids:
        os.kill(rng.choice(pids), signal.SIGKILL)
    return bool(pids)


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=[] if n in (0, 2) else pytest.mark.slow) for n in range(20)]
)
def test_a_kill_leaves_nothing_and_never_hangs(ranks, cohort, tmp_path, home, number):
    victim, rng = ("service", "worker", "rank")[number % 3], random.Random(number)
    before = orphans()
    processes = ranks(2, epochs=1, pause=0.3, seconds=0.15)
    assert wait((tmp_path / "begun-0-0").exists, 60)
    time.sleep(rng.random())
    killed = kill_some(victim, home, processes, rng)
    assert wait(lambda: all(one.poll() is not None for one in processes), 30)
    codes = [one.returncode for one in processes]
    if victim == "service" or not killed:
        assert codes == [0, 0]  # it was started again
    else:
        assert all(codes)
    for rank, process in enumerate(processes):
        told = (tmp_path / f"stderr-{rank}").read_text()
        errors = [line for line in told.splitlines() if "Error: " in line and line[0] != " "]
        assert bool(errors) == (process.returncode > 0), told
    # Workers look every few seconds whether their rank lives; the service stays a second.
    assert wait(lambda: of_run(home) == [], 40)
    assert wait(lambda: list((home / "sampling").iterdir()) == [], 1)
    assert wait(lambda: orphans() <= before, 5)
    ds = SynthBrainDataset(cohort, generator=Noise(), store=tmp_path / "store")
    ds.fill(progress=False)
    assert not list((tmp_path / "store").rglob("*.claim"))
    assert not list((tmp_path / "store").rglob("*.bad"))
    plain = Noise().sample(cohort.table)
    assert all(
        np.abs(ds[row]["image"].numpy() - plain[row].numpy()).max() < 0.01 for row in range(len(ds))
    )
