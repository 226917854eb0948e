import io

import pytest

from synthbrain import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def stderr(monkeypatch):
    def replace(stream):
        monkeypatch.setattr("sys.stderr", stream)
        return stream

    return replace


def work(told):
    for volume in range(2):
        for step in range(3):
            told("sampling", step + 1, 3)
        told("decoding", 1, 1)
        yield volume


class TestStages:
    def test_a_log_gets_one_line_when_all_is_made(self, stderr):
        stream = stderr(io.StringIO())
        with progress.stages(2) as told:
            assert list(work(told)) == [0, 1]
        assert stream.getvalue().splitlines() == ["decoding: 1/1, 2 of 2 volumes made in 0 s"]

    def test_a_log_gets_a_line_now_and_then(self, stderr, monkeypatch):
        stream = stderr(io.StringIO())
        monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
        with progress.stages(2) as told:
            list(work(told))
        lines = stream.getvalue().splitlines()
        assert len(lines) == 8
        assert lines[0].startswith("sampling: 1/3, 0 of 2 volumes made")

    def test_a_terminal_gets_a_bar(self, stderr):
        stream = stderr(Terminal())
        with progress.stages(2) as told:
            list(work(told))
        assert "2 of 2 volumes made" in stream.getvalue()


class TestTrack:
    def test_steps_pass_through(self, stderr):
        stream = stderr(io.StringIO())
        assert list(progress.track("abc", total=3, what="reading")) == ["a", "b", "c"]
        assert stream.getvalue().splitlines() == ["reading: 3/3 in 0 s"]

    def test_silence_on_request(self, stderr):
        stream = stderr(io.StringIO())
        assert list(progress.track("abc", total=3, what="reading", show=False)) == list("abc")
        assert stream.getvalue() == ""

    def test_a_terminal_gets_a_bar(self, stderr):
        stream = stderr(Terminal())
        assert list(progress.track("abc", total=3, what="reading")) == list("abc")
        assert "3/3" in stream.getvalue()
