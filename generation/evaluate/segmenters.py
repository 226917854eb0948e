"""Segmentation programs as commands: run, watched, and gone on with.

None comes with this package. The command lines are those the programs document; they were not run
here, so look at the first maps before you trust a thousand.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from generation.errors import EvaluationError
from generation.evaluate.segmentations import (
    ENDINGS,
    Measurements,
    find_map,
    measure_labels,
    measure_tissues,
    read_map,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Volume = tuple[str, NDArray[np.float32], ArrayLike]

_FIELDS = ("in", "out", "in_dir", "out_dir", "id")
_HOUR = 3600.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class Segmenter:
    """A program that turns a scan into a label map; a :class:`Measurer`.

    Parameters
    ----------
    name, version
        As reports print them; the version is the user's to state.
    command
        Its command line, split as a POSIX shell does and run without one. ``{in}`` and ``{out}``
        are the scan and the map, NIfTI files; ``{id}`` is the scan's name without its ending;
        ``{in_dir}`` and ``{out_dir}`` are folders. With ``{in_dir}`` and no ``{in}`` it is run once
        for all scans.
    result
        Where a program that names its map itself leaves it, such as ``{out_dir}/{id}/aseg.mgz``;
        without it ``{out}``, or the map of that id in ``{out_dir}``.
    maps
        ``"labels"`` of FreeSurfer, or ``"tissues"`` from 0 to 3.
    timeout
        Seconds a volume may take.
    source
        Where the command line is documented.

    Raises
    ------
    EvaluationError
        The command cannot be split, has unknown fields, or does not say what goes in and out.
    """

    name: str
    command: str
    version: str = "not stated"
    result: str = ""
    maps: Literal["labels", "tissues"] = "labels"
    timeout: float = _HOUR
    source: str = ""

    def __post_init__(self) -> None:
        try:
            words = [word.format(**dict.fromkeys(_FIELDS, "")) for word in self._words()]
        except (ValueError, KeyError, IndexError) as error:
            raise EvaluationError(
                f"cannot read the command {self.command!r} ({error}); its fields are "
                f"{', '.join(f'{{{name}}}' for name in _FIELDS)}"
            ) from None
        if not words or "{in" not in self.command or "{out" not in self.command:
            raise EvaluationError(
                f"the command {self.command!r} must say what goes in ({{in}} or {{in_dir}}) and "
                "what comes out ({out} or {out_dir})"
            )

    @property
    def at_once(self) -> bool:
        """Whether one run takes all scans."""
        return "{in_dir}" in self.command and "{in}" not in self.command

    def measure(self, volume: NDArray[np.float32], affine: ArrayLike) -> Mapping[str, float]:
        """As in :class:`~generation.evaluate.segmentations.Measurer`; the map is not kept."""
        with _aside(None) as scratch:
            made = self._make([("scan", volume, affine)], scratch)["scan"]
            if isinstance(made, str):
                raise EvaluationError(made)
            return self.read(made)

    def measure_all(
        self,
        volumes: Iterable[Volume],
        folder: Path,
        *,
        scalings: Mapping[str, float] | None = None,
    ) -> Measurements:
        """Measure volumes and keep their maps; those kept already are only read.

        Parameters
        ----------
        volumes
            Id, ``(x, y, z)`` or ``(1, x, y, z)`` intensities in [0, 1], and affine of each. Of a
            program that takes all at once, all that lack a map are written before it runs.
        folder
            Where maps are kept, as ``<id>`` with the ending the program gave. A map gets there when
            it was measured, in one step; a call that was cut short is gone on with.
        scalings
            By id, as in :func:`~generation.evaluate.segmentations.measure_labels`.

        Returns
        -------
        Measurements
            Of every volume its values, or why there are none. A failure ends nothing; failed
            volumes are tried again by the next call.
        """
        folder.mkdir(parents=True, exist_ok=True)
        kept = _Kept(self, folder, scalings or {})
        missing = kept.missing(volumes)
        for group in [missing] if self.at_once else ([volume] for volume in missing):
            with _aside(folder) as scratch:
                for key, made in self._make(group, scratch).items():
                    kept.take(key, made)
        return Measurements(values=kept.values, failures=kept.failures)

    def read(self, path: Path, scaling: float | None = None) -> dict[str, float]:
        """The volumes of a map it made; as :func:`measure_labels` or :func:`measure_tissues`."""
        measured = measure_labels if self.maps == "labels" else measure_tissues
        return measured(*read_map(path), scaling=scaling)

    def _make(self, volumes: Iterable[Volume], scratch: Path) -> dict[str, Path | str]:
        """The map of each volume, or why there is none.

        Programs see numbers for names: whatever ids look like, one is never the start of another.
        """
        folders = _Folders(scratch / "in", scratch / "out")
        for folder in folders:
            folder.mkdir()
        names: dict[str, str] = {}
        for key, volume, affine in volumes:
            names[key] = f"v{len(names):06d}"
            _write(folders.scans / f"{names[key]}.nii.gz", volume, affine)
        if not names:
            return {}
        problem = self._run("v000000", folders, timeout=self.timeout * len(names))
        return {key: self._found(name, folders, problem) for key, name in names.items()}

    def _found(self, name: str, folders: _Folders, problem: str) -> Path | str:
        """The map of one scan. Of a run over many that failed, those that are there count."""
        if problem and not self.at_once:
            return problem
        if self.result or "{out}" in self.command:
            path = Path((self.result or "{out}").format(**folders.fields(name)))
            return path if path.is_file() else problem or f"{self.name} left no {path.name}"
        try:
            return find_map(folders.maps, name)
        except EvaluationError as error:
            return problem or f"{self.name} ended well, but left {error}"

    def _run(self, name: str, folders: _Folders, *, timeout: float) -> str:
        """Run the command; why it failed, or nothing."""
        words = [word.format(**folders.fields(name)) for word in self._words()]
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return f"cannot run {words[0]} ({error.strerror})"
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            _end(process)
            return f"{self.name} took more than {timeout:g} s and was ended"
        except BaseException:
            _end(process)
            raise
        if process.returncode == 0:
            return ""
        last = output.decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        return f"{self.name} ended with {process.returncode}: {last[0].strip()[:200]}"

    def _words(self) -> list[str]:
        return shlex.split(self.command)


SEGMENTERS = {
    "synthseg": Segmenter(
        name="synthseg",
        command="mri_synthseg --i {in_dir} --o {out_dir}",
        source="FreeSurfer wiki, SynthSeg, section 3: folders in, <name>_synthseg.nii.gz out; "
        "--robust, --parc, --cpu and --threads may be added",
    ),
    "fastsurfer": Segmenter(
        name="fastsurfer",
        command="run_fastsurfer.sh --t1 {in} --sid {id} --sd {out_dir} --seg_only --no_biasfield "
        "--no_cereb --no_hypothal",
        result="{out_dir}/{id}/mri/aparc.DKTatlas+aseg.deep.mgz",
        source="Deep-MI/FastSurfer, doc/scripts/RUN_FASTSURFER.md; its maps lack most fluid about "
        "the brain: normalise with a scaling",
    ),
    "deepmriprep": Segmenter(
        name="deepmriprep",
        command="deepmriprep-cli --input {in} --output_dir {out_dir} --outputs p0 "
        "--dir_format flat",
        result="{out_dir}/p0{id}.nii.gz",
        maps="tissues",
        source="wwu-mmll/deepmriprep, deepmriprep/ui/cli.py and preprocess.py; tissues only, so no "
        "ventricular volume",
    ),
}
"""Programs by name. Not run here: their command lines are those of the sources they name."""


class _Folders(NamedTuple):
    """Where a program finds its scans, and where it leaves its maps."""

    scans: Path
    maps: Path

    def fields(self, name: str) -> dict[str, str]:
        """What a command's fields stand for, for one scan."""
        return {
            "in": str(self.scans / f"{name}.nii.gz"), "out": str(self.maps / f"{name}.nii.gz"),
            "in_dir": str(self.scans), "out_dir": str(self.maps), "id": name,
        }  # fmt: skip


