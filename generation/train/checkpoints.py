"""Checkpoints of training runs: written in one step, kept a few, read without trusting them."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

import torch

from generation.errors import TrainingError

_NAME = re.compile(r"step-(\d{9})\.pt")

_STALE_SECONDS = 3600.0
"""Nobody takes so long to write a checkpoint: what is older was left by a run that was killed."""


def write(folder: Path, step: int, state: dict[str, Any], *, keep: int) -> Path:
    """Write a checkpoint, and delete all but the last few.

    Parameters
    ----------
    folder
        Of the run.
    step
        Optimiser steps done.
    state
        Tensors, numbers, text, and dicts and lists of those.
    keep
        How many checkpoints to keep.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:09d}.pt"
    scratch = path.with_suffix(f".{os.getpid()}.partial")
    try:
        torch.save(state, scratch)
        os.replace(scratch, path)
    except (OSError, RuntimeError) as error:  # PyTorch's own of a disk that is full
        reason = " ".join(str(error).split())[:200]
        raise TrainingError(
            f"cannot write {path} ({reason}); earlier checkpoints are intact: make room and run "
            "again"
        ) from error
    finally:
        scratch.unlink(missing_ok=True)
    for old in steps(folder)[:-keep]:
        (folder / f"step-{old:09d}.pt").unlink(missing_ok=True)
    for left in folder.glob("step-*.partial"):
        if time.time() - left.stat().st_mtime > _STALE_SECONDS:
            left.unlink(missing_ok=True)
    return path


def steps(folder: Path) -> list[int]:
    """Steps there are checkpoints of, ascending."""
    names = (_NAME.fullmatch(path.name) for path in folder.glob("step-*.pt"))
    return sorted(int(match[1]) for match in names if match)


def read(path: Path) -> dict[str, Any]:
    """A checkpoint.

    Raises
    ------
    TrainingError
        It cannot be read, or holds more than tensors, numbers and text.
    """
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise TrainingError(
            f"cannot read {path} ({reason}); delete it to go on from the one before"
        ) from None
