import os
import pickle
import socket

import pytest
from faulty import FaultyServer
from hypothesis import given
from hypothesis import strategies as st

from synthbrain.errors import SourceError
from synthbrain.sources import url
from synthbrain.sources.extents import Extent, coalesce
from synthbrain.sources.url import FileBytes, HttpBytes, hub_address, open_bytes

DATA = os.urandom(5_000_000)
extents = st.lists(
    st.builds(Extent, st.integers(0, 4_000_000), st.integers(1, 900_000)), max_size=8
)


@pytest.fixture
def pauses(monkeypatch):
    waited = []
    monkeypatch.setattr("synthbrain.sources.url.time.sleep", waited.append)
    return waited


@pytest.fixture
def server(pauses):
    with FaultyServer({"a.tar": DATA}).running() as running:
        yield running


@pytest.fixture
def remote(server):
    return HttpBytes(f"{server.url}/a.tar")


def piece(extent):
    return DATA[extent.offset : extent.end]


@given(extents, st.integers(0, 10**6), st.integers(1, 10**7))
def test_requests_cover_every_extent_once_and_keep_to_their_limits(wanted, gap, limit):
    groups = coalesce(wanted, gap=gap, limit=limit)
    assert sorted(extent for _, members in groups for extent in members) == sorted(wanted)
    for request, members in groups:
        assert all(extent.within(request) for extent in members)
        assert request.size <= limit or len(set(members)) == 1 or len(members) == 1
    ends = [(request.offset, max(m.end for m in members)) for request, members in groups]
    assert ends == [(request.offset, request.end) for request, _ in groups]


@given(wanted=extents)
def test_a_file_gives_every_extent(tmp_path, wanted):
    (tmp_path / "a").write_bytes(DATA)
    found = list(FileBytes(tmp_path / "a").read(wanted))
    assert sorted(e for e, _ in found) == sorted(wanted)
    assert all(data == piece(extent) for extent, data in found)


def test_neighbours_share_a_request_and_strangers_do_not(remote, server):
    near = [Extent(0, 1000), Extent(200_000, 1000)]
    found = dict(remote.read([*near, Extent(4_000_000, 1000)]))
    assert all(data == piece(extent) for extent, data in found.items())
    assert sorted(server.ranges) == ["bytes=0-200999", "bytes=4000000-4000999"]
    assert remote.size == len(DATA)


@pytest.mark.parametrize("fault", [408, 429, 500, 502, 503, 504, "break"])
def test_what_may_pass_is_tried_again(remote, server, pauses, fault):
    server.faults = [fault, fault]
    extent = Extent(1000, 900_000)
    assert dict(remote.read([extent])) == {extent: piece(extent)}
    assert len(server.log) == 3
    assert pauses == [0.5, 1.0]


def test_a_request_that_broke_off_goes_on_where_it_stopped(remote, server):
    server.faults = ["break"]
    extent = Extent(0, 1_000_000)
    assert dict(remote.read([extent])) == {extent: piece(extent)}
    first, second = (int(wanted[6:].split("-")[0]) for wanted in server.ranges)
    assert first == 0
    assert 400_000 < second <= 500_000


def test_retry_after_is_honoured_within_reason(remote, server, pauses):
    server.faults, server.retry_after = [429, 503], "7"
    dict(remote.read([Extent(0, 10)]))
    assert pauses == [7, 7]
    server.faults, server.retry_after = [429], "999999"
    dict(remote.read([Extent(0, 10)]))
    assert pauses[2:] == [120]


@pytest.mark.parametrize(
    ("faults", "says"),
    [
        ([401], "your token may have expired"),
        ([403], "is closed to you"),
        ([404], "is not there"),
        ([416], "answered 416"),
        (["whole"], "does not answer ranges"),
        (["other"], "expected 206 with the range asked"),
        ([429] * 6, "gave up after 6 tries: the server answered 429"),
        (["break"] * 6, "gave up after 6 tries: "),
    ],
)
def test_what_does_not_pass_is_one_line_and_a_later_read_works(remote, server, faults, says):
    server.faults = faults
    with pytest.raises(SourceError, match=says) as refused:
        dict(remote.read([Extent(10, 1000)]))
    assert server.url in str(refused.value)
    assert "\n" not in str(refused.value)
    server.faults = []
    assert dict(remote.read([Extent(10, 10)])) == {Extent(10, 10): piece(Extent(10, 10))}


