"""Files written aside and renamed, so that none is ever half there."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from synthbrain.errors import StoreError


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A scratch file that takes the name ``path`` when the body succeeds.

    Raises
    ------
    StoreError
        The folder cannot be written to, or the disk is full; nothing half-written is left.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        os.replace(scratch, path)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            error.errno,
            f"cannot write {path} ({error.strerror or error}); what is finished is intact: make "
            "room or choose another folder, and run again",
        ) from error
    finally:
        scratch.unlink(missing_ok=True)


def write(path: Path, data: bytes) -> None:
    """Write a small file, unless it already holds ``data``."""
    if path.is_file() and path.read_bytes() == data:
        return
    with aside(path) as scratch:
        scratch.write_bytes(data)


def sha256_of(path: Path) -> str:
    """Hash of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
