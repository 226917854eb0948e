"""What lies where in a publishable folder, and whether a folder is one."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from synthbrain.errors import UsageError
from synthbrain.header import Header
from synthbrain.publish.pack import METADATA

if TYPE_CHECKING:
    from synthbrain.store import Store

MANIFEST, ROWS = "manifest.json", "rows.parquet"
CARD, DESCRIPTION, CITATION = "README.md", "croissant.json", "CITATION.cff"
PACKS, LATENTS = "packs", "latents"

CONTENTS = (
    "packs/block-*.zarr.zip", "latents/block-*.zarr.zip", "latents/rows.parquet",
    "data/*.parquet", "volumes/*.parquet",
    CARD, DESCRIPTION, CITATION, ROWS, MANIFEST,
)  # fmt: skip
"""Everything a publishable folder holds, in the order it is uploaded."""

DATA = CONTENTS[:5]
"""Those of which there may be fewer when a folder is built again."""


def header_of(folder: Path) -> Header:
    """The header of a finished folder, all of whose data files are there.

    Raises
    ------
    UsageError
        The folder is not a finished publishable one, or a file is gone or cut short.
    """
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        listed = {file["contentUrl"]: file["contentSize"] for file in described["distribution"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"{folder} holds no {MANIFEST} and {DESCRIPTION}: it is not a publishable folder, or "
            "not finished; build it first (again)"
        ) from None
    for path, size in listed.items():
        file = folder / path
        if not file.is_file() or f"{file.stat().st_size} B" != size:
            raise UsageError(f"{file} is gone or not of {size}; build the folder again")
    return Header.parse(text, str(folder / MANIFEST))


def contents(folder: Path) -> list[str]:
    """Paths of a folder's publishable files, in the order of upload; other files are none."""
    found: list[str] = []
    for pattern in CONTENTS:
        found += sorted(str(p.relative_to(folder).as_posix()) for p in folder.glob(pattern))
    return found


def refuse_other_set(folder: Path, store: Store) -> None:
    """Raise where the folder holds packs of other volumes, or what a build never made.

    A build would replace either.
    """
    packs = sorted((folder / PACKS).glob("block-*.zarr.zip"))
    if not packs:
        if others := contents(folder):
            raise UsageError(
                f"{folder} holds {others[0]} and no packs: it is no publishable folder, and that "
                "file would be lost; choose another"
            )
        return
    try:
        with zipfile.ZipFile(packs[0]) as archive:
            found = json.loads(archive.read(METADATA))["attributes"]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return
    differing = [
        key for key, value in store.attributes.items()
        if key != "provenance" and found.get(key) != value
    ]  # fmt: skip
    if differing:
        key = differing[0]
        raise UsageError(
            f"{folder} holds a set with {key} {found.get(key)!r}, this one has "
            f"{store.attributes[key]!r}; choose another folder"
        )


def remove_stale(folder: Path, kept: Sequence[str]) -> None:
    """Delete packs and tables of an earlier, larger build: patterns in the card would find them."""
    wanted = {folder / path for path in kept}
    for pattern in DATA:
        for path in folder.glob(pattern):
            if path not in wanted:
                path.unlink()
