"""``croissant.json``: the published files and rows as machine-readable JSON-LD (Croissant 1.0)."""

from __future__ import annotations

import json
from typing import Any

from generation.covariates import COVARIATES
from synthbrain.publish.cards import Card, title_of
from synthbrain.publish.citations import SPDX, UNNAMED, citations

CONFORMS_TO = "http://mlcommons.org/croissant/1.0"

_ROWS = "rows.parquet"
_FORMATS = {".zip": "application/zip", ".json": "application/json"}
_PARQUET = "application/x-parquet"
_COLUMNS = {
    "id": ("sc:Text", "Id of the row"),
    "split": ("sc:Text", "Split the row belongs to"),
    **{
        c.name: ("sc:Float", f"Normalised: 0 is {c.low:,.10g}, 1 is {c.high:,.10g} ({c.unit})")
        for c in COVARIATES
    },
    "seed": ("sc:Integer", "Seed the volume was made from; missing for published ones"),
    "origin": ("sc:Text", "recipe or published"),
    "sha256": ("sc:Text", "Hash of the volume's shard in its pack"),
}
_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}


def croissant(card: Card) -> bytes:
    """The description of a published set; addresses are relative to the file."""
    header = card.manifest.header
    known = SPDX.get(header.licence.name.lower())
    described: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "name": header.name,
        "conformsTo": CONFORMS_TO,
        "description": header.description or title_of(header),
        "version": f"{header.version}.0.0" if header.version.isdigit() else header.version,
        "license": f"https://spdx.org/licenses/{known}.html" if known else card.terms,
        "creator": [{"@type": "sc:Organization", "name": n} for n in card.authors or (UNNAMED,)],
        "citeAs": citations(card.manifest, "bibtex", authors=card.authors),
        "rai:dataCollection": f"Synthetic: made by {card.made_by}; nobody was scanned for it.",
        "distribution": [_file(path, *card.files[path]) for path in sorted(card.files)],
        "recordSet": [_record_set()],
    }
    if card.repo_id:
        described["url"] = f"https://huggingface.co/datasets/{card.repo_id}"
    return (json.dumps(described, indent=2, ensure_ascii=False) + "\n").encode()


def _file(path: str, size: int, sha256: str) -> dict[str, Any]:
    suffix = path[path.rindex(".") :]
    return {
        "@type": "cr:FileObject",
        "@id": path,
        "name": path,
        "contentUrl": path,
        "contentSize": f"{size} B",
        "encodingFormat": _FORMATS.get(suffix, _PARQUET),
        "sha256": sha256,
    }


def _record_set() -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": "rows",
        "name": "rows",
        "description": "One volume a row.",
        "key": {"@id": "rows/id"},
        "field": [
            {
                "@type": "cr:Field",
                "@id": f"rows/{name}",
                "name": name,
                "description": description,
                "dataType": kind,
                "source": {"fileObject": {"@id": _ROWS}, "extract": {"column": name}},
            }
            for name, (kind, description) in _COLUMNS.items()
        ],
    }
