"""Web servers and object stores of others, on this machine only."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time

import pytest

HOST = "127.0.0.1"

_NGINX = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{}}
http {{
  log_format counted escape=json '{{"path":"$uri","range":"$http_range","status":$status,"sent":$body_bytes_sent}}';
  access_log {folder}/access.log counted;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{ listen {host}:{port}; root {root}; }}
}}
"""  # noqa: E501


def free_port():
    with socket.socket() as found:
        found.bind((HOST, 0))
        return found.getsockname()[1]


def wait_for(port, process, seconds=20.0):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert process.poll() is None, "the server ended"
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"nobody listens on {port}")


@contextlib.contextmanager
def serving(command, port):
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port, process)
        yield process
    finally:
        process.terminate()
        process.wait(timeout=20)


class Nginx:
    """Serves a folder; knows what was asked for."""

    def __init__(self, root, folder):
        self.root, self.folder, self.port = root, folder, free_port()
        self.url = f"http://{HOST}:{self.port}"

    @contextlib.contextmanager
    def running(self):
        program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
        if program is None:
            pytest.skip("nginx is not installed")
        self.folder.mkdir(parents=True)
        self.folder.chmod(0o755)
        text = _NGINX.format(folder=self.folder, host=HOST, port=self.port, root=self.root)
        (self.folder / "nginx.conf").write_text(text)
        command = [program, "-p", str(self.folder), "-c", str(self.folder / "nginx.conf")]
        with serving(command, self.port):
            yield self

    @property
    def log(self):
        time.sleep(0.1)  # nginx writes a line after the last byte is on its way
        path = self.folder / "access.log"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def forget(self):
        (self.folder / "access.log").write_text("")


class ObjectStore:
    """An S3 server (moto), in a process of its own."""

    def __init__(self):
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"

    @contextlib.contextmanager
    def running(self):
        pytest.importorskip("moto")
        command = [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(self.port)]
        with serving(command, self.port):
            yield self

    def put(self, bucket, key, data):
        """Store an object, in a new bucket."""
        import boto3

        keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b"}
        client = boto3.client("s3", endpoint_url=self.url, region_name="us-east-1", **keys)
        client.create_bucket(Bucket=bucket)
        client.put_object(Bucket=bucket, Key=key, Body=data)
