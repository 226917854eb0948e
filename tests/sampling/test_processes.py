import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
from sampled import Noise, ask_in_parts, train

from synthbrain import SynthBrainDataset
from synthbrain.errors import GeneratorError
from synthbrain.sampling import SharedGenerator, status
from synthbrain.testing import tiny_manifest

fork = multiprocessing.get_context("fork")


@pytest.fixture
def shared(home, tmp_path):
    """A shared generator whose service, in the end, must have left nothing anywhere."""
    made, before, children = [], segments(), own_children()

    def make(name, **options):
        made.append(SharedGenerator(name, idle=0.5, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()
    until(lambda: list((home / "sampling").iterdir()) == [])
    until(lambda: own_children() <= children)
    until(lambda: services(home) == [])  # the folder goes first, then the process
    until(lambda: segments() <= before)  # those of other programs come and go


def until(condition, seconds=40):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def segments():
    shm = Path("/dev/shm")
    return (
        {path.name for path in shm.iterdir() if "torch" not in path.name} if shm.exists() else set()
    )


def own_children():
    return {child.pid for child in psutil.Process().children(recursive=True)}


def services(home):
    """Processes that serve from this home, living or not yet waited for."""
    found = []
    for process in psutil.process_iter():
        try:
            if "synthbrain.sampling" in process.cmdline() and str(home) in str(process.environ()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def pid_of(shared):
    return status(shared.spec.folder())["pid"]


def seeds_made(log):
    return Counter(int(seed) for seed in log.read_text().split())


def clients(shared, rows, folder, count):
    started = [
        fork.Process(target=ask_in_parts, args=(shared, rows, folder, number))
        for number in range(count)
    ]
    for process in started:
        process.start()
    return started


def assert_all_there(folder, rows, numbers):
    expected = Noise().sample(rows).numpy()
    for number in numbers:
        for index in range(len(rows)):
            volume = np.load(folder / f"{number}-{index}.npy")
            assert np.array_equal(volume[0], expected[index])


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_two_ranks_have_each_volume_made_once(shared, tmp_path, context):
    manifest, log = tiny_manifest(30), tmp_path / "log"
    generator = shared("sampled:Noise", log=str(log), seconds=0.05)
    dataset = SynthBrainDataset(manifest, generator=generator, store=tmp_path / "store")
    plain = SynthBrainDataset(manifest, generator=Noise(), store=tmp_path / "plain")
    orders = [list(range(24)), list(range(6, 30))]
    (tmp_path / "seen").mkdir()
    ranks = [
        fork.Process(target=train, args=(dataset, context, orders, tmp_path / "seen", rank))
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(200)
        assert rank.exitcode == 0
    assert seeds_made(log) == Counter(manifest.table["seed"])
    assert status(generator.spec.folder())["made"] == 30
    for rank, order in enumerate(orders):
        for index in order:
            sample = plain[index]
            seen = np.load(tmp_path / "seen" / f"{rank}-{sample['id']}.npy")
            assert np.array_equal(seen, sample["image"].numpy())


def test_clients_get_their_volumes_though_the_service_is_killed_at_work(shared, tmp_path):
    rows = tiny_manifest(8).table
    generator = shared("sampled:Noise", seconds=0.15)
    first = generator.sample(rows[:1])  # a connection that goes stale
    pid = pid_of(generator)
    asking = clients(generator, rows, tmp_path, 3)
    until(lambda: len(list(tmp_path.glob("*-1.npy"))) == 3)
    os.kill(pid, signal.SIGKILL)
    for process in asking:
        process.join(60)
        assert process.exitcode == 0
    assert_all_there(tmp_path, rows, range(3))
    assert pid_of(generator) != pid
    assert np.array_equal(generator.sample(rows[:1]), first)


def test_a_client_killed_while_it_waits_disturbs_nobody(shared, tmp_path):
    rows = tiny_manifest(6).table
    generator = shared("sampled:Noise", seconds=0.15)
    generator.facts  # noqa: B018
    asking = clients(generator, rows, tmp_path, 3)
    until(lambda: len(list(tmp_path.glob("*-1.npy"))) == 3)
    asking[0].kill()
    for process in asking[1:]:
        process.join(60)
        assert process.exitcode == 0
    assert_all_there(tmp_path, rows, [1, 2])
    asking[0].join()
    until(lambda: status(generator.spec.folder())["clients"] == 1)
    assert status(generator.spec.folder())["queued"] == 0


def test_a_service_that_goes_down_again_is_reported_with_its_last_words(home, tmp_path):
    generator = SharedGenerator("sampled:Fatal", idle=0.5)
    with pytest.raises(
        GeneratorError, match=r"went down 2 times.*the driver says goodbye"
    ) as caught:
        generator.sample(tiny_manifest(1).table)
    assert "\n" not in str(caught.value)
    until(lambda: services(home) == [])


def test_the_service_holds_nothing_of_a_trainer_that_is_killed_and_ends(shared, home, tmp_path):
    script = """
        import os, signal
        from synthbrain.sampling import SharedGenerator, status
        shared = SharedGenerator("sampled:Noise", idle=1.5)
        print(status(shared.spec.folder())["pid"] if shared.facts else None, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    lines = "\n".join(line.strip() for line in script.splitlines())
    killed = subprocess.run(
        [sys.executable, "-c", lines], capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=False,
    )  # fmt: skip
    pid = int(killed.stdout)  # its pipes ended with it
    assert killed.returncode == -signal.SIGKILL
    assert pid in services(home)
    until(lambda: services(home) == [])


def test_a_service_started_by_hand_is_found_and_ends_when_told(shared, tmp_path):
    by_hand = subprocess.Popen(
        [sys.executable, "-m", "synthbrain.sampling", "sampled:Noise", "--device", "cpu"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    generator = shared("sampled:Noise", device="cpu")
    until(lambda: (generator.spec.folder() / "socket").exists())
    rows = tiny_manifest(3).table
    assert np.array_equal(generator.sample(rows), Noise().sample(rows))
    assert pid_of(generator) == by_hand.pid
    by_hand.terminate()
    assert by_hand.wait(20) == 0
