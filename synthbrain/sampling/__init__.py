"""One process per device that makes volumes for every DataLoader worker and rank of a node.

:class:`SharedGenerator` is what datasets are given; it starts the service when first needed.
"""

from __future__ import annotations

from synthbrain.sampling.client import SharedGenerator
from synthbrain.sampling.launch import status
from synthbrain.sampling.service import serve

__all__ = ["SharedGenerator", "serve", "status"]
