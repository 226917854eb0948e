"""A server on this machine that speaks the Hugging Face Hub's protocol, faults included."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"

Fault = int | str | None


class LocalHub:
    """Repositories as dicts of files; ``fault`` makes every file request fail in some way.

    ``fault`` is an HTTP status, ``"break"`` (the connection ends in the middle of a file), or
    None. ``fails`` is asked the same for each request, by method and path. ``log`` holds the
    method, path and Range of every request. Repositories of data sets are called
    ``datasets/ORG/NAME``; clients may create them, upload to them and commit.
    """

    def __init__(self, repos: dict[str, dict[str, bytes]]):
        self.repos, self.fault, self.gated = repos, None, False
        self.fails: Callable[[str, str], Fault] = lambda method, path: None
        self.log: list[tuple[str, str, str | None]] = []
        self.tokens: set[str | None] = set()
        self.blobs: dict[str, bytes] = {}
        self.commits: list[tuple[str, str, list[dict]]] = []
        self.branches: dict[tuple[str, str], dict[str, bytes]] = {}
        self.heads: dict[tuple[str, str], str] = {}
        self.snapshots: dict[tuple[str, str], dict[str, bytes]] = {}
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @contextlib.contextmanager
    def running(self):
        thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            self.server.server_close()

    def files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """Files of a repository at a branch or commit."""
        if (repo, revision) in self.snapshots:
            return self.snapshots[repo, revision]
        if revision in ("main", COMMIT):
            return self.repos.get(repo)
        return self.branches.get((repo, revision))

    def head(self, repo: str, revision: str) -> str:
        """The commit a branch or commit means."""
        if (repo, revision) in self.snapshots:
            return revision
        return self.heads.get((repo, revision), COMMIT)

    def commit(self, repo: str, branch: str, operations: list[dict]) -> str:
        """Apply a commit's operations and return its name."""
        with self.lock:
            files = self.files(repo, branch)
            for operation in operations:
                kind, value = operation["key"], operation["value"]
                if kind == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif kind == "lfsFile":
                    files[value["path"]] = self.blobs[value["oid"]]
                elif kind == "deletedFile":
                    del files[value["path"]]
            self.commits.append((repo, branch, operations))
            sha = hashlib.sha1(str(len(self.commits)).encode()).hexdigest()
            self.heads[repo, branch] = sha
            self.snapshots[repo, sha] = dict(files)
            return sha


def is_large(path: str) -> bool:
    """Whether a file is kept outside of git, as the Hub decides by its name."""
    return path.endswith((".zip", ".parquet", ".bin"))


def _described(path: str, data: bytes) -> dict:
    git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry = {"type": "file", "path": path, "size": len(data), "oid": git}
    if is_large(path):
        digest = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
    return entry


