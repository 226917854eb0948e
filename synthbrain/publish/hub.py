"""Uploading a publishable folder to a dataset repository of the Hugging Face Hub.

Files go up in commits of limited size, ``manifest.json`` last and alone: a repository without one
is not whole. What is there already, by its hash, is left out, so that an upload that was
interrupted goes on, and a published set that grew sends what is new.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from synthbrain.errors import UsageError
from synthbrain.files import sha256_of
from synthbrain.progress import track
from synthbrain.publish.errors import PublishError
from synthbrain.publish.folder import DATA, MANIFEST, contents, header_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi

COMMIT_FILES = 50
"""Most files of a commit: what an interruption can cost."""

_TRANSPORTS = ("httpx", "httpx2", "requests", "urllib3", "httpcore", "httpcore2")
_ADVICE = {
    401: "log in with `hf auth login` or set HF_TOKEN",
    403: "your token may not write there: make one with write access, and ask to join the "
    "organisation",
    404: "it does not exist or is closed to you: look at the name, and log in with `hf auth login`",
    409: "somebody else is writing to it: run the same again",
    412: "somebody else wrote to it meanwhile: run the same again",
    429: "the Hub asks to slow down: wait some minutes and run the same again; what is uploaded "
    "stays",
}


def publish(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    progress: bool = True,
) -> str:
    """Upload a finished publishable folder; run again after an interruption, it goes on.

    Parameters
    ----------
    folder
        From :func:`synthbrain.publish.layout.build`. Only what that makes is uploaded.
    repo_id
        ``ORG/NAME``; created if it is not there. Packs and tables of the set that was there
        before and is not in the folder are deleted with the last commit.
    private
        Create it closed to others.
    revision
        Branch to upload to; created if it is not there. ``main`` by default.
    progress
        Show progress bars on standard error.

    Returns
    -------
    str
        The commit that holds the set, to be cited and pinned.

    Raises
    ------
    UsageError
        The folder is not finished, or the name is not one the Hub takes.
    PublishError
        Nobody is logged in, the Hub refuses or cannot be reached; in one line.
    """
    import huggingface_hub

    folder = Path(folder)
    name = header_of(folder).name
    api = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    with _quiet(not progress), _told(repo_id):
        _require_login()
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, repo_type="dataset", exist_ok=True)
        upload = _Upload(api, folder, repo_id, revision, name)
        commits = upload.commits()
        for paths in track(commits, total=len(commits), what="uploading", show=progress):
            upload.send(paths)
        return upload.finish()


@dataclass(eq=False)
class _Upload:
    """An upload: what is there, what is to send, and the sending."""

    api: HfApi
    folder: Path
    repo_id: str
    revision: str | None
    name: str

    def __post_init__(self) -> None:
        from huggingface_hub.hf_api import RepoFile

        tree = self.api.list_repo_tree(
            self.repo_id, recursive=True, revision=self.revision, repo_type="dataset"
        )
        self._there = {file.path: file for file in tree if isinstance(file, RepoFile)}
        self._local = contents(self.folder)

    def commits(self) -> list[list[str]]:
        """Files that have yet to be sent, but for the manifest, a commit's in a list."""
        todo = [path for path in self._local if path != MANIFEST and not self._is_there(path)]
        return [todo[start : start + COMMIT_FILES] for start in range(0, len(todo), COMMIT_FILES)]

    def send(self, paths: Sequence[str]) -> None:
        """Commit some files; the manifest of another set goes with the first of this one's."""
        from huggingface_hub import CommitOperationDelete

        stale = MANIFEST in self._there and not self._is_there(MANIFEST)
        deletions = [CommitOperationDelete(MANIFEST)] if stale else []
        self._commit([*deletions, *map(self._addition, paths)], f"Add {len(paths)} files")
        if stale:
            del self._there[MANIFEST]

    def finish(self) -> str:
        """Commit the manifest, and delete what belongs to no set any more; returns the commit."""
        from huggingface_hub import CommitOperationDelete

        kept = set(self._local)
        stale = [
            path for path in self._there
            if path not in kept
            and any(PurePosixPath("/", path).match(f"/{pattern}") for pattern in DATA)
        ]  # fmt: skip
        operations: list[Any] = [CommitOperationDelete(path) for path in stale]
        if not self._is_there(MANIFEST):
            operations.append(self._addition(MANIFEST))
        if operations:
            return self._commit(operations, f"Publish {self.name}")
        info = self.api.repo_info(self.repo_id, revision=self.revision, repo_type="dataset")
        return str(info.sha)

    def _is_there(self, path: str) -> bool:
        file, local = self._there.get(path), self.folder / path
        if file is None or file.size != local.stat().st_size:
            return False
        if file.lfs is not None:
            return bool(file.lfs.sha256 == sha256_of(local))
        return file.blob_id == _git_hash(local)

    def _addition(self, path: str) -> Any:
        from huggingface_hub import CommitOperationAdd

        return CommitOperationAdd(path_in_repo=path, path_or_fileobj=self.folder / path)

    def _commit(self, operations: Sequence[Any], message: str) -> str:
        done = self.api.create_commit(
            self.repo_id, operations, commit_message=message, repo_type="dataset",
            revision=self.revision,
        )  # fmt: skip
        return str(done.oid)


def _git_hash(path: Path) -> str:
    """How git names a small file's content."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _require_login() -> None:
    import huggingface_hub

    if huggingface_hub.get_token() is None:
        raise PublishError("nobody is logged in to the Hub; use `hf auth login`, or set HF_TOKEN")


@contextlib.contextmanager
def _quiet(silent: bool) -> Iterator[None]:
    """Without the client's own progress bars."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if not silent or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextlib.contextmanager
def _told(repo_id: str) -> Iterator[None]:
    """Turn what the Hub's client raises into one line that says what to do."""
    try:
        yield
    except PublishError:
        raise
    except Exception as error:
        told = _explained(error, repo_id)
        if told is None:
            raise
        raise told from error


def _explained(error: Exception, repo_id: str) -> Exception | None:
    """The client wraps some errors in others: what happened is somewhere down the chain."""
    from huggingface_hub import errors

    for cause in _chain(error):
        if isinstance(cause, errors.HFValidationError):
            return UsageError(f"{repo_id!r} cannot be a repository: {_line(cause)}")
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return PublishError("HF_HUB_OFFLINE is set; unset it to publish")
        if isinstance(cause, errors.HfHubHTTPError) and cause.response is not None:
            code = cause.response.status_code
            advice = _ADVICE.get(code, f"{_line(cause)}; run the same again later")
            return PublishError(f"the Hub answered {code} for {repo_id}; {advice}")
        transport = type(cause).__module__.split(".")[0] in _TRANSPORTS
        if transport or isinstance(cause, ConnectionError):
            return PublishError(
                f"the connection to the Hub failed ({type(cause).__name__}: {_line(cause)}); what "
                "is uploaded stays: run the same again"
            )
    if isinstance(error, (ValueError, RuntimeError, OSError)):
        return PublishError(f"{repo_id} could not be written: {_line(error)}; run the same again")
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
