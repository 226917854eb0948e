"""What a published set says of itself: the dataset card, and ``CITATION.cff``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from generation.covariates import COVARIATES
from synthbrain.errors import UsageError
from synthbrain.manifest import Manifest
from synthbrain.publish.citations import SPDX, citations, title_of
from synthbrain.rows import PUBLISHED
from synthbrain.sizes import size_text

__all__ = ["Card", "citations", "readme", "require_rights", "title_of"]

TAGS = (
    "synthetic", "mri", "brain", "t1w", "neuroimaging", "medical", "3d", "zarr", "synthbrain",
)  # fmt: skip
TASKS = ("image-classification", "image-feature-extraction", "unconditional-image-generation")
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))
_LARGEST = "1M<n<10M"


@dataclass(frozen=True, kw_only=True)
class Card:
    """Everything a card tells.

    Parameters
    ----------
    manifest
        As published.
    made_by
        Identity of the generator, or ``"published"``.
    provenance
        What the generator says of itself.
    configs
        Pattern of the Parquet files by configuration and split, the default one first.
    files
        ``(bytes, sha256)`` of the published data files by path.
    rights
        What the publisher declared where the licence is not stated.
    authors
        Who publishes.
    repo_id
        Where on the Hub, ``ORG/NAME``, if known.
    """

    manifest: Manifest
    made_by: str
    configs: Mapping[str, Mapping[str, str]]
    provenance: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    rights: str = ""
    authors: tuple[str, ...] = ()
    repo_id: str | None = None

    @property
    def address(self) -> str:
        """The repository, or a place to write it in."""
        return self.repo_id or "ORG/NAME"

    @property
    def terms(self) -> str:
        """The licence in words."""
        licence = self.manifest.header.licence
        said = licence.name or licence.status
        return f"{said} ({licence.note})" if licence.note else said


def require_rights(manifest: Manifest, rights: str) -> None:
    """Raise unless the terms of the volumes are stated, or the publisher declares rights.

    Raises
    ------
    UsageError
        The header's licence is unknown and ``rights`` says nothing.
    """
    if manifest.header.licence.status == "unknown" and not rights.strip():
        published = (manifest.table["origin"] == PUBLISHED).any()
        whose = "of another publisher's volumes" if published else "of these volumes"
        raise UsageError(
            f"the licence {whose} is unknown ({manifest.name}: "
            f"{manifest.header.licence.note or 'the header states none'}); state it in the "
            'manifest\'s header, or declare your own: rights="I hold the rights: ..." (--rights)'
        )


def readme(card: Card) -> bytes:
    """The dataset card, ``README.md``."""
    header = card.manifest.header
    text = _TEXT.format(
        title=title_of(header),
        description=header.description or "Synthetic T1-weighted volumes of heads.",
        rows=len(card.manifest),
        splits=_splits(card.manifest),
        shape=" × ".join(map(str, header.geometry.shape)),
        dtype=header.geometry.dtype,
        scale=header.geometry.attributes["scale"],
        orientation=header.geometry.orientation,
        affine="; ".join(" ".join(f"{v:g}" for v in row) for row in header.geometry.affine),
        size=size_text(sum(size for size, _ in card.files.values())),
        loading=_loading(card),
        covariates=_covariates(card.manifest),
        made_by=_made_by(card),
        licence=card.terms,
        rights=f"\nDeclared by the publisher: {card.rights}\n" if card.rights else "",
        cited=citations(card.manifest, "bibtex", authors=card.authors),
        rows_digest=header.rows_digest,
        content_digest=header.content_digest,
    )
    return f"---\n{_metadata(card)}---\n\n{text}".encode()


def _metadata(card: Card) -> str:
    from huggingface_hub import DatasetCardData

    licence = card.manifest.header.licence
    known = SPDX.get(licence.name.lower()) if licence.status == "stated" else None
    other: dict[str, Any] = {} if known else {"license_name": "see-card"}
    data = DatasetCardData(
        license=known.lower() if known else "other",
        pretty_name=title_of(card.manifest.header),
        size_categories=[_size_category(len(card.manifest))],
        task_categories=list(TASKS),
        tags=list(TAGS),
        configs=_configs(card.configs),
        **other,
    )
    return str(data.to_yaml()) + "\n"


def _configs(configs: Mapping[str, Mapping[str, str]]) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = [
        {
            "config_name": name,
            "data_files": [{"split": split, "path": path} for split, path in splits.items()],
        }
        for name, splits in configs.items()
    ]
    listed[0]["default"] = True
    return listed


def _size_category(rows: int) -> str:
    return next((name for bound, name in _SIZES if rows < bound), _LARGEST)


def _splits(manifest: Manifest) -> str:
    counts = manifest.table["split"].value_counts(sort=False)
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _covariates(manifest: Manifest) -> str:
    if not manifest.header.conditional:
        return "The volumes are unconditional: the columns of covariates do not describe them."
    lines = ["| column | 0 is | 1 is | here, lowest | here, highest |", "|---|---|---|---|---|"]
    for covariate in COVARIATES:
        values = covariate.denormalise(manifest.table[covariate.name])
        if covariate.name == "sex":
            ends = ["female", "male", f"{values.min():g}", f"{values.max():g}"]
        else:
            numbers = (covariate.low, covariate.high, values.min(), values.max())
            ends = [f"{number:,.10g} {covariate.unit}" for number in numbers]
        lines.append(f"| `{covariate.name}` | {' | '.join(ends)} |")
    return "\n".join(lines)


def _made_by(card: Card) -> str:
    if card.made_by == PUBLISHED:
        return "The volumes were published before and are passed on unchanged in their voxels."
    told = "".join(f"\n- {name}: `{value}`" for name, value in sorted(card.provenance.items()))
    return f"Generator: `{card.made_by}`, its name and the start of its digest.\n{told}"


def _loading(card: Card) -> str:
    split = next(iter(next(iter(card.configs.values()))))
    text = _LOADING.format(repo=card.address, split=split)
    if "volumes" in card.configs:
        text += _VOXELS.format(repo=card.address, split=split)
    return text


_LOADING = """Pictures, covariates and where each volume lies; nothing else is downloaded:

