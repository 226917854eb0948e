"""What goes wrong between a folder and the Hub."""

from __future__ import annotations

from synthbrain.errors import SynthBrainError


class PublishError(SynthBrainError, OSError):
    """The Hub refused, is not reachable, or nobody is logged in."""
