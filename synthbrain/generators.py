"""Generators by name, and which one ``"auto"`` means."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from synthbrain.errors import GeneratorError
from synthbrain.home import home

if TYPE_CHECKING:
    from generation.generator import Generator


class StandInWarning(UserWarning):
    """``generator="auto"`` found no published weights and took an embedded generator."""


def _phantom() -> Generator:
    from generation.phantom import PhantomGenerator

    return PhantomGenerator(cache=home() / "cache")


GENERATORS: dict[str, Callable[[], Generator]] = {"phantom": _phantom}
"""Embedded generators, best first; ``"auto"`` takes the first one."""

_warned: set[str] = set()


def load_generator(name: str) -> Generator:
    """The generator called ``name``; ``"auto"`` picks the best one that is here.

    Raises
    ------
    GeneratorError
        There is none of that name.
    """
    if name == "auto":
        name = next(iter(GENERATORS))
        _warn_once(name)
    if name not in GENERATORS:
        raise GeneratorError(
            f"unknown generator {name!r}; expected auto, {', '.join(GENERATORS)}, "
            "or an object with the methods of generation.generator.Generator"
        )
    return GENERATORS[name]()


def identity(generator: Generator) -> str:
    """What samples call their maker, and the folder its volumes are kept in."""
    return f"{generator.name}-{generator.digest[:8]}"


def _warn_once(name: str) -> None:
    if name in _warned:
        return
    _warned.add(name)
    warnings.warn(
        f"volumes will be made by {name!r}, a procedural stand-in: the published model "
        "(Pinaya et al. 2022) is not part of this release. For realistic anatomy bring a model of "
        f"your own (docs/generators.md); ask for {name!r} by name to keep this one without a note",
        StandInWarning,
        stacklevel=4,
    )
