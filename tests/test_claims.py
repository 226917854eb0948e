import contextlib
import json
import os
import socket
import subprocess
import sys
import time

import pytest

from synthbrain import claims

HOUR = 3600.0


@pytest.fixture
def shard(tmp_path):
    return tmp_path / "block-0000" / "c.1.0.0.0"


def claim_of(shard, text):
    shard.parent.mkdir(exist_ok=True)
    path = shard.with_name(shard.name + ".claim")
    path.write_text(text)
    return path


def owned(host, pid):
    return json.dumps({"host": host, "pid": pid})


def age(path, seconds):
    os.utime(path, (time.time() - seconds,) * 2)


@pytest.fixture
def dead():
    """A pid that was somebody's a moment ago."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_one_claims_and_others_do_not(shard):
    assert claims.is_stale(shard)
    assert claims.claim(shard)
    assert not claims.claim(shard)
    assert not claims.is_stale(shard)
    claims.release(shard)
    claims.release(shard)
    assert claims.claim(shard)


def test_a_claim_says_who_holds_it(shard):
    claims.claim(shard)
    owner = json.loads(shard.with_name("c.1.0.0.0.claim").read_text())
    assert owner == {"host": socket.gethostname(), "pid": os.getpid()}


def test_a_dead_process_holds_nothing(shard, dead):
    claim_of(shard, owned(socket.gethostname(), dead))
    assert claims.is_stale(shard)
    assert claims.claim(shard)
    assert not claims.is_stale(shard)


def test_a_living_process_of_somebody_else_holds_its_claim(shard):
    claim_of(shard, owned(socket.gethostname(), 1))
    assert not claims.claim(shard)


def test_a_claim_of_another_host_is_believed_until_it_is_old(shard, dead):
    path = claim_of(shard, owned("elsewhere", dead))
    assert not claims.claim(shard)
    age(path, claims.STALE_SECONDS - 10)
    assert not claims.claim(shard)
    age(path, claims.STALE_SECONDS + 10)
    assert claims.claim(shard)


def test_an_untouched_claim_of_a_living_process_goes_stale(shard):
    path = claim_of(shard, owned(socket.gethostname(), os.getpid()))
    age(path, claims.STALE_SECONDS + 10)
    assert claims.claim(shard)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", "{}", '{"host": "HERE"}', '{"host": "HERE", "pid": "x"}',
     '{"host": "HERE", "pid": null}', '{"host": "HERE", "pid": 99999999999999999999}'],
)  # fmt: skip
def test_an_unreadable_claim_holds_for_a_moment_only(shard, text):
    path = claim_of(shard, text.replace("HERE", socket.gethostname()))
    assert not claims.claim(shard)
    age(path, 10)
    assert claims.claim(shard)


def test_binary_claims_are_unreadable_ones(shard):
    path = claim_of(shard, "")
    path.write_bytes(b"\xff\xfe\x00")
    assert not claims.is_stale(shard)
    age(path, 10)
    assert claims.is_stale(shard)


@pytest.mark.parametrize("skew", [HOUR, -HOUR])
def test_a_wrong_clock_never_blocks_the_work(shard, monkeypatch, skew):
    claim_of(shard, owned("elsewhere", 1))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + skew)
    assert claims.claim(shard)


def test_a_heartbeat_keeps_claims_fresh_and_the_end_releases_them(shard, monkeypatch):
    monkeypatch.setattr(claims, "_BEAT_SECONDS", 0.01)
    other = shard.with_name("c.2.0.0.0")
    paths = [path.with_name(path.name + ".claim") for path in (shard, other)]
    for path in (shard, other):
        assert claims.claim(path)
    with claims.held([shard, other]):
        for path in paths:
            age(path, HOUR)
        deadline = time.monotonic() + 10
        while any(map(claims.is_stale, (shard, other))) and time.monotonic() < deadline:
            time.sleep(0.005)
        assert not claims.is_stale(shard)
        assert not claims.is_stale(other)
    assert not any(path.exists() for path in paths)


def test_claims_are_released_when_the_work_fails(shard):
    assert claims.claim(shard)
    with pytest.raises(RuntimeError, match="sampling failed"), claims.held([shard]):
        raise RuntimeError("sampling failed")
    assert claims.is_stale(shard)


def test_a_claim_deleted_by_hand_hurts_nobody(shard, monkeypatch):
    monkeypatch.setattr(claims, "_BEAT_SECONDS", 0.001)
    assert claims.claim(shard)
    with claims.held([shard]):
        shard.with_name(shard.name + ".claim").unlink()
        time.sleep(0.01)
    assert claims.claim(shard)


def test_where_claims_cannot_be_written_work_goes_on(tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    shard = file / "block-0000" / "c.1.0.0.0"
    assert claims.claim(shard)
    assert claims.claim(shard)
    assert claims.is_stale(shard)
    with claims.held([shard]):
        pass


def test_on_a_full_disk_work_goes_on(small_disk):
    disk, _ = small_disk("16k")
    shard = disk / "c.1.0.0.0"
    with (disk / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while ballast.write(b"x" * 4096):
            pass
    assert claims.claim(shard)
    claims.release(shard)


def test_a_dead_process_that_nobody_buried_holds_nothing(shard):
    process = subprocess.Popen([sys.executable, "-c", ""])
    claim_of(shard, owned(socket.gethostname(), process.pid))
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert claims.is_stale(shard)
    process.wait()


def test_claims_of_nobody_are_swept_and_others_stay(tmp_path, dead):
    held, left, old = (tmp_path / f"block-0000/c.{n}.0.0.0" for n in range(3))
    assert claims.claim(held)
    claim_of(left, owned(socket.gethostname(), dead))
    age(claim_of(old, owned("elsewhere", 1)), HOUR)
    claims.sweep(tmp_path)
    assert [path.name for path in held.parent.iterdir()] == ["c.0.0.0.0.claim"]
    claims.sweep(tmp_path / "nowhere")
