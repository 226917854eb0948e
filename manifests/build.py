"""Write the shipped manifests. Deterministic: running it again changes no byte.

``python manifests/build.py`` writes ``manifests/synthbrain-100k`` and ``manifests/ldm-100k``; with
``--check`` it exits 1 if what is committed differs.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import sys
import tempfile
from pathlib import Path

from synthbrain.cohort import recipes, rounded
from synthbrain.header import Archive, Header, Licence, TorrentSource
from synthbrain.joint import UK_BIOBANK
from synthbrain.manifest import Manifest
from synthbrain.rows import write_rows

HERE = Path(__file__).parent
PAPER = (
    "Pinaya et al., Brain Imaging Generation with Latent Diffusion Models, MICCAI Workshop on Deep "
    "Generative Models 2022, arXiv 2209.07162"
)
UNCROPPED = (
    (-1.0, 0.0, 0.0, 96.48149872),
    (0.0, 1.0, 0.0, -141.47715759),
    (0.0, 0.0, 1.0, -156.55375671),
    (0.0, 0.0, 0.0, 1.0),
)
"""The affine of the authors' demonstration, which belongs to the grid before cropping."""
N = 100_000
SEED = 220907162


def synthbrain_100k() -> Manifest:
    """100,000 recipes from the published joint distribution."""
    drawn = {name: rounded(values) for name, values in UK_BIOBANK.draw(N, seed=SEED).items()}
    header = Header(
        name="synthbrain-100k",
        description=(
            "100,000 recipes of brains whose covariates follow the cohort the published model was "
            "trained on"
        ),
        rows=N,
        licence=Licence(
            status="stated",
            name="Apache-2.0",
            note="covers the rows; volumes carry the terms of the generator that made them",
        ),
        citations=(PAPER,),
        provenance={
            "rows": f"manifests/build.py: synthbrain.joint.UK_BIOBANK.draw({N}, seed={SEED})",
            "distribution": "docs/covariates.md says what is published and what is assumed",
        },
    )
    return Manifest.create(header, recipes(drawn, stem="sb", seed=SEED))


def ldm_100k() -> Header:
    """The released set: everything but the rows, which come out of its archive."""
    return Header(
        name="ldm-100k",
        description="100,000 synthetic T1w volumes released with the paper, 591.19 GB",
        rows=0,
        licence=Licence(
            status="unknown",
            note="not stated anywhere we could read; the archive's own text decides",
        ),
        citations=(PAPER,),
        archive=Archive(
            name="LDM_100k.tar",
            size=591_190_000_000,
            member="LDM_100k/rawdata/{id}/anat/{id}_T1w.nii.gz",
            participants="LDM_100k/participants.tsv",
            column_aliases={
                "id": ("participant_id",),
                "age": ("age",),
                "sex": ("sex", "gender"),
                "ventricular_volume": (
                    "ventricular_volume", "ventricle_vol", "ventricular_vol",
                ),
                "brain_volume": ("brain_volume", "brain_vol"),
            },
            affines=(UNCROPPED,),
        ),
        sources={
            "torrent": TorrentSource(
                kind="torrent",
                info_hash="63aeb864bbe2115ded0aa0d7d36334c026f0660b",
                file="LDM-data/LDM_100k.tar",
            )
        },
        provenance={"size": "591.19 GB as listed with the torrent; the exact count is unknown"},
    )  # fmt: skip


def write(folder: Path) -> None:
    """Write both manifests below ``folder``."""
    drawn, released = synthbrain_100k(), ldm_100k()
    for header in (drawn.header, released):
        (folder / header.name).mkdir(parents=True, exist_ok=True)
        (folder / header.name / "manifest.json").write_text(header.text())
    write_rows(folder / drawn.name / "rows.parquet", drawn.table, None, None)


def check() -> int:
    """Compare a fresh build with what is committed; returns the exit code."""
    scratch = Path(tempfile.mkdtemp())
    try:
        write(scratch)
        names = [p.relative_to(scratch) for p in sorted(scratch.rglob("*")) if p.is_file()]
        stale = [n for n in names if not filecmp.cmp(scratch / n, HERE / n, shallow=False)]
    finally:
        shutil.rmtree(scratch)
    for name in stale:
        print(f"manifests/{name} differs from a fresh build", file=sys.stderr)
    return 1 if stale else 0


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    if parser.parse_args().check:
        return check()
    write(HERE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
