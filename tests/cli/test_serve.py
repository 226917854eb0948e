import signal
import subprocess
import sys

import pytest

from synthbrain.sampling.spec import Spec

COMMAND = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run, it may be ignored
from synthbrain.cli import app
app()
"""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("phantom", "--memory", "3"), "memory must be a share in (0, 1], found 3.0"),
        (("phantom", "--status"), "no sampling service"),
        (("phantom", "--json"), "--json goes with --status"),
        (("nobody",), "nobody"),
    ],
)
def test_what_cannot_be_served_is_told_in_one_line(run, options, words):
    done = run("serve-samples", *options)
    assert done.exit_code == 2
    assert words in done.stderr
    assert "serving" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.usefixtures("phantom_home")
def test_it_says_that_it_serves_and_goes_when_interrupted():
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, "serve-samples", "phantom"],
        stderr=subprocess.PIPE, text=True,
    ) as service:  # fmt: skip
        first = service.stderr.readline()
        folder = Spec("phantom", None, {}).folder()
        there = folder.exists()
        service.send_signal(signal.SIGINT)
        try:
            _, rest = service.communicate(timeout=60)
        finally:
            service.kill()
    assert (first, rest) == ("serving phantom; stop with Ctrl-C\n", "stopped\n")
    assert there
    assert service.returncode == 0
    assert not folder.exists()
