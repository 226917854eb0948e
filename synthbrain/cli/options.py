"""Options that several commands share."""

from __future__ import annotations

import functools
import inspect
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from synthbrain.cli.ranges import KINDS, parse
from synthbrain.errors import UsageError

_ROWS = "Which rows"

Cohort = Annotated[
    str, typer.Argument(metavar="COHORT", help="Name or folder of a manifest.", show_default=False)
]
GeneratorName = Annotated[
    str, typer.Option("--generator", metavar="NAME", help="Who makes missing volumes: "
                      "auto, none, or a name `synthbrain info` lists.")
]  # fmt: skip
StoreFolder = Annotated[
    Path | None,
    typer.Option("--store", metavar="DIR", help="Folder of stored volumes.",
                 show_default="store/ in the package's home"),
]  # fmt: skip
MadeBy = Annotated[
    str | None,
    typer.Option(metavar="MAKER", help="Whose volumes to read, where the store holds several."),
]
Json = Annotated[bool, typer.Option("--json", metavar=" ", help="Print JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", metavar=" ", help="Replace what is there.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", metavar=" ", help="Say what would be done, and stop.")
]
Age = Annotated[
    str | None,
    typer.Option(metavar="LO:HI", help="Years (59y:74y) or normalised (0.4:0.8).",
                 rich_help_panel=_ROWS),
]  # fmt: skip
Ventricles = Annotated[
    str | None,
    typer.Option(metavar="LO:HI", help="Ventricular volume: 20mL:60mL, mm3, or normalised.",
                 rich_help_panel=_ROWS),
]  # fmt: skip
Brain = Annotated[
    str | None,
    typer.Option(metavar="LO:HI", help="Brain volume: 1300mL:1500mL, mm3, or normalised.",
                 rich_help_panel=_ROWS),
]  # fmt: skip
Extrapolate = Annotated[
    bool,
    typer.Option("--extrapolate", metavar=" ", help="Allow ranges beyond the trained ones.",
                 rich_help_panel=_ROWS),
]  # fmt: skip


def ranges(**texts: str | None) -> dict[str, Any]:
    """Keyword arguments of the library from the range options given."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        text = texts[kind.option.removeprefix("--")]
        if text is not None:
            found |= parse(kind, text)
    return found


@dataclass(frozen=True)
class Selection:
    """Which rows of a manifest: the options of ``select``, ``fill``, ``verify`` and ``export``."""

    split: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Rows of this split; may be repeated.", rich_help_panel=_ROWS
        ),
    ] = None
    age: Age = None
    sex: Annotated[
        str | None, typer.Option(metavar="female|male", help="One sex.", rich_help_panel=_ROWS)
    ] = None
    ventricles: Ventricles = None
    brain: Brain = None
    where: Annotated[
        str | None,
        typer.Option(metavar="QUERY", help="A pandas query: 'age_years > 70 and seed % 2 == 0'.",
                     rich_help_panel=_ROWS),
    ] = None  # fmt: skip
    ids: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Only the ids in a file, one a line; - for stdin.",
                     rich_help_panel=_ROWS),
    ] = None  # fmt: skip
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", help="The first N at most.", rich_help_panel=_ROWS),
    ] = None
    extrapolate: Extrapolate = False

    @property
    def given(self) -> bool:
        """Whether any of them was."""
        return self != Selection()

    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of :meth:`synthbrain.Manifest.select`."""
        return {
            "split": self.split or None,
            "sex": self.sex,
            "where": self.where,
            "ids": None if self.ids is None else _ids(self.ids),
            "limit": self.limit,
            "extrapolate": self.extrapolate,
            **ranges(age=self.age, ventricles=self.ventricles, brain=self.brain),
        }


def selecting(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command every field of :class:`Selection` as an option, in place of ``selection``."""
    own = inspect.signature(command).parameters
    hints = typing.get_type_hints(command, include_extras=True)
    extra = typing.get_type_hints(Selection, include_extras=True)
    names = [field.name for field in fields(Selection)]
    defaults = {name: getattr(Selection, name) for name in names}

    @functools.wraps(command)
    def run(**options: Any) -> None:
        chosen = Selection(**{name: options.pop(name) for name in names})
        command(**options, selection=chosen)

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        parameter.replace(kind=keyword, annotation=hints[name])
        for name, parameter in own.items()
        if name != "selection"
    ]
    parameters += [
        inspect.Parameter(name, keyword, default=defaults[name], annotation=extra[name])
        for name in names
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def generator(name: str) -> str | None:
    """A ``--generator`` as the library takes it."""
    return None if name == "none" else name


def _ids(file: str) -> list[str]:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read ids from {file}: {error}") from None
    ids = text.split()
    if not ids:
        raise UsageError(f"{file} holds no ids; write one a line")
    return ids
