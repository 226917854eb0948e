"""Generators by name, and which one ``"auto"`` means."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthbrain.errors import GeneratorError
from synthbrain.home import home

if TYPE_CHECKING:
    from generation.generator import Generator
    from generation.weights import Weights
    from synthbrain.header import Geometry


class StandInWarning(UserWarning):
    """``generator="auto"`` found no published weights and took an embedded generator."""


PREFERRED = "ukb-ldm"
"""What ``"auto"`` takes where its weights are installed."""


def _phantom() -> Generator:
    from generation.phantom import PhantomGenerator

    return PhantomGenerator(cache=home() / "cache")


GENERATORS: dict[str, Callable[..., Generator]] = {"phantom": _phantom}
"""Embedded generators, best first; without weights ``"auto"`` takes the first one."""

_warned: set[str] = set()


def weights_folder() -> Path:
    """Where installed weights lie."""
    return home() / "weights"


def find_weights(name: str) -> Weights:
    """Installed weights.

    Raises
    ------
    WeightsError
        There are none of that name.
    """
    from generation import weights

    return weights.load(name, weights_folder())


def load_generator(name: str, **sampling: Any) -> Generator:
    """The generator called ``name``; ``"auto"`` picks the best one that is here.

    Parameters
    ----------
    name
        ``"auto"``, an embedded generator, installed weights, or ``"package.module:callable"`` for
        what returns a generator.
    sampling
        For a callable: its arguments. For weights: arguments of
        :class:`generation.options.Options` such as ``solver``, ``steps``, ``dtype`` and
        ``device``, and ``decode`` and ``progress`` of
        :class:`generation.latent.LatentDiffusion`. GANs take ``dtype`` and ``device`` alone.

    Raises
    ------
    GeneratorError
        There is none of that name, its weights are not here, or it has no such options.
    """
    if name == "auto":
        name = PREFERRED if _is_installed(PREFERRED) else next(iter(GENERATORS))
        if name != PREFERRED:
            _warn_once(name)
    if ":" in name:
        make = _imported(name)
        _check_callable(name, make, sampling)
        return make(**sampling)
    if name not in GENERATORS:
        _check_installed(name)
        return _from_weights(find_weights(name), sampling)
    if sampling:
        raise GeneratorError(
            f"generator {name!r} takes no {', '.join(sorted(sampling))}: only generators with "
            "weights do"
        )
    return GENERATORS[name](**sampling)


def identity(generator: Generator) -> str:
    """What samples call their maker, and the folder its volumes are kept in."""
    return f"{generator.name}-{generator.digest[:8]}"


def geometry_of(generator: Generator) -> Geometry:
    """Geometry of a generator's volumes: the default one, or shape and ``affine`` of its own."""
    from synthbrain.header import Geometry

    if tuple(generator.shape) == Geometry().shape:
        return Geometry()
    x, y, z = generator.shape
    rows = getattr(generator, "affine", None) or Geometry().affine
    a, b, c = (n // 2 if n % 2 == 0 else n for n in (x, y, z))
    return Geometry(shape=(x, y, z), chunks=(a, b, c), affine=rows, orientation=_axes(rows))


def _axes(affine: Any) -> str:
    from nibabel.orientations import aff2axcodes

    return "".join(aff2axcodes(affine))


def _is_installed(name: str) -> bool:
    return (weights_folder() / name / "weights.json").is_file()


def _imported(name: str) -> Callable[..., Generator]:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise GeneratorError(
            f"cannot load generator {name!r}: {error}; expected 'package.module:callable' "
            "with a module that new processes can import"
        ) from None


def _check_callable(name: str, make: Any, sampling: dict[str, Any]) -> None:
    try:
        inspect.signature(make).bind(**sampling)
    except TypeError as error:
        asked = f"with {', '.join(sorted(sampling))}" if sampling else "without arguments"
        raise GeneratorError(f"{name!r} cannot be called {asked}: {error}") from None
    except ValueError:  # some built-in callables do not tell theirs
        return


def _check_installed(name: str) -> None:
    from generation.hub import PUBLISHED

    if _is_installed(name):
        return
    if name in PUBLISHED:
        raise GeneratorError(
            f"the weights of {name!r} are not in {weights_folder()}; fetch them with "
            f"`synthbrain weights pull {name}`"
        )
    known = ", ".join(["auto", *GENERATORS, *PUBLISHED])
    raise GeneratorError(
        f"unknown generator {name!r}; expected one of {known}, weights added with `synthbrain "
        "weights add`, 'package.module:callable', or an object with the methods of "
        "generation.generator.Generator"
    )


def _from_weights(found: Weights, sampling: dict[str, Any]) -> Generator:
    from generation.latent import LatentDiffusion
    from generation.options import Options
    from generation.pixel import PixelDiffusion
    from generation.presets import Preset

    if not isinstance(found.preset, Preset):
        return _gan(found, sampling)
    system = LatentDiffusion if found.preset.system == "latent" else PixelDiffusion
    others = {key: sampling.pop(key) for key in ("decode", "progress") if key in sampling}
    if system is PixelDiffusion:
        others.pop("decode", None)
    try:
        options = Options(**sampling)
        options.solution(found.preset)
        return system(found, options, **others)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise GeneratorError(f"{found.name} cannot sample like this: {reason}") from None


def _gan(found: Weights, sampling: dict[str, Any]) -> Generator:
    from generation.gan import OPTIONS, GanGenerator
    from generation.options import Options

    if meaningless := sorted(set(sampling) - OPTIONS):
        raise GeneratorError(
            f"{found.name} is a GAN, which makes a volume in one pass: it takes no "
            f"{', '.join(meaningless)}"
        )
    try:
        return GanGenerator(found, Options(**sampling))
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise GeneratorError(f"{found.name} cannot sample like this: {reason}") from None


def _warn_once(name: str) -> None:
    if name in _warned:
        return
    _warned.add(name)
    warnings.warn(
        f"volumes will be made by {name!r}, a stand-in that never saw people: the weights of the "
        "published model (Pinaya et al. 2022) are not here. Fetch them with `synthbrain weights "
        f"pull {PREFERRED}`, or ask for {name!r} by name to keep this one without a note",
        StandInWarning,
        stacklevel=4,
    )
