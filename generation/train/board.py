"""What happens in a run, for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np


class Board:
    """Event files in a folder; nothing at all where TensorBoard is not installed.

    Parameters
    ----------
    folder
        For the event files.
    step
        Where the run goes on: events of later steps, from before it was stopped, are hidden.
    """

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._writer = None
        else:
            self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
        self._shown = step if step else -1

    @property
    def installed(self) -> bool:
        """Whether TensorBoard is there."""
        return self._writer is not None

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def add(self, line: Mapping[str, float]) -> None:
        """A line of the log."""
        if self._writer is None:
            return
        for name, value in line.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(line["step"]))

    def add_sheets(self, folder: Path) -> None:
        """Sample sheets ``step-….png`` of later steps than those added before."""
        if self._writer is None:
            return
        from PIL import Image

        for path in sorted(folder.glob("step-*.png")):
            step = int(path.stem.removeprefix("step-"))
            if step > self._shown:
                pixels = np.asarray(Image.open(path).convert("L"))
                self._writer.add_image("samples", pixels, step, dataformats="HW")
                self._shown = step
