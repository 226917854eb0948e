"""Which generator a service holds, and the folder where it is found."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthbrain import __version__
from synthbrain.errors import UsageError
from synthbrain.home import home

if TYPE_CHECKING:
    from generation.generator import Generator


@dataclass(frozen=True)
class Spec:
    """How to load a generator.

    Parameters
    ----------
    name
        As :func:`synthbrain.generators.load_generator` takes it.
    device
        Where it computes; None leaves the choice to the generator.
    sampling
        Further options of the generator, such as ``solver`` and ``steps``; of JSON's types.

    Raises
    ------
    UsageError
        The name is no text, or an option is of another type.
    """

    name: str
    device: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise UsageError(
                f"a sampling service loads its generator itself, by name or as "
                f"'package.module:callable'; found {type(self.name).__name__}: pass such a name, "
                "or give the dataset the generator itself and num_workers=0"
            )
        try:
            json.dumps(self.sampling)
        except TypeError as error:
            raise UsageError(
                f"options of a shared generator must be numbers, text and lists of them: {error}"
            ) from None

    def folder(self) -> Path:
        """Where the service's socket, key and log lie: one per host, user, device and options.

        A version of the package never talks to another's service.
        """
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") if self.device != "cpu" else None
        told: list[Any] = [self.name, self.device, self.sampling, visible]
        told += [__version__, socket.gethostname(), os.getuid()]
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        readable = re.sub(r"[^A-Za-z0-9.]+", "-", f"{self.name}-{self.device or 'auto'}")[-60:]
        return home() / "sampling" / f"{readable.strip('-')}-{digest[:12]}"

    def load(self) -> Generator:
        """The generator.

        Raises
        ------
        GeneratorError
            There is none of that name, or its module has no such callable.
        """
        from synthbrain.generators import GENERATORS, load_generator

        options = self.sampling if self.device is None else {**self.sampling, "device": self.device}
        if self.name in GENERATORS and self.device == "cpu":
            options = self.sampling  # where they are anyway
        return load_generator(self.name, **options)
