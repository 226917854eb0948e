"""BitTorrent programs of others, and web seeds good and bad, on this machine only."""

import contextlib
import http.server
import json
import re
import shutil
import socket
import struct
import subprocess
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import libtorrent as lt
import pytest

HOST = "127.0.0.1"
WEB_HOST = "127.0.0.2"
"""libtorrent bans by address: a web seed that lies must not share the honest peers'."""

QUIET = (
    "--no-conf", "--enable-dht=false", "--enable-dht6=false", "--bt-enable-lpd=false",
    "--enable-peer-exchange=false", "--disable-ipv6", "--summary-interval=0",
    "--file-allocation=none",
)  # fmt: skip
TRANSMISSION = {
    "dht-enabled": False, "lpd-enabled": False, "pex-enabled": False, "utp-enabled": False,
    "port-forwarding-enabled": False, "rpc-bind-address": HOST, "rpc-whitelist-enabled": False,
    "bind-address-ipv4": HOST, "bind-address-ipv6": "::1", "ratio-limit-enabled": False,
    "preallocation": 0,
}  # fmt: skip


def program(name):
    """Path of a program; skips the test where it is not installed."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def free_port():
    with socket.socket() as found:
        found.bind((HOST, 0))
        return found.getsockname()[1]


def wait_until(condition, seconds=20.0, what="that"):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited {seconds:g} s for {what} in vain"
        time.sleep(0.05)


def listens(port, host=HOST):
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0


def received(source):
    """Bytes of payload that reached a torrent's file so far, once no more come."""
    counts = []
    for event in source._process.events():
        counts += [source.status.received] * (event["event"] == "status")
        if len(counts) > 3 and counts[-3] == counts[-1]:
            return counts[-1]
    raise AssertionError


def own_address():
    """This machine's address in its network, loopback if it has none. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return HOST
        return probe.getsockname()[0]


@contextlib.contextmanager
def running(command):
    """A process that is killed at the end of the block."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()  # asked kindly, they take leave of their trackers for seconds
        process.wait()


def ask(url, method, **arguments):
    """One JSON call; gives the reply."""
    body = json.dumps({"jsonrpc": "2.0", "id": "0", "method": method} | arguments).encode()
    with urllib.request.urlopen(urllib.request.Request(url, body), timeout=10) as reply:
        return json.load(reply)


@dataclass
class Aria2:
    """A running aria2c."""

    address: tuple[str, int]
    rpc: str

    def sent(self):
        """Bytes of payload it gave away."""
        (active,) = ask(self.rpc, "aria2.tellActive", params=[["uploadLength"]])["result"]
        return int(active["uploadLength"])


@contextlib.contextmanager
def aria2_seed(folder, torrent, limit=0, host=HOST):
    """aria2c seeding what lies in a folder; ``limit`` in bytes a second."""
    port, rpc = free_port(), free_port()
    command = [
        program("aria2c"), *QUIET, f"--listen-port={port}", "--seed-ratio=0", "--seed-time=600",
        "--bt-seed-unverified=true", "--enable-rpc", f"--rpc-listen-port={rpc}",
        f"--max-upload-limit={limit}", f"--interface={host}", f"--dir={folder}", str(torrent),
    ]  # fmt: skip
    with running(command):
        wait_until(lambda: listens(port, host) and listens(rpc), what="aria2c")
        yield Aria2((host, port), f"http://{HOST}:{rpc}/jsonrpc")


@dataclass
class Transmission:
    """A running transmission-daemon."""

    address: tuple[str, int]
    rpc: str
    session: str = ""

    def ask(self, method, **arguments):
        body = json.dumps({"method": method, "arguments": arguments}).encode()
        for _ in range(2):
            headers = {"X-Transmission-Session-Id": self.session}
            try:
                request = urllib.request.Request(self.rpc, body, headers)
                with urllib.request.urlopen(request, timeout=10) as reply:
                    answer = json.load(reply)
                    assert answer["result"] == "success", answer
                    return answer["arguments"]
            except urllib.error.HTTPError as error:
                self.session = error.headers.get("X-Transmission-Session-Id", "")
        raise AssertionError("transmission-daemon does not answer")

    def get(self, name):
        """A property of its only torrent."""
        torrents = self.ask("torrent-get", fields=[name])["torrents"]
        return torrents[0][name] if torrents else None


