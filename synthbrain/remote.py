"""Manifests at an address: fetched, checked, and kept where they are found by name."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from synthbrain.errors import ManifestError, SourceError
from synthbrain.header import Header, PacksSource
from synthbrain.home import home
from synthbrain.sources.extents import Bytes, Extent
from synthbrain.sources.url import hub_address, open_bytes
from synthbrain.store import publish

HEADER, ROWS = "manifest.json", "rows.parquet"

_LIMITS = {HEADER: 2**24, ROWS: 2**30}


def fetch_manifest(address: str) -> Path:
    """Folder of a manifest that lies at an address.

    Parameters
    ----------
    address
        Of a folder that ``synthbrain publish`` made: ``hf://datasets/ORG/NAME[@REVISION]``, or an
        address of another scheme, without ``manifest.json``.

    Raises
    ------
    SourceError
        It cannot be fetched.
    ManifestError
        What is there is no manifest.

    Notes
    -----
    On the Hub the client's own cache keeps the files, and serves them offline.
    """
    base = address.rstrip("/").removesuffix(f"/{HEADER}")
    return _from_hub(base) if base.startswith("hf://") else _from_url(base)


def pinned(header: Header, folder: Path) -> Header:
    """The header of a manifest out of the Hub's cache, its packs those of the same commit.

    Parameters
    ----------
    header
        As published.
    folder
        Where :func:`fetch_manifest` left it.
    """
    if folder.parent.name != "snapshots":
        return header
    sources = {
        name: source.model_copy(update={"url": f"{source.url}@{folder.name}"})
        if isinstance(source, PacksSource) and _is_repository(source.url)
        else source
        for name, source in header.sources.items()
    }
    return header.model_copy(update={"sources": sources})


def _is_repository(url: str) -> bool:
    """Whether an address names a repository of the Hub, without a revision."""
    return url.startswith("hf://") and hub_address(url)[1:] == (None, "")


def _from_hub(base: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    repo, revision, _ = hub_address(base)
    endpoint = os.environ.get("HF_ENDPOINT")
    try:
        paths = [
            huggingface_hub.hf_hub_download(
                repo, name, repo_type="dataset", revision=revision, endpoint=endpoint
            )
            for name in (HEADER, ROWS)
        ]
    except (errors.RepositoryNotFoundError, errors.GatedRepoError):
        raise SourceError(
            f"{base} does not exist or is closed to you; log in with `hf auth login` or set "
            "HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise SourceError(f"{base}: there is no revision {revision!r}") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise SourceError(
            f"{base} is not in the Hub's cache and the Hub cannot be reached; connect, or open a "
            "manifest on disk"
        ) from None
    except errors.EntryNotFoundError:
        raise SourceError(
            f"{base} holds no {HEADER} and {ROWS}: it was not published here"
        ) from None
    except (errors.HfHubHTTPError, OSError) as error:
        raise SourceError(f"{base} cannot be fetched: {' '.join(str(error).split())}") from None
    return Path(paths[0]).parent


def _from_url(base: str) -> Path:
    """Fetch both files into the cache; rows that are there already are not fetched again."""
    folder = home() / "cache" / "manifests" / hashlib.sha256(base.encode()).hexdigest()[:16]
    text = _whole(open_bytes(f"{base}/{HEADER}"), HEADER)
    header = Header.parse(text.decode("utf-8", "replace"), f"{base}/{HEADER}")
    kept = folder / (header.rows_digest or "none")
    kept.mkdir(parents=True, exist_ok=True)
    if header.rows_digest is not None and not (kept / ROWS).exists():
        publish(kept / ROWS, _whole(open_bytes(f"{base}/{ROWS}"), ROWS), keep=Path.exists)
    publish(kept / HEADER, text, keep=lambda path: path.exists() and path.read_bytes() == text)
    return kept


def _whole(file: Bytes, name: str) -> bytes:
    if file.size > _LIMITS[name]:
        raise ManifestError(f"{file.name} has {file.size:,} bytes: no {name}")
    if file.size == 0:
        raise ManifestError(f"{file.name} is empty")
    ((_, data),) = file.read([Extent(0, file.size)])
    return data