```python
from datasets import load_dataset

rows = load_dataset("{repo}", split="{split}", streaming=True)
```

Volumes, read from the packs as they are asked for, each checked against its sha256:

```python
from synthbrain.hf import from_hf

for sample in from_hf(rows, repo="{repo}"):
    sample["image"]  # float32 tensor (1, x, y, z) in [0, 1]
```

A pack is a Zarr v3 array in a stored zip, for any Zarr library:

```python
import zarr

pack = zarr.storage.ZipStore("packs/block-0000.zarr.zip", mode="r")
volume = zarr.open_array(pack, mode="r")[17]
```
"""

_VOXELS = """
Voxels without synthbrain:

```python
load_dataset("{repo}", "volumes", split="{split}", streaming=True).with_format("numpy")
```
"""

_TEXT = """# {title}

{description}

**Every volume is synthetic**: computed by a generator, never scanned. None shows a person. What a
generator learned from scans of people can still show through in what it makes, so do not try to
find anybody in it. For research; not for clinical use.

- {rows:,} volumes ({splits}), {size}
- {shape} voxels, {dtype}; intensity = stored × {scale:.10g}, in [0, 1]
- axes {orientation}; voxel to world, mm: {affine}

## Loading

{loading}
## Covariates

What each volume was asked to have, normalised; a segmentation may measure something else. The
columns `age_years`, `ventricular_mm3` and `brain_mm3` hold the same in natural units.

{covariates}

## How it was made

{made_by}

`manifest.json` and `rows.parquet` list every row: seed, covariates and the sha256 of its volume.
Digest of the rows: `{rows_digest}`. Digest of the contents: `{content_digest}`.

## Licence

{licence}
{rights}
## Citation

```bibtex
{cited}```
"""