@contextlib.contextmanager
def transmission(folder, torrent, config, limit=0, host=HOST):
    """transmission-daemon on a folder, seeding if all is there; ``limit`` in kB/s."""
    name = program("transmission-daemon")
    port, rpc = free_port(), free_port()
    config = Path(config)
    config.mkdir(parents=True, exist_ok=True)
    settings = TRANSMISSION | {
        "peer-port": port, "rpc-port": rpc, "bind-address-ipv4": host, "download-dir": str(folder),
        "speed-limit-up": limit, "speed-limit-up-enabled": bool(limit),
    }  # fmt: skip
    (config / "settings.json").write_text(json.dumps(settings))
    with running([name, "--foreground", "--config-dir", str(config)]):
        wait_until(lambda: listens(rpc), what="transmission-daemon")
        daemon = Transmission((host, port), f"http://{HOST}:{rpc}/transmission/rpc")
        daemon.ask("torrent-add", filename=str(torrent))
        yield daemon


@contextlib.contextmanager
def transmission_seed(folder, torrent, config, limit=0):
    """transmission-daemon that has checked its files and seeds."""
    with transmission(folder, torrent, config, limit) as daemon:
        wait_until(lambda: daemon.get("percentDone") == 1, what="transmission's check")
        wait_until(lambda: daemon.get("status") == 6, what="transmission to seed")
        yield daemon


class _Quiet(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """Clients that hang up are no news."""


@contextlib.contextmanager
def serving(handler, host=HOST, **attributes):
    try:
        server = _Server((host, 0), handler)
    except OSError as error:
        pytest.skip(f"cannot listen on {host}: {error}")
    for name, value in attributes.items():
        setattr(server, name, value)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Tracker(_Quiet):
    def do_GET(self):
        host, port = self.server.peer
        peers = socket.inet_aton(host) + struct.pack(">H", port)
        body = lt.bencode({b"interval": 60, b"peers": peers})
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def tracker(peer):
    """A tracker that tells everybody of one peer: programs take no peers otherwise."""
    with serving(_Tracker, peer=peer) as server:
        yield f"http://{HOST}:{server.server_port}/announce"


def aria2_fetch(torrent, folder, peer, seconds=60):
    """Download a torrent from one peer with aria2c."""
    with tracker(peer) as url:
        command = [
            program("aria2c"), *QUIET, f"--listen-port={free_port()}", "--seed-time=0",
            f"--interface={HOST}", f"--bt-tracker={url}", f"--dir={folder}", str(torrent),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=seconds)


@dataclass
class WebSeed:
    """A web seed and what it was asked for."""

    url: str
    ranges: list = field(default_factory=list)


class _Web(_Quiet):
    """Answers ranges of one file, in the manner of ``server.manner``."""

    def do_GET(self):
        data, manner = self.server.data, self.server.manner
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        begin, end = (int(found[1]), int(found[2]) + 1) if found else (0, len(data))
        self.server.ranges.append((begin, end))
        body = data[begin:end]
        if manner == "lies":
            body = bytes(byte ^ 0xFF for byte in body[:64]) + body[64:]
        if manner == "closes":
            self.close_connection = True
            return
        if manner == "stalls":
            time.sleep(600)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body[: len(body) // 2] if manner == "short" else body)
        self.close_connection = manner == "short"


@contextlib.contextmanager
def web_seed(data, name, manner="honest"):
    """A web server with one file: honest, or it lies, stalls, closes or is short."""
    seed = WebSeed("")
    with serving(_Web, WEB_HOST, data=data, manner=manner, ranges=seed.ranges) as server:
        seed.url = f"http://{WEB_HOST}:{server.server_port}/{name}"
        yield seed
