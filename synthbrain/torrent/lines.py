"""The worker's end of the conversation: JSON lines on stdin and stdout."""

from __future__ import annotations

import json
import os
import selectors
from typing import Any


class Commands:
    """Lines of stdin as they come, without waiting for whole ones."""

    def __init__(self, source: int) -> None:
        self._source = source
        self._rest = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(source, selectors.EVENT_READ)

    def watch(self, alarm: int) -> None:
        """Wake up from :meth:`wait` when something can be read here, too."""
        self._selector.register(alarm, selectors.EVENT_READ)

    def wait(self, seconds: float | None) -> list[dict[str, Any] | None]:
        """Commands that came; the last is None if no more will."""
        found: list[dict[str, Any] | None] = []
        for key, _ in self._selector.select(seconds):
            data = os.read(key.fd, 1 << 16)
            if key.fd != self._source:
                continue
            *lines, self._rest = (self._rest + data).split(b"\n")
            found += map(json.loads, lines)
            if not data:
                self._selector.unregister(self._source)
                found.append(None)
        return found

    def first(self) -> dict[str, Any]:
        """The first line; empty if stdin closes before."""
        found: list[dict[str, Any] | None] = []
        while not found:
            found = self.wait(None)
        return found[0] or {}


def tell(event: str, **fields: Any) -> None:
    """Write an event to stdout; a parent that is gone is noticed elsewhere."""
    try:
        os.write(1, json.dumps({"event": event, **fields}).encode() + b"\n")
    except BrokenPipeError:
        os._exit(1)
