"""Synthetic brain MRI for deep learning: ask for a cohort, get volumes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from synthbrain.cohort import draw_cohort
    from synthbrain.dataset import SynthBrainDataset
    from synthbrain.errors import SynthBrainError
    from synthbrain.hf import from_hf, to_hf
    from synthbrain.manifest import Manifest
    from synthbrain.mixing import mix
    from synthbrain.pull import Pull
    from synthbrain.quantise import as_float
    from synthbrain.sampler import SynthBrainSampler
    from synthbrain.sources.folder import FolderSource
    from synthbrain.store import Store
    from synthbrain.stream import SynthBrainStream

__version__ = "0.1.0.dev0"

__all__ = [
    "FolderSource",
    "Manifest",
    "Pull",
    "Store",
    "SynthBrainDataset",
    "SynthBrainError",
    "SynthBrainSampler",
    "SynthBrainStream",
    "as_float",
    "draw_cohort",
    "from_hf",
    "mix",
    "to_hf",
]

_HOMES = {
    "FolderSource": "synthbrain.sources.folder",
    "Manifest": "synthbrain.manifest",
    "Pull": "synthbrain.pull",
    "Store": "synthbrain.store",
    "SynthBrainDataset": "synthbrain.dataset",
    "SynthBrainError": "synthbrain.errors",
    "SynthBrainSampler": "synthbrain.sampler",
    "SynthBrainStream": "synthbrain.stream",
    "as_float": "synthbrain.quantise",
    "draw_cohort": "synthbrain.cohort",
    "from_hf": "synthbrain.hf",
    "mix": "synthbrain.mixing",
    "to_hf": "synthbrain.hf",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use: torch takes a second that ``--help`` need not wait for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'synthbrain' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