def test_a_server_that_stalls_is_given_up(pauses, monkeypatch):
    monkeypatch.setattr(url, "_TIMEOUT", (0.2, 0.2))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        remote = HttpBytes(f"http://127.0.0.1:{listening.getsockname()[1]}/a.tar")
        with pytest.raises(SourceError, match="gave up after 6 tries"):
            dict(remote.read([Extent(0, 1)]))


def test_no_network_is_told_as_such(pauses):
    with pytest.raises(SourceError, match="does not resolve; is this machine connected"):
        dict(HttpBytes("http://no-such-host.invalid/a.tar").read([Extent(0, 1)]))
    with pytest.raises(SourceError, match="gave up"):
        dict(HttpBytes("http://127.0.0.1:9/a.tar").read([Extent(0, 1)]))


def test_a_file_that_changes_between_ranges_is_noticed(remote, server):
    dict(remote.read([Extent(0, 10)]))
    dict(remote.read([Extent(20, 10)]))
    assert [h.get("If-Range") for h in server.headers] == [None, '"1"']


def test_headers_go_along_but_not_into_messages(server):
    remote = HttpBytes(f"{server.url}/a.tar", {"Authorization": "Bearer hf_secret"})
    dict(remote.read([Extent(0, 10)]))
    assert server.headers[0]["Authorization"] == "Bearer hf_secret"
    assert "secret" not in repr(remote)


def test_closing_the_iterator_stops_the_work(remote, server):
    extents = [Extent(at, 10) for at in range(0, 4_400_000, 1_100_000)]
    reading = remote.read(extents * 1)
    next(reading)
    reading.close()
    assert len(server.log) <= 8


def test_connections_do_not_cross_processes(remote):
    dict(remote.read([Extent(0, 10)]))
    copy = pickle.loads(pickle.dumps(remote))
    assert copy._sessions == {}
    assert dict(copy.read([Extent(0, 10)])) == {Extent(0, 10): DATA[:10]}


def test_addresses_are_told_apart(tmp_path):
    assert isinstance(open_bytes(tmp_path / "a.tar"), FileBytes)
    assert isinstance(open_bytes(f"file://{tmp_path}/a.tar"), FileBytes)
    assert open_bytes((tmp_path / "a b.tar").as_uri()) == FileBytes(tmp_path / "a b.tar")
    assert isinstance(open_bytes("https://host/a.tar"), HttpBytes)
    assert open_bytes("hf://datasets/org/name@v1/packs/a.zip").name.startswith("hf://")
    for odd in ("ftp://host/a", "javascript://x", "gopher://a", "local+pickle://x"):
        with pytest.raises(SourceError, match="expected an address of"):
            open_bytes(odd)
    with pytest.raises(SourceError, match="is no address on the Hub"):
        hub_address("hf://justaname")


def test_offline_mode_is_honoured(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE is set"):
        open_bytes("hf://datasets/org/name/a.zip")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SourceError, match="nowhere"):
        list(FileBytes(tmp_path / "nowhere").read([Extent(0, 1)]))
    (tmp_path / "short").write_bytes(b"abc")
    with pytest.raises(SourceError, match="ends inside"):
        list(FileBytes(tmp_path / "short").read([Extent(0, 10)]))


def test_an_extent_without_bytes_needs_no_request(remote, server):
    wanted = [Extent(4_000_000, 0), Extent(0, 10)]
    assert sorted(remote.read(wanted)) == [(Extent(0, 10), DATA[:10]), (Extent(4_000_000, 0), b"")]
    assert len(server.log) == 1
