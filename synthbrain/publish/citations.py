"""How to cite a manifest: its papers, itself and the software, as BibTeX, CFF or text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import synthbrain
from synthbrain.errors import UsageError

if TYPE_CHECKING:
    from synthbrain.header import Header
    from synthbrain.manifest import Manifest

Style = Literal["bibtex", "cff", "text"]
STYLES: tuple[Style, ...] = ("bibtex", "cff", "text")

SPDX = {
    "apache-2.0": "Apache-2.0",
    "cc0": "CC0-1.0",
    "cc0-1.0": "CC0-1.0",
    "cc-by-4.0": "CC-BY-4.0",
    "cc-by-sa-4.0": "CC-BY-SA-4.0",
    "cc-by-nc-4.0": "CC-BY-NC-4.0",
    "cc-by-nc-sa-4.0": "CC-BY-NC-SA-4.0",
    "mit": "MIT",
}
"""Identifiers of licences that headers name, in lower case, as SPDX spells them."""

SOFTWARE = "The synthbrain developers"
UNNAMED = "Its publishers (unnamed)"

_ARXIV = re.compile(r"arXiv[:\s]*(\d{4}\.\d{4,5})", re.IGNORECASE)
_DOI = re.compile(r"(?:doi[:\s]*|https?://doi\.org/)?(10\.\d{4,9}/[^\s,;]+)", re.IGNORECASE)
_YEAR = re.compile(r"\b(?:19|20)\d\d\b")
_SPECIAL = re.compile(r"([&%$#_{}])")


@dataclass(frozen=True)
class Reference:
    """One cited work, read out of a header's line ``authors, title, venue year, arXiv number``.

    What a line does not say stays empty; ``text`` is the line.
    """

    text: str
    authors: str = ""
    title: str = ""
    venue: str = ""
    year: str = ""
    arxiv: str = ""
    doi: str = ""

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read a line.

        Examples
        --------
        >>> found = Reference.parse("Pinaya et al., Brain Imaging, MICCAI 2022, arXiv 2209.07162")
        >>> found.authors, found.title, found.venue, found.year, found.arxiv
        ('Pinaya et al.', 'Brain Imaging', 'MICCAI', '2022', '2209.07162')
        """
        arxiv, doi = _ARXIV.search(text), _DOI.search(text)
        plain = _DOI.sub("", _ARXIV.sub("", text))
        year = _YEAR.search(plain)
        parts = [part.strip(" .,;") for part in _YEAR.sub("", plain).split(",")]
        authors, *rest = [part for part in parts if part] or [text]
        if authors.endswith(" et al"):
            authors += "."
        return cls(
            text=text,
            authors=authors if rest else "",
            title=rest[0] if rest else text,
            venue=", ".join(rest[1:]),
            year=year[0] if year else "",
            arxiv=arxiv[1] if arxiv else "",
            doi=doi[1] if doi else f"10.48550/arXiv.{arxiv[1]}" if arxiv else "",
        )

    @property
    def key(self) -> str:
        """BibTeX key: first author, year, first long word of the title."""
        first = re.sub(r"\W", "", (self.authors.split() or ["anonymous"])[0]).lower()
        words = [word for word in re.findall(r"\w+", self.title) if len(word) > 3]
        return f"{first}{self.year}{words[0].lower() if words else ''}"


def citations(manifest: Manifest, style: Style = "bibtex", *, authors: Sequence[str] = ()) -> str:
    """How to cite the volumes of a manifest.

    Parameters
    ----------
    manifest
        Whose header names the papers.
    style
        ``"bibtex"``, ``"cff"`` (the text of a ``CITATION.cff``) or ``"text"``.
    authors
        Who published the set.

    Raises
    ------
    UsageError
        Unknown style.

    Examples
    --------
    >>> from synthbrain.testing import tiny_manifest
    >>> print(citations(tiny_manifest(3), "text").splitlines()[0])
    Its publishers (unnamed), tiny: synthetic brain MRI, version 1
    """
    if style not in STYLES:
        raise UsageError(f"style must be one of {', '.join(STYLES)}; found {style!r}")
    header, named = manifest.header, tuple(authors) or (UNNAMED,)
    references = [Reference.parse(text) for text in header.citations]
    return {"bibtex": _bibtex, "cff": _cff, "text": _text}[style](header, references, named)


