"""Files at addresses that answer ranges: web servers, object stores, the Hub, disks."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from synthbrain.errors import SourceError
from synthbrain.header import SCHEMES
from synthbrain.sources.base import Cost
from synthbrain.sources.extents import Bytes, Extent, coalesce

if TYPE_CHECKING:
    import requests

GAP = 2**20
"""Unwanted bytes to read rather than send another request."""

LIMIT = 2**26
"""Largest request."""

_THREADS = 4
_ATTEMPTS = 6
_PAUSE = 0.5
_LONGEST_PAUSE = 120.0
_TIMEOUT = (10.0, 30.0)
_TRANSIENT = {408, 429, 500, 502, 503, 504}
_STEP = 2**16
_REQUEST = 2**19
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_BYTES_PER_SECOND = {"disk": 5e8, "network": 2e7}
_HUB = re.compile(
    r"hf://(?:datasets/)?(?P<repo>(?!datasets/)[\w.-]+/[\w.-]+?)(?:@(?P<revision>[^/]+))?(?:/(?P<file>.+))?"
)


def open_bytes(url: str | os.PathLike[str]) -> Bytes:
    """The file at an address, or on disk; nothing is asked yet.

    Parameters
    ----------
    url
        A path, or an address with one of the schemes of :data:`synthbrain.header.SCHEMES`;
        ``s3`` and ``gs`` need ``s3fs`` and ``gcsfs``.

    Raises
    ------
    SourceError
        Another scheme.
    """
    scheme, found, rest = os.fspath(url).partition("://")
    if not found:
        return FileBytes(Path(url))
    if scheme not in SCHEMES:
        raise SourceError(f"cannot read {url}: expected an address of {', '.join(SCHEMES)}")
    if scheme == "file":
        return FileBytes(Path(unquote(rest)))
    if scheme == "hf":
        return hub_file(str(url))
    return HttpBytes(str(url)) if scheme in ("http", "https") else RemoteBytes(str(url))


def hub_file(url: str) -> HttpBytes:
    """A file of a dataset repository, ``hf://datasets/ORG/NAME@REVISION/FILE``.

    ``HF_ENDPOINT``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE`` work as usual.
    """
    import huggingface_hub
    from huggingface_hub import constants

    repo, revision, file = hub_address(url)
    if constants.HF_HUB_OFFLINE:
        raise SourceError(f"{url} is on the Hub and HF_HUB_OFFLINE is set; unset it to fetch")
    address = huggingface_hub.hf_hub_url(
        repo, file, repo_type="dataset", revision=revision, endpoint=os.environ.get("HF_ENDPOINT")
    )
    token = huggingface_hub.get_token()
    return HttpBytes(address, {"Authorization": f"Bearer {token}"} if token else {}, name=url)


def hub_address(url: str) -> tuple[str, str | None, str]:
    """Repository, revision and file of an ``hf://`` address.

    Examples
    --------
    >>> hub_address("hf://datasets/org/name@v1/packs/a.zip")
    ('org/name', 'v1', 'packs/a.zip')
    """
    match = _HUB.fullmatch(url)
    if match is None:
        raise SourceError(f"{url} is no address on the Hub; expected hf://datasets/ORG/NAME")
    return match["repo"], match["revision"], match["file"] or ""


@dataclass(frozen=True)
class FileBytes:
    """A file on disk, read in place."""

    path: Path

    @property
    def name(self) -> str:
        """Its path."""
        return str(self.path)

    @cached_property
    def size(self) -> int:
        """Bytes of the file."""
        try:
            return self.path.stat().st_size
        except OSError as error:
            raise SourceError(f"cannot read {self.path}: {error.strerror}") from None

    @property
    def unit(self) -> int:
        """A sector."""
        return 512

    def cost(self, extents: Sequence[Extent]) -> Cost:
        """Bytes to read."""
        return _cost(extents, "disk")

    def waves(self, extents: Sequence[Extent]) -> Iterable[Sequence[Extent]]:
        """All at once."""
        return [sorted(extents)] if extents else []

    def read(self, extents: Sequence[Extent]) -> Iterator[tuple[Extent, bytes]]:
        """Yield extents in file order."""
        try:
            with self.path.open("rb", buffering=0) as file:
                for extent in sorted(extents):
                    data = os.pread(file.fileno(), extent.size, extent.offset)
                    if len(data) != extent.size:
                        raise SourceError(f"{self.path} ends inside byte {extent.offset:,}+")
                    yield extent, data
        except OSError as error:
            if isinstance(error, SourceError):
                raise
            raise SourceError(f"cannot read {self.path}: {error.strerror}") from error

    def spare(self) -> list[Extent]:
        """Nothing is read beyond what is asked for."""
        return []

    def close(self) -> None:
        """Nothing is open."""


@dataclass
class HttpBytes:
    """A file on a web server, read by ranges.

    Parameters
    ----------
    url
        Its address.
    headers
        Sent with every request to that host, and to no other.
    name
        For messages; the address by default.

    Notes
    -----
    Neighbouring extents share a request, four requests run at a time. What may pass (408, 429,
    5xx, a connection that breaks off or stalls) is retried with growing pauses, or after what
    ``Retry-After`` asks for; a request that broke off goes on where it stopped.
    """

    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    name: str = ""
    _tag: str | None = field(default=None, init=False, repr=False)
    _size: int | None = field(default=None, init=False, repr=False)
    _sessions: dict[int, requests.Session] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.name = self.name or self.url

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sessions": {}}

    @property
    def size(self) -> int:
        """Bytes of the file, as the server says."""
        # No cached_property: in Python 3.11 its lock may be held by a thread while workers fork.
        if self._size is None:
            self._size = self._get(Extent(0, 1))[1]
        return self._size

    @property
    def unit(self) -> int:
        """What arrives while a request travels."""
        return _REQUEST

    def cost(self, extents: Sequence[Extent]) -> Cost:
        """Bytes to transfer, at 20 MB/s."""
        return _cost([request for request, _ in self._requests(extents)], "network")

    def waves(self, extents: Sequence[Extent]) -> Iterable[Sequence[Extent]]:
        """All at once."""
        return [sorted(extents)] if extents else []

    def read(self, extents: Sequence[Extent]) -> Iterator[tuple[Extent, bytes]]:
        """Yield extents as their requests are answered."""
        yield from _parallel(self._requests(extents), lambda request: self._get(request)[0])

    def spare(self) -> list[Extent]:
        """Nothing is kept beyond what is asked for."""
        return []

    def close(self) -> None:
        """Close the connections of this process."""
        session = self._sessions.pop(os.getpid(), None)
        if session is not None:
            session.close()

    def _requests(self, extents: Sequence[Extent]) -> list[tuple[Extent, list[Extent]]]:
        return coalesce(extents, gap=GAP, limit=LIMIT)

    @property
    def _session(self) -> requests.Session:
        import requests

        # A connection must not be shared with a forked worker.
        return self._sessions.setdefault(os.getpid(), requests.Session())

    def _get(self, extent: Extent) -> tuple[bytes, int]:
        """The bytes of an extent, and the size of the whole file."""
        import requests

        got, total, tries = bytearray(), 0, 0
        while True:
            before, pause = len(got), _PAUSE * 2**tries
            try:
                with self._ask(Extent(extent.offset + len(got), extent.size - len(got))) as answer:
                    if answer.status_code in _TRANSIENT:
                        problem = f"the server answered {answer.status_code}"
                        pause = max(pause, _retry_after(answer.headers.get("Retry-After", "")))
                    else:
                        total = self._check(answer, extent.offset + len(got))
                        for part in answer.iter_content(_STEP):
                            got += part
                        if len(got) >= extent.size:
                            return bytes(got[: extent.size]), total
                        problem = "it broke off"
            except requests.RequestException as error:
                problem = _reason(error)
            tries = tries + 1 if len(got) == before else 1
            if tries == _ATTEMPTS:
                raise SourceError(f"{self.name} gave up after {_ATTEMPTS} tries: {problem}")
            time.sleep(min(pause, _LONGEST_PAUSE))

    def _ask(self, extent: Extent) -> requests.Response:
        wanted = {"Range": f"bytes={extent.offset}-{extent.end - 1}", "Accept-Encoding": "identity"}
        if self._tag is not None:
            wanted["If-Range"] = self._tag
        return self._session.get(
            self.url, headers={**self.headers, **wanted}, stream=True, timeout=_TIMEOUT
        )

    def _check(self, answer: requests.Response, offset: int) -> int:
        """Refuse anything but the range asked for; the size of the whole file."""
        status = answer.status_code
        if status in (401, 403):
            raise SourceError(
                f"{self.name} is closed to you (the server answered {status}); your token may have "
                "expired: log in again, or set HF_TOKEN"
            )
        if status == 404:
            raise SourceError(f"{self.name} is not there (the server answered 404)")
        match = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if status == 200:
            raise SourceError(
                f"{self.name} was changed while it was read, or its server does not answer ranges; "
                "run again, or use another mirror"
            )
        if status != 206 or match is None or int(match[1]) != offset or match[3] == "*":
            raise SourceError(f"{self.name} answered {status}, expected 206 with the range asked")
        tag = answer.headers.get("ETag")
        if tag and not tag.startswith("W/"):
            self._tag = tag
        return int(match[3])


@dataclass
class RemoteBytes:
    """A file in an object store, read by ranges through :mod:`fsspec`."""

    url: str
    _size: int | None = field(default=None, init=False, repr=False)
    _places: dict[int, tuple[Any, str]] = field(default_factory=dict, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_places": {}}

    @property
    def name(self) -> str:
        """Its address."""
        return self.url

    @property
    def size(self) -> int:
        """Bytes of the file."""
        if self._size is None:
            self._size = int(self._call(lambda fs, path: fs.info(path)["size"]))
        return self._size

    @property
    def unit(self) -> int:
        """What arrives while a request travels."""
        return _REQUEST

    def cost(self, extents: Sequence[Extent]) -> Cost:
        """Bytes to transfer, at 20 MB/s."""
        requests = coalesce(extents, gap=GAP, limit=LIMIT)
        return _cost([request for request, _ in requests], "network")

    def waves(self, extents: Sequence[Extent]) -> Iterable[Sequence[Extent]]:
        """All at once."""
        return [sorted(extents)] if extents else []

    def read(self, extents: Sequence[Extent]) -> Iterator[tuple[Extent, bytes]]:
        """Yield extents as their requests are answered."""
        yield from _parallel(coalesce(extents, gap=GAP, limit=LIMIT), self._get)

    def spare(self) -> list[Extent]:
        """Nothing is kept beyond what is asked for."""
        return []

    def close(self) -> None:
        """The file system keeps its own connections."""

    def _get(self, extent: Extent) -> bytes:
        def get(fs: Any, path: str) -> bytes:
            data = fs.cat_file(path, start=extent.offset, end=extent.end)
            if len(data) != extent.size:
                raise OSError(f"{len(data):,} of {extent.size:,} bytes came")
            return data

        return self._call(get)

    def _call(self, action: Callable[[Any, str], Any]) -> Any:
        """Run an action on the file system, again if it fails in a way that may pass."""
        for attempt in range(_ATTEMPTS // 2):
            try:
                return action(*self._place)
            except (FileNotFoundError, PermissionError) as error:
                raise SourceError(f"cannot read {self.url}: {_reason(error)}") from None
            except SourceError:
                raise
            except Exception as error:
                problem = _reason(error)
            time.sleep(_PAUSE * 2**attempt)
        raise SourceError(f"cannot read {self.url}: {problem}")

    @property
    def _place(self) -> tuple[Any, str]:
        import fsspec

        try:
            # Connections must not be shared with a forked worker.
            if os.getpid() not in self._places:
                self._places[os.getpid()] = fsspec.core.url_to_fs(self.url)
            return self._places[os.getpid()]
        except ImportError as error:
            raise SourceError(f"cannot read {self.url}: {error}") from None


def _parallel(
    requests: list[tuple[Extent, list[Extent]]], get: Callable[[Extent], bytes]
) -> Iterator[tuple[Extent, bytes]]:
    """Answer requests on a few threads, no more than those running or waiting to be taken."""
    queue = iter(requests)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="synthbrain-fetch") as pool:
        running: dict[Future[bytes], tuple[Extent, list[Extent]]] = {}
        try:
            while True:
                while len(running) < _THREADS and (job := next(queue, None)) is not None:
                    running[pool.submit(_asked, get, job[0])] = job
                if not running:
                    return
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    request, extents = running.pop(done)
                    data = done.result()
                    for extent in extents:
                        start = extent.offset - request.offset
                        yield extent, data[start : start + extent.size]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _asked(get: Callable[[Extent], bytes], request: Extent) -> bytes:
    return get(request) if request.size else b""  # no range can say nothing


def _cost(extents: Sequence[Extent], where: str) -> Cost:
    count = sum(extent.size for extent in extents)
    return Cost(bytes=count, seconds=count / _BYTES_PER_SECOND[where])


def _retry_after(text: str) -> float:
    """Seconds a ``Retry-After`` header asks for; dates are rare and not worth a parser."""
    return float(text) if text.isdigit() else 0.0


def _reason(error: Exception) -> str:
    """An exception of a transport library in one line."""
    text = " ".join(str(error).split())
    if "NameResolution" in text or "Name or service not known" in text:
        return "its name does not resolve; is this machine connected?"
    return (text or type(error).__name__)[:300]
