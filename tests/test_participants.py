import pytest

from generation.covariates import AGE, BRAIN_VOLUME
from synthbrain.errors import ManifestError
from synthbrain.participants import read_participants

ALIASES = {"id": ("participant_id",), "sex": ("gender",), "ventricular_volume": ("ventricle_vol",),
           "brain_volume": ("brain_vol",)}  # fmt: skip
HEADER = "participant_id\tage\tsex\tventricle_vol\tbrain_vol\n"


def read(text):
    return read_participants(text.encode(), ALIASES, "participants.tsv")


def test_natural_units_are_normalised():
    table = read(HEADER + "sub-000001\t63\tF\t30000\t1400000\nsub-000002\t70\tM\t31000\t1500000\n")
    assert table.index.tolist() == ["sub-000001", "sub-000002"]
    assert table["sex"].tolist() == [0.0, 1.0]
    assert table["age"].tolist() == pytest.approx(AGE.normalise([63, 70]))
    assert table["brain_volume"].tolist() == pytest.approx(BRAIN_VOLUME.normalise([1.4e6, 1.5e6]))
    assert set(table["origin"]) == {"published"}
    assert table["seed"].isna().all()


def test_normalised_values_stay_and_ids_get_their_prefix():
    table = read("Participant_ID\tAge\tGender\tventricle_vol\tbrain_vol\n7\t0.5\t1.0\t0.1\t1.2\n")
    assert table.index.tolist() == ["sub-7"]
    assert table.iloc[0][["sex", "age", "brain_volume"]].tolist() == [1.0, 0.5, 1.2]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("participant_id\tyears\tsex\tventricle_vol\tbrain_vol\n", "no columns for age"),
        (HEADER.replace("sex", "sex\tgender"), "2 columns for sex"),
        (HEADER + "a\t60\tx\t1\t2\n", "sex must be"),
        (HEADER + "a\told\tF\t1\t2\n", "column age"),
        (HEADER + "a\tnan\tF\t1\t2\n", "must be finite"),
        (HEADER + "a\t60\tF\t1\t2\na\t60\tF\t1\t2\n", "repeats"),
        (HEADER + "../a\t60\tF\t1\t2\n", "is not made of letters"),
        ("\0\0\0", "no columns for id"),
    ],
)
def test_what_is_no_such_table_is_refused_in_one_line(text, says):
    with pytest.raises(ManifestError, match=says) as refused:
        read(text)
    assert "participants.tsv" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_unknown_header_lists_what_was_found():
    with pytest.raises(ManifestError, match=r"expected one of age; found participant_id, years"):
        read("participant_id\tyears\tsex\tventricle_vol\tbrain_vol\n")
