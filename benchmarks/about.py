"""What a benchmark ran on, for the head of its page."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path


def setting(packages: Iterable[str] = ()) -> str:
    """Processor, usable cores, and versions of Python, synthbrain and other packages.

    Parameters
    ----------
    packages
        Distributions, by name; what is not installed is told to be so.
    """
    told = [_processor(), f"{_cores()} cores", f"Python {platform.python_version()}"]
    return ", ".join(told + [_version(name) for name in ("synthbrain", *packages)])


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _version(package: str) -> str:
    if package == "synthbrain":
        import synthbrain

        return f"synthbrain {synthbrain.__version__}"  # also from a checkout that is not installed
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} not installed"
