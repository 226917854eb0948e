import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # or page faults take a third of torch's time
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # They and the processes they start share the cores; torch and numpy read it when they load.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import subprocess
import sys
import textwrap

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

from synthbrain.manifest import Manifest
from synthbrain.testing import TinyGenerator, tiny_manifest

_ALLOWED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
settings.register_profile("dev", deadline=None, suppress_health_check=_ALLOWED)
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """No test reads or writes the real home."""
    folder = tmp_path / "home"
    monkeypatch.setenv("SYNTHBRAIN_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder for all tests of a run, also those of its other workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if workers else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def atlas_cache(shared):
    """A folder with the phantoms' atlas, which takes a while to derive."""
    from generation.atlas import load_atlas

    folder = shared / "atlas"
    with FileLock(f"{folder}.lock"):
        load_atlas(folder)
    return folder


@pytest.fixture(scope="session")
def phantom(atlas_cache):
    """The phantom generator, which takes a while to get going; leave it as it is."""
    from generation.phantom import PhantomGenerator

    return PhantomGenerator(cache=atlas_cache)


@pytest.fixture
def one_thread():
    """Tiny networks are slower with several."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def phantom_home(home, shared, atlas_cache):
    """A home whose phantoms find their atlas ready, and what another such home has stored."""
    home.mkdir()
    (home / "cache").symlink_to(atlas_cache)
    (shared / "store").mkdir(exist_ok=True)
    (home / "store").symlink_to(shared / "store")
    return home


class Recorder(TinyGenerator):
    """Remembers which rows it was asked for, a list of ids for each call."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.batches = []

    def sample(self, rows):
        self.batches.append(rows.index.tolist())
        return super().sample(rows)

    @property
    def made(self):
        return [id for batch in self.batches for id in batch]


@pytest.fixture
def recorder():
    return Recorder


@pytest.fixture
def of_geometry():
    """A manifest of ``n`` recipes with volumes of some geometry."""

    def make(geometry, n=4, **options):
        tiny = tiny_manifest(n, **options)
        return Manifest.create(tiny.header.model_copy(update={"geometry": geometry}), tiny.table)

    return make


@pytest.fixture
def python():
    """Runs a script in a fresh interpreter and returns what it printed; it must not hang."""

    def run(script, *args, timeout=100, **env):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), *map(str, args)],
            capture_output=True, text=True, timeout=timeout, env=os.environ | env, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of some size; gives the folder and a function that remounts it."""
    mounted = []

    def mount(size):
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount command here")
        if done.returncode != 0:
            pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
        mounted.append(folder)

        def remount(option):
            subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)

        return folder, remount

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)
