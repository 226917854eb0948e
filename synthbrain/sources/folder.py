"""A folder of NIfTI files on disk, BIDS or plain, used in place."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from synthbrain.errors import SourceError
from synthbrain.nifti import read_nifti
from synthbrain.rows import bids_label
from synthbrain.sources.base import Cost

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from synthbrain.header import Geometry

LAYOUTS = (
    "sub-{label}/anat/sub-{label}_T1w.nii.gz",
    "rawdata/sub-{label}/anat/sub-{label}_T1w.nii.gz",
    "sub-{label}_T1w.nii.gz",
    "{id}_T1w.nii.gz",
    "{id}.nii.gz",
    "{id}.nii",
)
"""Where a volume is looked for, in this order; ``label`` is the id as a BIDS label."""

log = logging.getLogger("synthbrain")


class FolderSource:
    """NIfTI files in a folder.

    Parameters
    ----------
    path
        Folder with files laid out as one of :data:`LAYOUTS`.
    made_by
        What made the volumes: ``"published"``, or a generator's identity.

    Raises
    ------
    SourceError
        The folder does not exist.
    """

    def __init__(self, path: str | Path, *, made_by: str = "published") -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            raise SourceError(f"no folder {self.path}; a folder source needs one with NIfTI files")
        self.name = f"folder {self.path}"
        self.made_by = made_by

    def find(self, id: str) -> Path | None:
        """The file of a volume, or None."""
        label = bids_label(id)
        candidates = (self.path / layout.format(id=id, label=label) for layout in LAYOUTS)
        return next((path for path in candidates if path.is_file()), None)

    def holds(self, ids: Sequence[str]) -> NDArray[np.bool_]:
        """Which volumes have a file."""
        return np.array([self.find(id) is not None for id in ids], dtype=bool)

    def cost(self, ids: Sequence[str]) -> Cost:
        """Bytes on disk, and about 60 ms of decompression a volume."""
        sizes = [path.stat().st_size for path in map(self.find, ids) if path is not None]
        return Cost(bytes=sum(sizes), seconds=0.06 * len(sizes))

    def fetch(
        self, ids: Sequence[str], geometry: Geometry
    ) -> Iterator[tuple[str, np.ndarray[Any, np.dtype[Any]]]]:
        """Read the files, check them against the geometry and quantise them.

        One that is unreadable or unfit is logged and left out.
        """
        for id, path in ((id, self.find(id)) for id in ids):
            if path is None:
                continue
            try:
                volume = read_nifti(path, geometry)
            except SourceError as error:
                log.warning("%s; left out", error)
            else:
                yield id, volume
