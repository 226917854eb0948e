"""What all commands have in common: help, streams, errors, exit codes."""

import os
import signal
import subprocess
import sys
import time

import pytest

from synthbrain import generators
from synthbrain.cli import app
from synthbrain.testing import TinyGenerator

COMMANDS = (
    "demo", "info", "select", "draw", "fill", "verify", "export", "generate", "pull", "index",
    "seed", "pack", "prepare", "torrent", "publish", "cite", "export-bundle",
    "train", "evaluate", "serve-samples",
)  # fmt: skip

SLOW_TINY = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from synthbrain import generators, testing
class Slow(testing.TinyGenerator):
    def sample(self, rows):
        time.sleep(0.1)
        return super().sample(rows)
generators.GENERATORS["tiny"] = Slow
from synthbrain.cli import main
main()
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_examples(run, command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Examples" in result.stdout
    assert f"synthbrain {command}" in result.stdout


def test_help_lists_the_commands_and_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['synthbrain', '--help']\n"
        "from synthbrain.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'monai', 'pandas', 'nibabel', 'PIL', 'scipy', 'click'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr.strip() == "[]"
    for command in COMMANDS:
        assert command in done.stdout


def test_the_version_is_shown(run):
    result = run("--version")
    assert (result.exit_code, result.stdout[:11]) == (0, "synthbrain ")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["info", "nowhere"], "no manifest 'nowhere'"),
        (["select", "tiny", "--split", "dev"], "has no split 'dev'"),
        (["select", "tiny", "--age", "74y:59y"], "is reversed"),
        (["select", "tiny", "--age", "0.5:1.5"], "--extrapolate"),
        (["select", "tiny", "--sex", "both"], 'sex must be "female" or "male"'),
        (["select", "tiny", "--limit", "0"], "limit must be at least 1"),
        (["select", "tiny", "--where", "shoe_size > 40"], "is not a query over the rows"),
        (["select", "tiny", "--ids", "no-file"], "cannot read ids from no-file"),
        (["select", "tiny", "--csv", "--json"], "exclude one another"),
        (["select", "tiny", "--out", "tiny"], "already exists"),
        (["draw", "-n", "2", "--out", "Capital"], "cannot name a manifest"),
        (["draw", "-n", "2", "--out", "tiny"], "already exists"),
        (["draw", "-n", "2", "--out", "new", "--like", "nowhere"], "no manifest 'nowhere'"),
        (["fill", "tiny", "--generator", "magic"], "unknown generator 'magic'"),
        (["fill", "tiny", "--generator", "none"], "are not in"),
        (["verify", "tiny", "--where", "1"], "must be a condition"),
        (["export", "tiny", "--out", "x"], "none of the 12 volumes is stored"),
        (["export", "tiny", "--out", "x", "--format", "dicom"], "--format must be one of"),
        (["export", "tiny", "--out", "x", "--generator", "tiny", "--dtype", "int8"], "dtype must"),
        (["demo", "--generator", "none"], "--generator must be auto"),
    ],
)
def test_an_error_is_one_line_on_stderr_and_exit_code_2(run, cohort, line, says):
    result = run(*line)
    assert result.exit_code == 2, result.output
    errors = [text for text in result.stderr.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1
    assert says in errors[0]
    assert "Traceback" not in result.output
    assert result.stdout == ""


@pytest.mark.parametrize("line", [["fill"], ["select", "tiny", "--shoe"], ["draw", "-n", "0"], []])
def test_a_line_that_does_not_parse_exits_with_2(run, line):
    assert run(*line).exit_code == 2


def test_debug_adds_the_traceback(run, monkeypatch):
    assert "Traceback" in run("--debug", "info", "nowhere").stderr
    monkeypatch.setenv("SYNTHBRAIN_DEBUG", "1")
    assert "Traceback" in run("info", "nowhere").stderr


def test_a_file_system_error_is_one_line_too(run, cohort):
    result = run("draw", "-n", "2", "--out", cohort / "manifest.json" / "new")
    assert (result.exit_code, result.stderr.count("error: ")) == (2, 1)
    assert "Traceback" not in result.stderr


def test_warnings_are_single_notes(run, cohort, monkeypatch):
    monkeypatch.setattr(generators, "GENERATORS", {"tiny": TinyGenerator})
    monkeypatch.setattr(generators, "_warned", set())
    result = run("fill", cohort, "--dry-run")
    notes = [line for line in result.stderr.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert "'tiny', a stand-in" in notes[0]
    assert "Warning" not in result.stderr


def test_an_interrupt_says_what_is_kept_and_how_to_continue(cohort, home):
    line = [sys.executable, "-c", SLOW_TINY, "fill", str(cohort), "--generator", "tiny"]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    deadline = time.monotonic() + 60
    while not list(home.glob("store/*/*/volumes/*/c.*.0")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    kept = int(stderr.split("interrupted: ")[1].split(" of 12")[0])
    assert 1 <= kept < 12
    assert f"to continue: synthbrain fill {cohort} --generator tiny" in stderr
    assert "Traceback" not in stderr


def test_the_app_is_the_entry_point():
    assert {command.name or command.callback.__name__ for command in app.registered_commands} == {
        *COMMANDS
    }
