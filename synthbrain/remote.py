"""Manifests at an address: fetched, checked, and kept where they are found by name."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from pydantic import ValidationError

from synthbrain.errors import ManifestError, SourceError
from synthbrain.files import aside, write
from synthbrain.header import Header, PacksSource
from synthbrain.home import home
from synthbrain.rows import digest_rows, read_rows
from synthbrain.sources.extents import Bytes, Extent
from synthbrain.sources.url import hub_address, open_bytes

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
    repo = folder.parents[1].name.removeprefix("datasets--").replace("--", "/")
    header = _with_packs(header, f"hf://datasets/{repo}")
    sources = {
        name: source.model_copy(update={"url": f"{source.url}@{folder.name}"})
        if isinstance(source, PacksSource) and _is_repository(source.url, repo)
        else source
        for name, source in header.sources.items()
    }
    return header.model_copy(update={"sources": sources})


def _with_packs(header: Header, address: str) -> Header:
    """The header of a set that was packed before it was known where it would lie."""
    made_by = header.provenance.get("made_by")
    named = any(isinstance(source, PacksSource) for source in header.sources.values())
    if made_by is None or named:
        return header
    try:
        packs = PacksSource(kind="packs", url=address, made_by=made_by)
    except ValidationError:  # provenance is free text
        return header
    return header.model_copy(update={"sources": {"packs": packs, **header.sources}})


def _is_repository(url: str, repo: str) -> bool:
    """Whether an address names a certain repository of the Hub, without a revision."""
    return url.startswith("hf://") and hub_address(url) == (repo, None, "")


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
        with aside(kept / ROWS) as scratch:
            scratch.write_bytes(_whole(open_bytes(f"{base}/{ROWS}"), ROWS))
            _check_rows(scratch, header, base)
    write(kept / HEADER, _with_packs(header, base).text().encode())
    return kept


def _check_rows(path: Path, header: Header, base: str) -> None:
    """Refuse rows of another manifest: once kept, they would be taken for this one's for ever."""
    try:
        sound = digest_rows(read_rows(path)[0]) == header.rows_digest
    except ManifestError:
        sound = False
    if not sound:
        raise ManifestError(
            f"{base}/{ROWS} does not belong to its header; if it is just being published, open it "
            "again later"
        )


def _whole(file: Bytes, name: str) -> bytes:
    if file.size > _LIMITS[name]:
        raise ManifestError(f"{file.name} has {file.size:,} bytes: no {name}")
    if file.size == 0:
        raise ManifestError(f"{file.name} is empty")
    ((_, data),) = file.read([Extent(0, file.size)])
    return data