@dataclass(frozen=True)
class _Kept:
    """The folder of maps, and what became of the volumes: values, or why there are none."""

    segmenter: Segmenter
    folder: Path
    scalings: Mapping[str, float]
    values: dict[str, Mapping[str, float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def missing(self, volumes: Iterable[Volume]) -> Iterator[Volume]:
        """Volumes without a map that can be read; the others are measured."""
        for key, volume, affine in volumes:
            if not _NAME.fullmatch(key):
                problem = f"{key!r} cannot name a file: use letters, digits, '.', '_', '-'"
                self.failures[key] = problem
                continue
            kept = (self.folder / f"{key}{ending}" for ending in ENDINGS)
            try:
                self._measure(key, next(path for path in kept if path.is_file()))
            except (StopIteration, EvaluationError):
                yield key, volume, affine

    def take(self, key: str, made: Path | str) -> None:
        """Measure a map that was made and keep it, or note why there is none."""
        if isinstance(made, str):
            self.failures[key] = made
            return
        try:
            self._measure(key, made)
        except EvaluationError as error:
            self.failures[key] = str(error)
            return
        os.replace(made, self.folder / f"{key}{_ending(made)}")

    def _measure(self, key: str, path: Path) -> None:
        self.values[key] = self.segmenter.read(path, self.scalings.get(key))


def _write(path: Path, volume: NDArray[np.float32], affine: ArrayLike) -> None:
    import nibabel

    values = np.asarray(volume, dtype=np.float32)
    image = nibabel.Nifti1Image(values.reshape(values.shape[-3:]), np.asarray(affine, np.float64))
    nibabel.save(image, path)


def _ending(path: Path) -> str:
    return ".nii.gz" if path.name.endswith(".nii.gz") else path.suffix


@contextmanager
def _aside(folder: Path | None) -> Iterator[Path]:
    """A folder for what is not finished, removed afterwards."""
    path = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program and all it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
