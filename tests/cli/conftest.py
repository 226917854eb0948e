import pytest
from typer.testing import CliRunner

from synthbrain import generators
from synthbrain.cli import app
from synthbrain.testing import TinyGenerator, tiny_manifest


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    monkeypatch.setenv("SYNTHBRAIN_HOME", str(folder))
    monkeypatch.delenv("SYNTHBRAIN_DEBUG", raising=False)
    monkeypatch.setitem(generators.GENERATORS, "tiny", TinyGenerator)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def run():
    """Runs a command line; result has exit_code, stdout, stderr."""

    def invoke(*args, **options):
        return CliRunner().invoke(app, [str(arg) for arg in args], **options)

    return invoke


@pytest.fixture
def cohort(tmp_path):
    """Folder of 12 tiny recipes."""
    return tiny_manifest(12).save(tmp_path / "tiny")


@pytest.fixture
def filled(cohort, run):
    """The same, with all its volumes stored."""
    assert run("fill", cohort, "--generator", "tiny").exit_code == 0
    return cohort
