import json
import re

import pytest
import yaml

from synthbrain import Manifest
from synthbrain.errors import UsageError
from synthbrain.header import Header, Licence
from synthbrain.publish.citations import Reference, citations
from synthbrain.testing import tiny_manifest

PINAYA = (
    "Pinaya et al., Brain Imaging Generation with Latent Diffusion Models, MICCAI Workshop on "
    "Deep Generative Models 2022, arXiv 2209.07162"
)


@pytest.fixture
def card(folder):
    _, metadata, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


@pytest.fixture
def manifest():
    tiny = tiny_manifest(3)
    header = tiny.header.model_copy(update={"citations": (PINAYA, "A & B, 50% more, 2019")})
    return Manifest.create(header, tiny.table)


def test_metadata_says_what_the_hub_wants_to_know(card):
    metadata, _ = card
    assert metadata["license"] == "cc0-1.0"
    assert metadata["size_categories"] == ["n<1K"]
    assert metadata["pretty_name"] == "tiny: synthetic brain MRI"
    assert "synthetic" in metadata["tags"]
    assert metadata["task_categories"]
    default, volumes = metadata["configs"]
    assert default["default"]
    assert default["data_files"][0] == {"split": "train", "path": "data/train-*.parquet"}
    assert volumes["config_name"] == "volumes"


def test_the_text_says_what_a_reader_needs(card, folder):
    _, text = card
    header = Header.parse((folder / "manifest.json").read_text(), "x")
    for wanted in (
        "Every volume is synthetic", "not for clinical use", "tiny-01234567", "CC0",
        "6,995.68 mm³", "82 years", 'load_dataset("org/tiny"', "@misc{tiny", header.rows_digest,
        header.content_digest, "12 volumes",
    ):  # fmt: skip
        assert wanted in text


def test_lines_are_read_as_references():
    found = Reference.parse(PINAYA)
    assert found.title == "Brain Imaging Generation with Latent Diffusion Models"
    assert found.doi == "10.48550/arXiv.2209.07162"
    assert found.key == "pinaya2022brain"
    older = Reference.parse("Remedios et al. 2025, A Title, arXiv 2510.26834")
    assert (older.authors, older.year) == ("Remedios et al.", "2025")
    assert Reference.parse("ask the author").title == "ask the author"
    assert Reference.parse("A, T, 2020, doi:10.1000/xyz").doi == "10.1000/xyz"


def test_bibtex(manifest):
    text = citations(manifest, "bibtex")
    assert re.findall(r"@misc{(\w+),", text) == [
        "tiny",
        "pinaya2022brain",
        "a2019more",
        "synthbrain",
    ]
    assert "author = {Pinaya and others}" in text
    assert "eprint = {2209.07162}" in text
    assert r"A \& B" in text
    assert r"50\% more" in text
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")


def test_cff(manifest):
    found = yaml.safe_load(citations(manifest, "cff", authors=("Jane Doe",)))
    assert found["cff-version"] == "1.2.0"
    assert found["type"] == "dataset"
    assert found["authors"] == [{"name": "Jane Doe"}]
    assert found["license"] == "CC0-1.0"
    assert found["identifiers"][0]["value"] == manifest.header.rows_digest
    paper = found["references"][0]
    assert paper["year"] == 2022
    assert paper["authors"] == [{"name": "Pinaya"}, {"name": "et al."}]


def test_text_and_unknown_styles(manifest):
    assert citations(manifest, "text").splitlines()[1] == PINAYA
    with pytest.raises(UsageError, match="style must be one of bibtex, cff, text"):
        citations(manifest, "apa")


@pytest.mark.parametrize("name", ["synthbrain-100k", "ldm-100k"])
def test_shipped_manifests_can_be_cited(name):
    assert "pinaya2022brain" in citations(Manifest.open(name), "bibtex")


def test_unlisted_licences_are_other(tmp_path):
    from synthbrain.publish.cards import Card, readme

    tiny = tiny_manifest(2)
    licence = Licence(status="stated", name="House rules", note="ask first")
    header = tiny.header.model_copy(update={"licence": licence, "conditional": False})
    card = Card(
        manifest=Manifest.create(header, tiny.table), made_by="published",
        configs={"default": {"train": "data/train-*.parquet"}},
    )  # fmt: skip
    text = readme(card).decode()
    assert yaml.safe_load(text.split("---\n")[1])["license"] == "other"
    assert "House rules (ask first)" in text
    assert "do not describe them" in text


def test_croissant_is_what_mlcroissant_reads(folder):
    mlcroissant = pytest.importorskip("mlcroissant")
    found = mlcroissant.Dataset(jsonld=str(folder / "croissant.json"))
    assert not found.metadata.issues.errors
    rows = list(found.records("rows"))
    assert len(rows) == 12


def test_croissant_lists_every_data_file_and_column(folder):
    import pandas as pd

    from synthbrain.files import sha256_of

    found = json.loads((folder / "croissant.json").read_text())
    assert found["conformsTo"] == "http://mlcommons.org/croissant/1.0"
    assert found["url"].endswith("org/tiny")
    listed = {file["contentUrl"]: file for file in found["distribution"]}
    there = {str(p.relative_to(folder)) for s in ("parquet", "zip") for p in folder.rglob(f"*.{s}")}
    assert set(listed) == there
    for path, file in listed.items():
        assert file["sha256"] == sha256_of(folder / path)
        assert file["contentSize"] == f"{(folder / path).stat().st_size} B"
    columns = [field["name"] for field in found["recordSet"][0]["field"]]
    assert columns == ["id", *[c for c in pd.read_parquet(folder / "rows.parquet") if c != "id"]]
