"""Sizes as people write them: 20MB, 3 GB."""

from __future__ import annotations

import re

from synthbrain.errors import UsageError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?")
_UNITS = ("", "k", "M", "G", "T")


def byte_count(size: int | str, what: str, *, least: int = 0) -> int:
    """Bytes of a size, in decimal units.

    Parameters
    ----------
    size
        Bytes, or a text such as ``"1.5GB"``.
    what
        The option it is of, for the error.
    least
        Fewer bytes are refused.

    Raises
    ------
    UsageError
        It is no size, or too small a one.

    Examples
    --------
    >>> byte_count("1.5GB", "cache_limit")
    1500000000
    """
    match = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if match is not None:
        size = round(float(match[1]) * 1000 ** _UNITS.index(match[2]))
    if not isinstance(size, int) or isinstance(size, bool) or size < least:
        raise UsageError(
            f"{what} must be {least} bytes or more, as a number or a size such as 500kB or "
            f"20GB; found {size!r}"
        )
    return size


def size_text(count: float) -> str:
    """Bytes as people write them.

    Examples
    --------
    >>> size_text(2_400_000)
    '2.4 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:  # what would be rounded to 1000 is one of the next unit
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