def title_of(header: Header) -> str:
    """What a published set is called."""
    return f"{header.name}: synthetic brain MRI"


def _text(header: Header, references: Iterable[Reference], authors: Sequence[str]) -> str:
    own = f"{', '.join(authors)}, {title_of(header)}, version {header.version}"
    software = f"{SOFTWARE}, synthbrain, version {synthbrain.__version__}"
    return "\n".join([own, *(reference.text for reference in references), software]) + "\n"


def _bibtex(header: Header, references: Iterable[Reference], authors: Sequence[str]) -> str:
    own = {
        "author": " and ".join(f"{{{_plain(author)}}}" for author in authors),
        "title": f"{{{_plain(title_of(header))}}}",
        "version": _plain(header.version),
        "note": f"Rows sha256 {header.rows_digest}",
    }
    software = {
        "author": f"{{{SOFTWARE}}}",
        "title": "synthbrain",
        "version": synthbrain.__version__,
    }
    entries = [_entry(re.sub(r"\W", "", header.name), own)]
    entries += [_entry(reference.key, _fields(reference)) for reference in references]
    return "\n".join([*entries, _entry("synthbrain", software)])


def _fields(reference: Reference) -> dict[str, str]:
    authors = _plain(reference.authors).replace(" et al.", " and others")
    return {
        "author": authors,
        "title": f"{{{_plain(reference.title)}}}",
        "howpublished": _plain(reference.venue),
        "year": reference.year,
        "eprint": reference.arxiv,
        "archivePrefix": "arXiv" if reference.arxiv else "",
        "doi": reference.doi,
    }


def _entry(key: str, fields: dict[str, str]) -> str:
    lines = [f"  {name} = {{{value}}}" for name, value in fields.items() if value]
    return f"@misc{{{key},\n" + ",\n".join(lines) + "\n}\n"


def _plain(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", text)


def _cff(header: Header, references: Sequence[Reference], authors: Sequence[str]) -> str:
    """JSON is YAML, so every value is written as JSON."""
    licence = SPDX.get(header.licence.name.lower())
    fields: dict[str, Any] = {
        "cff-version": "1.2.0",
        "message": "If you use these volumes, please cite them and the works they rest on.",
        "type": "dataset",
        "title": title_of(header),
        "version": header.version,
        "authors": [{"name": author} for author in authors],
        **({"license": licence} if licence else {}),
        "identifiers": [
            {"type": "other", "value": value, "description": what}
            for what, value in (
                ("sha256 of the rows", header.rows_digest),
                ("sha256 over the volumes", header.content_digest),
            )
            if value
        ],
        "references": [*map(_cff_reference, references), _CFF_SOFTWARE],
    }
    fields = {name: value for name, value in fields.items() if value}
    return "".join(f"{name}: {_yaml(value)}\n" for name, value in fields.items())


_CFF_SOFTWARE = {
    "type": "software",
    "title": "synthbrain",
    "version": synthbrain.__version__,
    "authors": [{"name": SOFTWARE}],
}


def _cff_reference(reference: Reference) -> dict[str, Any]:
    family, others, _ = reference.authors.partition(" et al.")
    people = [{"name": family or "unknown"}, *([{"name": "et al."}] if others else [])]
    fields = {
        "type": "article" if reference.venue else "generic",
        "title": reference.title,
        "authors": people,
        "year": int(reference.year) if reference.year else None,
        "doi": reference.doi,
        "notes": reference.text,
    }
    return {name: value for name, value in fields.items() if value}


def _yaml(value: Any) -> str:
    if isinstance(value, list):
        return "".join(f"\n  - {json.dumps(item, ensure_ascii=False)}" for item in value)
    return json.dumps(value, ensure_ascii=False)
