"""What a worker remembers of a torrent between runs, however abruptly a run ended.

libtorrent's resume data says which pieces are here, but is only saved every few seconds; a journal
names the pieces that came since. Neither is believed: pieces of the journal are hashed at the
start, and all pieces again whenever they are read.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import libtorrent as lt

from synthbrain.torrent.metainfo import Metainfo


class State:
    """The files beside a torrent's data.

    Parameters
    ----------
    folder
        Made if missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = folder / "lock"
        self.torrent = folder / "metadata.torrent"
        self.log = folder / "worker.log"
        self._resume = folder / "resume"
        self._journal = folder / "journal"

    def known(self) -> bool:
        """Whether anything is remembered."""
        return self._resume.exists() or self._journal.exists()

    def resume(self) -> lt.add_torrent_params | None:
        """Resume data as saved; None if there is none or it is damaged."""
        try:
            return lt.read_resume_data(self._resume.read_bytes())
        except (OSError, RuntimeError):
            return None

    def claimed(self, meta: Metainfo) -> set[int]:
        """Pieces that are said to be here, not checked."""
        params = self.resume()
        bits = params.have_pieces if params else []
        return {i for i, have in enumerate(bits) if have} | self.noted(meta)

    def noted(self, meta: Metainfo) -> set[int]:
        """Pieces of the journal."""
        try:
            data = self._journal.read_bytes()
        except OSError:
            return set()
        return {piece for piece in array("I", data[: len(data) // 4 * 4]) if piece < meta.count}

    def note(self, pieces: Sequence[int]) -> None:
        """Add pieces to the journal."""
        with self._journal.open("ab", buffering=0) as file:
            file.write(array("I", pieces).tobytes())

    def save(self, params: lt.add_torrent_params, recent: Iterable[int]) -> set[int]:
        """Keep resume data, and a journal of those recent pieces it does not know of yet.

        Returns
        -------
        set of int
            The pieces of the journal.
        """
        have = params.have_pieces
        left = {piece for piece in recent if piece >= len(have) or not have[piece]}
        _replace(self._resume, lt.write_resume_data_buf(params))
        _replace(self._journal, array("I", sorted(left)).tobytes())
        return left

    def clear(self) -> None:
        """Forget all pieces."""
        self._resume.unlink(missing_ok=True)
        self._journal.unlink(missing_ok=True)

    def keep_metadata(self, data: bytes) -> None:
        """Keep the torrent file a magnet link led to."""
        _replace(self.torrent, data)


def _replace(path: Path, data: bytes) -> None:
    aside = path.with_name(path.name + ".partial")
    aside.write_bytes(data)
    os.replace(aside, path)
