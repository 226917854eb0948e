import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from synthbrain.errors import ManifestError
from synthbrain.header import Geometry, Header, Licence, ParentRef

LICENCE = Licence(status="stated", name="CC0")


def minimal(**changes):
    return json.dumps({"name": "tiny", "rows": 0, "licence": {"status": "unknown"}} | changes)


names = st.from_regex(r"\A[a-z0-9][a-z0-9._-]{0,79}\Z")
headers = st.builds(
    Header,
    name=names,
    version=st.text(max_size=10),
    description=st.text(),
    conditional=st.booleans(),
    rows=st.integers(0, 10**9),
    rows_digest=st.none() | st.from_regex(r"\A[0-9a-f]{64}\Z"),
    licence=st.builds(Licence, status=st.sampled_from(["stated", "unknown"]), note=st.text()),
    citations=st.lists(st.text(), max_size=3).map(tuple),
    parent=st.none()
    | st.builds(
        ParentRef,
        name=names,
        rows_digest=st.from_regex(r"\A[0-9a-f]{64}\Z"),
        selection=st.lists(st.text(), max_size=3).map(tuple),
    ),
    provenance=st.dictionaries(st.text(), st.text(), max_size=3),
    geometry=st.builds(
        Geometry,
        dtype=st.sampled_from(["uint8", "float16"]),
        scale=st.floats(1e-6, 1),
    ),
)


@given(headers)
def test_a_header_survives_its_text(header):
    assert Header.parse(header.text(), "here") == header


def test_a_minimal_header_has_the_published_geometry():
    header = Header.parse(minimal(), "here")
    assert header.geometry.shape == (160, 224, 160)
    assert header.geometry.affine[0] == (-1.0, 0.0, 0.0, 80.48149871826172)
    assert header.rows_digest is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not valid JSON"),
        (minimal()[:20], "not valid JSON"),
        ("[]", "holds list, expected a JSON object"),
        ("null", "holds NoneType"),
        (minimal(schema_version=2), "schema 2, this version reads up to 1; upgrade synthbrain"),
        (minimal(schema_version="1"), "field 'schema_version'"),
        (minimal(schema_version=0), "field 'schema_version'"),
        (minimal(licens={}), "unknown field 'licens'; did you mean 'licence'?"),
        (minimal(colour="red"), "unknown field 'colour'"),
        (minimal(geometry={"shapes": [1, 1, 1]}), "unknown field 'geometry.shapes'"),
        ('{"rows": 1, "licence": {"status": "unknown"}}', "required field 'name' is missing"),
        (minimal(licence={}), "required field 'licence.status' is missing"),
        (minimal(licence={"status": "free"}), "field 'licence.status'"),
        (minimal(rows="many"), "field 'rows'"),
        (minimal(rows=-1), "field 'rows'"),
        (minimal(name="Not a name"), "field 'name'"),
        (minimal(name="../up"), "field 'name'"),
        (minimal(name="a" * 81), "at most 80"),
        (minimal(rows_digest="abc"), "field 'rows_digest'"),
        (minimal(geometry={"chunks": [80, 112, 79]}), "do not divide"),
        (minimal(geometry={"chunks": [0, 112, 80]}), "do not divide"),
        (minimal(geometry={"shape": [0, 224, 160]}), "do not divide"),
        (minimal(geometry={"shape": [-80, 224, 160]}), "do not divide"),
        (minimal(geometry={"dtype": "float64"}), "'uint8' or 'float16'"),
        (minimal(geometry={"scale": 0}), "geometry.scale"),
        (minimal(geometry={"scale": float("nan")}), "geometry.scale"),
        (minimal(parent={"name": "p"}), "'parent.rows_digest' is missing"),
        (minimal(sources={"t": {"kind": "carrier pigeon"}}), "sources.t"),
        (
            minimal(sources={"t": {"kind": "archive", "url": "ftp://host/a.tar"}}),
            "must be an addre",
        ),
        (minimal(sources={"t": {"kind": "archive", "url": "/etc/passwd"}}), "must be an address"),
        (minimal(sources={"t": {"kind": "packs", "url": "javascript://x"}}), "must be an address"),
        (
            minimal(sources={"t": {"kind": "packs", "url": "https://x", "made_by": "../x"}}),
            "made_by",
        ),
        (minimal(sources={"t": {"kind": "torrent", "info_hash": "xyz", "file": "a"}}), "info_hash"),
        (
            minimal(sources={"t": {"kind": "torrent", "info_hash": "0" * 40, "file": "../a"}}),
            "without '.', '..'",
        ),
    ],
)
def test_a_damaged_header_is_refused_in_one_line_that_names_the_field(text, says):
    with pytest.raises(ManifestError) as refused:
        Header.parse(text, "cohorts/tiny/manifest.json")
    assert says in str(refused.value)
    assert str(refused.value).startswith("cohorts/tiny/manifest.json")
    assert "\n" not in str(refused.value)


def test_a_header_does_not_change():
    header = Header(name="tiny", rows=0, licence=LICENCE)
    with pytest.raises(ValidationError):
        header.rows = 3