def _folders(names: list[str]) -> set[str]:
    parts = (name.split("/")[:-1] for name in names)
    return {"/".join(part[: n + 1]) for part in parts for n in range(len(part))}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def do_POST(self):
        self._answer()

    def do_PUT(self):
        self._answer()

    def _answer(self):
        hub = self.hub
        hub.log.append((self.command, self.path, self.headers.get("Range")))
        hub.tokens.add(self.headers.get("Authorization"))
        fault = hub.fails(self.command, self.path)
        if fault == "break":
            return self._hang_up()
        body = self._body()
        if isinstance(fault, int):
            return self._refuse(fault)
        path = unquote(urlsplit(self.path).path).lstrip("/")
        if path.startswith("lfs/"):
            return self._large_file(path.removeprefix("lfs/"), body)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        if path.startswith("api/"):
            return self._api(path.removeprefix("api/"), body)
        return self._resolve(path)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _resolve(self, path: str):
        hub = self.hub
        repo, _, rest = path.partition("/resolve/")
        revision, _, file = rest.partition("/")
        if isinstance(hub.fault, int):
            return self._refuse(hub.fault)
        if hub.gated:
            return self._refuse(403, "GatedRepo", "Access to this model is restricted")
        if repo not in hub.repos:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        files = hub.files(repo, revision)
        if files is None:
            return self._refuse(404, "RevisionNotFound", "Revision not found")
        if file not in files:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        return self._file(files[file], hub.head(repo, revision))

    def _api(self, rest: str, body: bytes):
        if rest == "whoami-v2":
            return self._json({"type": "user", "name": "somebody", "orgs": []})
        if rest == "validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if isinstance(self.hub.fault, int):
            return self._refuse(self.hub.fault)
        if rest == "repos/create":
            return self._create(json.loads(body))
        match = re.fullmatch(
            r"(models|datasets)/([^/]+(?:/[^/]+)??)"
            r"(?:/(revision|tree|paths-info|preupload|commit|branch)/([^/]+)(?:/(.*))?)?",
            rest,
        )
        if match is None:
            return self._refuse(404)
        kind, name, what, revision, below = match.groups()
        repo = name if kind == "models" else f"datasets/{name}"
        if repo not in self.hub.repos:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        revision = revision or "main"
        if what != "branch" and self.hub.files(repo, revision) is None:
            return self._refuse(404, "RevisionNotFound", "Revision not found")
        answer = getattr(self, f"_api_{(what or 'revision').replace('-', '_')}")
        return answer(repo, revision, body if self.command == "POST" else below or "")

    def _create(self, wanted: dict):
        repo = f"{wanted['organization']}/{wanted['name']}"
        key = repo if wanted.get("type", "model") == "model" else f"datasets/{repo}"
        told = json.dumps({"url": f"{self.hub.url}/{key}", "id": repo}).encode()
        status = 409 if key in self.hub.repos else 200
        self.hub.repos.setdefault(key, {})
        return self._send(status, told)

    def _api_revision(self, repo: str, revision: str, _):
        siblings = [{"rfilename": name} for name in self.hub.files(repo, revision)]
        sha = self.hub.head(repo, revision)
        self._json({"id": repo.removeprefix("datasets/"), "sha": sha, "siblings": siblings})

    def _api_tree(self, repo: str, revision: str, below: str):
        files = self.hub.files(repo, revision)
        recursive = "recursive=true" in self.path.lower()
        inside = [name for name in files if not below or name.startswith(f"{below}/")]
        folders = [{"type": "directory", "path": f, "oid": COMMIT} for f in _folders(inside)]
        entries = [*folders, *(_described(name, files[name]) for name in inside)]
        depth = below.count("/") + 1 if below else 0
        self._json(
            [e for e in entries if e["path"].startswith(below) and e["path"] != below
             and (recursive or e["path"].count("/") == depth)]
        )  # fmt: skip

    def _api_paths_info(self, repo: str, revision: str, body: bytes):
        files = self.hub.files(repo, revision)
        json_like = body.lstrip().startswith(b"{")
        paths = json.loads(body)["paths"] if json_like else parse_qs(body.decode())["paths"]
        folders = _folders(list(files))
        found = [_described(path, files[path]) for path in paths if path in files]
        found += [{"type": "directory", "path": p, "oid": COMMIT} for p in paths if p in folders]
        self._json(found)

    def _api_preupload(self, repo: str, revision: str, body: bytes):
        files = self.hub.files(repo, revision)
        self._json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                        "shouldIgnore": False,
                        "oid": _described(file["path"], files[file["path"]])["oid"]
                        if file["path"] in files
                        else None,
                    }
                    for file in json.loads(body)["files"]
                ]
            }
        )

    def _api_commit(self, repo: str, revision: str, body: bytes):
        operations = [json.loads(line) for line in body.splitlines()]
        sha = self.hub.commit(repo, revision, operations)
        self._json({"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha})

    def _api_branch(self, repo: str, revision: str, _):
        if revision == "main" or (repo, revision) in self.hub.branches:
            return self._refuse(409)
        self.hub.branches[repo, revision] = dict(self.hub.repos[repo])
        return self._json({})

    def _batch(self, wanted: dict):
        objects = []
        for item in wanted["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.blobs:
                address = f"{self.hub.url}/lfs"
                answer["actions"] = {
                    "upload": {"href": f"{address}/{item['oid']}"},
                    "verify": {"href": f"{address}/verify"},
                }
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def _large_file(self, name: str, body: bytes):
        if name == "verify":
            wanted = json.loads(body)
            found = self.hub.blobs.get(wanted["oid"], b"")
            return self._json({}) if len(found) == wanted["size"] else self._refuse(404)
        if hashlib.sha256(body).hexdigest() != name:
            return self._refuse(400)
        self.hub.blobs[name] = body
        return self._json({})

    def _file(self, data: bytes, commit: str):
        span = _span(self.headers.get("Range"), len(data))
        if span is None:
            return self._refuse(416)
        body = data[span[0] : span[1]]
        self.send_response(206 if self.headers.get("Range") else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        if self.headers.get("Range"):
            self.send_header("Content-Range", f"bytes {span[0]}-{span[1] - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.fault == "break":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self._hang_up()
            return
        self.wfile.write(body)

    def _hang_up(self):
        self.close_connection = True
        self.connection.close()

    def _refuse(self, status: int, code: str = "", message: str = "no"):
        headers = {"X-Error-Code": code, "X-Error-Message": message} if code else {}
        if status == 429:
            headers["Retry-After"] = "0"
        self._send(status, b'{"error": "no"}', headers)

    def _json(self, value: object):
        self._send(200, json.dumps(value).encode())

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _span(wanted: str | None, size: int) -> tuple[int, int] | None:
    """First byte and the one after the last of a Range; None if it lies outside the file."""
    if wanted is None:
        return 0, size
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    if not first:
        return max(size - int(last), 0), size
    start, end = int(first), min(int(last) + 1, size) if last else size
    return (start, end) if start < end else None
