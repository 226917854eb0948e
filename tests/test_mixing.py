import pickle
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from generation.covariates import NAMES
from synthbrain import SynthBrainDataset, as_float
from synthbrain.errors import UsageError
from synthbrain.mixing import Landmarks, as_subject, mix
from synthbrain.testing import TINY, TinyGenerator, tiny_manifest

KEYS = {"image": "T1w", "age": "age_years"}


class Rows(Dataset):
    """Rows without volumes: a number each, and a table."""

    def __init__(self, n, age=None):
        self.table = pd.DataFrame({"age": np.linspace(0, 1, n) if age is None else age})

    def __len__(self):
        return len(self.table)

    def __getitem__(self, index):
        return {"age": self.table["age"].iloc[index], "number": index}


class Scans(Dataset):
    """Scans as others name them: NumPy volumes and years."""

    shape = (1, *TINY.shape)

    def __init__(self, n=6):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        image = np.random.default_rng(index).random(self.shape)
        return {"T1w": image, "age_years": 50 + index, "site": "here"}


@pytest.fixture
def cohort(tmp_path):
    """Builds a dataset of ``n`` tiny recipes."""

    def make(n, name="tiny", **options):
        rows = tiny_manifest(n, name=name, seed=len(name))
        options = {"generator": TinyGenerator(), "store": tmp_path / "store"} | options
        return SynthBrainDataset(rows, **options)

    return make


@pytest.fixture
def mixed(cohort):
    """Builds a mix of 6 real and 30 synthetic tiny volumes, three quarters synthetic."""

    def make(**options):
        return mix(cohort(6, "scans"), cohort(30), **({"ratio": 0.75} | options))

    return make


def counts(table, origin, size):
    return np.bincount(table["row"][table["origin"] == origin], minlength=size)


def assert_same(ones, others):
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if torch.is_tensor(value):
                assert torch.equal(value, other[key]), key
            else:
                assert value == other[key], key


# Which rows an epoch has


@settings(max_examples=60)
@given(
    real=st.integers(1, 40),
    synthetic=st.integers(1, 40),
    ratio=st.floats(0, 0.95),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**31 - 1),
)
def test_an_epoch_has_every_real_row_once_and_synthetic_ones_fill_the_share(
    real, synthetic, ratio, seed, epoch
):
    made = mix(Rows(real), Rows(synthetic), ratio=ratio, seed=seed, keys=["age"])
    table = made.table(epoch)
    share = Fraction(ratio)
    assert len(table) == len(made)
    assert (counts(table, "real", real) == 1).all()
    drawn = counts(table, "synthetic", synthetic)
    assert abs(drawn.sum() - real * share / (1 - share)) <= Fraction(1, 2) + Fraction(1, 10**9)
    assert drawn.max() - drawn.min() <= 1
    assert table.equals(made.table(epoch))
    again = mix(Rows(real), Rows(synthetic), ratio=ratio, seed=seed, keys=["age"])
    assert table.equals(again.table(epoch))


@given(
    real=st.integers(1, 20),
    synthetic=st.integers(1, 20),
    ratio=st.floats(0, 1),
    length=st.integers(1, 200),
)
def test_a_length_keeps_the_share_and_goes_through_all_rows_before_repeating(
    real, synthetic, ratio, length
):
    made = mix(Rows(real), Rows(synthetic), ratio=ratio, length=length, keys=["age"])
    table = made.table(2)
    assert len(made) == len(table) == length
    assert (table["origin"] == "synthetic").sum() == round(ratio * length)
    for origin, size in (("real", real), ("synthetic", synthetic)):
        seen = counts(table, origin, size)
        assert seen.max() - seen.min() <= 1


def test_only_synthetic_rows_are_each_there_once():
    made = mix(Rows(3), Rows(17), ratio=1, keys=["age"])
    assert (counts(made.table(0), "synthetic", 17) == 1).all()
    assert len(made) == 17


def test_seeds_and_epochs_give_other_orders_of_other_rows():
    tables = [
        mix(Rows(50), Rows(500), ratio=0.5, seed=seed, keys=["age"]).table(epoch)
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    for number, one in enumerate(tables):
        for other in tables[:number]:
            assert (one["origin"] != other["origin"]).any()
            assert set(one["row"]) != set(other["row"])


def test_every_position_is_as_likely_synthetic_as_the_share_says():
    made = mix(Rows(20), Rows(100), ratio=0.75, keys=["age"])
    tables = [made.table(epoch) for epoch in range(400)]
    share = np.mean([table["origin"] == "synthetic" for table in tables], axis=0)
    assert np.abs(share - 0.75).max() < 5 * np.sqrt(0.75 * 0.25 / 400)
    rows = np.concatenate([table["row"][table["origin"] == "synthetic"] for table in tables])
    expected = len(rows) / 100
    chi2 = ((np.bincount(rows, minlength=100) - expected) ** 2 / expected).sum()
    assert chi2 < 170  # 99 degrees of freedom: far beyond the 99.99th percentile


def test_samples_are_those_the_table_names(mixed):
    made = mixed()
    for epoch in (0, 3):
        made.set_epoch(epoch)
        table = made.table(epoch)
        for position, (origin, row, id) in enumerate(table[["origin", "row", "id"]].to_numpy()):
            sample = made[position]
            assert (sample["origin"], sample["id"]) == (origin, id)
            side = made.real if origin == "real" else made.synthetic
            assert torch.equal(sample["image"], side[row]["image"])
            for name in NAMES:
                assert sample[name] == np.float32(table[name][position])


def test_positions_are_those_of_a_sequence(mixed):
    made = mixed()
    assert_same([made[-1], made[np.int64(2)]], made.__getitems__([len(made) - 1, 2]))
    assert made.__getitems__([]) == []
    for outside in (24, -25):
        with pytest.raises(IndexError, match="of a mix with 24 samples"):
            made[outside]
    assert repr(made) == "<Mixed: 6 real and 18 synthetic samples an epoch>"


# Balance


def peer_counts(there, filled, count):
    """One at a time into the lowest bin there are synthetic rows for."""
    heights = there.astype(float)
    for _ in range(count):
        heights[np.argmin(np.where(filled, heights, np.inf))] += 1
    return np.sort(heights)


@given(
    real=st.lists(st.integers(0, 7), min_size=1, max_size=40),
    synthetic=st.lists(st.integers(0, 7), min_size=1, max_size=40),
    ratio=st.floats(0, 0.9),
)
def test_the_mix_is_as_even_as_adding_rows_where_fewest_are(real, synthetic, ratio):
    made = mix(Rows(len(real), real), Rows(len(synthetic), synthetic), ratio=ratio,
               balance="age", keys=["age"])  # fmt: skip
    table = made.table(5)
    there = np.bincount(real, minlength=8)
    filled = np.bincount(synthetic, minlength=8) > 0
    ages = table["age"].astype(int)
    expected = peer_counts(there, filled, len(table) - len(real))
    assert np.array_equal(np.sort(np.bincount(ages, minlength=8)), expected)
    drawn = counts(table, "synthetic", len(synthetic))
    for age in range(8):
        mine = drawn[np.array(synthetic) == age]
        assert mine.max(initial=0) - mine.min(initial=len(table)) <= 1
    assert (counts(table, "real", len(real)) == 1).all()


def test_a_covariate_is_cut_into_ten_bins():
    skewed = np.linspace(0, 1, 100) ** 3
    made = mix(Rows(100, skewed), Rows(1000), ratio=0.9, balance="age", keys=["age"])
    binned = np.histogram(made.table(0)["age"], bins=10, range=(0, 1))[0]
    assert binned.tolist() == [100] * 10


def test_words_and_labels_of_a_callable_are_bins(cohort):
    real, synthetic = cohort(9, "scans", units="natural"), cohort(80, units="natural")
    sexes = mix(real, synthetic, ratio=0.5, length=18, balance="sex").table(0)["sex"]
    assert sorted(sexes.value_counts()) == [9, 9]

    def decade(table):
        return (table["age"] // 10).astype(int)

    table = mix(real, synthetic, ratio=0.9, balance=decade).table(0)
    per_decade = decade(table).value_counts()
    assert per_decade.max() - per_decade.min() <= 1


def test_tables_of_subsets_concatenations_and_monai_datasets(cohort):
    from monai.data import Dataset as MonaiDataset

    listed = MonaiDataset([{"T1w": f"{n}.nii.gz", "age_years": 0.1 * n} for n in range(10)])
    real = ConcatDataset([Subset(listed, [9, 8]), listed])
    made = mix(real, cohort(50), ratio=0.5, balance="age", keys=KEYS)
    table = made.table(0)
    mine = table[table["origin"] == "real"].sort_values("row")
    assert np.allclose(mine["age"], [0.9, 0.8, *np.arange(10) / 10])
    assert table["id"][table["origin"] == "synthetic"].str.startswith("tiny").all()


@pytest.mark.parametrize(
    ("real", "balance", "message"),
    [
        (Scans(), "age", "has no table"),
        (Rows(3), "brain_volume", "name in keys= what it has"),
        (Rows(3, [0.1, None, 0.2]), "age", "1 real rows have no value"),
        (Rows(3, [50, 60, 70]), "age", "age = 50 and the synthetic ones' are normalised"),
        (Rows(3), len, "one label per row"),
    ],
)
def test_what_cannot_be_balanced_is_said(cohort, real, balance, message):
    with pytest.raises(UsageError, match=message):
        mix(real, cohort(5), ratio=0.5, balance=balance, keys=["age"])


# Keys


def test_samples_have_the_same_keys_and_types_from_both(cohort):
    made = mix(Scans(), cohort(20, units="natural"), ratio=0.5, keys=KEYS)
    for sample in made:
        assert set(sample) == {"image", "age", "id", "origin"}
        assert sample["image"].dtype == torch.float32
        assert sample["image"].shape == (1, *TINY.shape)
        assert type(sample["age"]) is np.float32
    real = {sample["id"]: sample for sample in made if sample["origin"] == "real"}
    assert {id: sample["age"] for id, sample in real.items()} == {str(n): 50 + n for n in range(6)}
    named = mix(Scans(), cohort(1), ratio=0, keys={"image": "T1w", "id": "site"})
    assert {sample["id"] for sample in named} == {"here"}
    batch = next(iter(DataLoader(made, batch_size=12)))
    assert batch["age"].dtype == torch.float32
    assert sorted(batch["origin"]) == ["real"] * 6 + ["synthetic"] * 6


def test_missing_covariates_are_named(cohort):
    made = mix(Scans(), cohort(5), ratio=0, keys=KEYS | {"sex": "gender", "brain_volume": "tiv"})
    with pytest.raises(UsageError, match=r"lacks gender, tiv; .* has T1w, age_years, site"):
        made[0]
    with pytest.raises(UsageError, match="lacks image, sex, age, ventricular_volume"):
        mix(Scans(), cohort(5), ratio=0)[0]
    for nothing in (None, float("nan"), np.float32("nan"), pd.NA):
        with pytest.raises(UsageError, match="lacks age"):
            mix(Rows(1, [nothing]), cohort(5), ratio=0, keys=["age"])[0]
    with pytest.raises(UsageError, match="synthetic sample 'tiny000000' lacks site"):
        mix(Scans(), cohort(1), ratio=1, keys=["site"])[0]
    with pytest.raises(UsageError, match="real samples must be dictionaries, found list"):
        mix([[1]], cohort(1), ratio=0)[0]


def test_shapes_and_types_must_agree(cohort):
    scans = Scans()
    scans.shape = (1, 8, 8, 8)
    made = mix(scans, cohort(6, units="natural"), ratio=0.5, keys=KEYS)
    message = r"\(1, 8, 8, 8\) .* \(1, 16, 24, 16\) .*`synthbrain prepare`"
    with pytest.raises(UsageError, match=message):
        made.__getitems__(range(12))
    scans.shape = (1, *TINY.shape)
    made = mix(scans, cohort(6, units="natural"), ratio=0.5, keys=KEYS)
    made.__getitems__(range(12))
    scans.shape = (1, 8, 8, 8)
    with pytest.raises(UsageError, match=message):
        made.__getitems__(range(12))
    made = mix(cohort(6, "scans", dtype="uint8"), cohort(6), ratio=0.5)
    with pytest.raises(UsageError, match=r"torch.uint8, of synthetic .* torch.float32"):
        made.__getitems__(range(12))


def test_units_must_agree(cohort):
    with pytest.raises(UsageError, match=r"age = 5.* the synthetic ones' are normalised"):
        mix(Scans(), cohort(6), ratio=0, keys=KEYS)[0]
    natural = cohort(6, units="natural")
    with pytest.raises(UsageError, match=r"sex = .* the synthetic ones' are natural"):
        mix(cohort(6, "scans"), natural, ratio=0)[0]
    with pytest.raises(UsageError, match=r"sex = (fe)?male and the synthetic ones' are normalised"):
        mix(natural, cohort(6), ratio=0)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.5}, "0 to 1; found 1.5"),
        ({"ratio": float("nan")}, "0 to 1; found nan"),
        ({"ratio": 0.5, "length": 0}, "length must be a whole number"),
        ({"ratio": 0.5, "length": 2.5}, "length must be a whole number"),
        ({"ratio": 0.5, "seed": -1}, "seed must lie"),
        (
            {"ratio": 0.5, "match": "hist", "keys": ["image"]},
            "match must be 'histogram' or a callable",
        ),
        ({"ratio": 0.5, "match": "histogram"}, "'image', which is not in keys"),
        ({"ratio": 0.5, "keys": "age"}, "keys must be a list or mapping"),
    ],
)
def test_arguments_that_make_no_sense(options, message):
    with pytest.raises(UsageError, match=message):
        mix(Rows(3), Rows(3), **({"keys": ["age"]} | options))


def test_sides_without_rows_are_refused_where_they_are_needed():
    assert len(mix(Rows(0), Rows(3), ratio=1, keys=["age"])) == 3
    assert len(mix(Rows(3), Rows(0), ratio=0, keys=["age"])) == 3
    with pytest.raises(UsageError, match="needs 3 synthetic samples"):
        mix(Rows(3), Rows(0), ratio=0.5, keys=["age"])
    with pytest.raises(UsageError, match="an epoch of no samples"):
        mix(Rows(0), Rows(3), ratio=0.5, keys=["age"])
    wrong = Rows(3)
    wrong.table = wrong.table[:2]
    wrong.__class__ = type("Wrong", (Rows,), {"__len__": lambda self: 3})
    with pytest.raises(UsageError, match="a table of 2 rows for 3 samples"):
        mix(wrong, Rows(3), ratio=0.5, keys=["age"])
    with pytest.raises(UsageError, match="epoch must lie"):
        mix(Rows(3), Rows(3), ratio=0.5, keys=["age"]).set_epoch(-1)


# Making, workers, epochs


def test_missing_rows_of_a_batch_are_made_in_one_call(cohort, recorder):
    generator = recorder(batch_size=32)
    made = mix(cohort(6, "scans"), cohort(30, generator=generator), ratio=0.75)
    made.__getitems__(range(24))
    table = made.table(0)
    assert [sorted(batch) for batch in generator.batches] == [
        sorted(table["id"][table["origin"] == "synthetic"])
    ]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_give_the_same_batches_in_every_epoch(mixed, cohort, start):
    made = mixed(match="histogram", balance="age")
    options = {"num_workers": 2, "persistent_workers": True, "timeout": 60}
    loader = DataLoader(made, batch_size=5, multiprocessing_context=start, **options)
    epochs = []
    for epoch in (0, 1, 0):
        made.set_epoch(epoch)
        found = [{**b, "image": b["image"].clone(), "age": b["age"].clone()} for b in loader]
        ids = [id for batch in found for id in batch["id"]]
        assert ids == made.table(epoch)["id"].tolist()
        plain = list(DataLoader(made, batch_size=5))
        assert all(
            torch.equal(one["image"], other["image"])
            for one, other in zip(found, plain, strict=True)
        )
        epochs.append(ids)
    assert epochs[0] == epochs[2] != epochs[1]


@pytest.mark.timeout(120)
def test_set_epoch_reaches_both_sides_in_running_workers(cohort):
    def places(options):
        real = cohort(6, "scans", patch_size=4)
        synthetic = cohort(6, patch_size=4)
        made = mix(
            ConcatDataset([Subset(real, range(3)), Subset(real, range(3, 6))]),
            Subset(synthetic, range(6)),
            ratio=0.5,
            keys=["patch_start"],
        )
        loader = DataLoader(made, batch_size=12, **options)
        found = []
        for epoch in (0, 1):
            made.set_epoch(epoch)
            (batch,) = loader
            starts = zip(batch["id"], batch["patch_start"].tolist(), strict=True)
            found.append(dict(starts))
        return found

    first, second = places({"num_workers": 1, "persistent_workers": True, "timeout": 60})
    assert sum(first[id] == second[id] for id in first) < 3
    assert [first, second] == places({})


def test_a_pickled_mix_is_the_same_and_has_its_own_epoch(mixed):
    made = mixed(balance="brain_volume", match="histogram")
    made.set_epoch(4)
    twin = pickle.loads(pickle.dumps(made))
    assert_same([twin[i] for i in range(5)], [made[i] for i in range(5)])
    before = made[0]
    twin.set_epoch(5)
    assert_same([made[0]], [before])
    assert twin.table(4).equals(made.table(4))


def test_distributed_ranks_share_an_epoch(mixed):
    from torch.utils.data import DistributedSampler

    made = mixed()
    ids = []
    for rank in range(2):
        sampler = DistributedSampler(made, num_replicas=2, rank=rank)
        ids += [id for batch in DataLoader(made, 4, sampler=sampler) for id in batch["id"]]
    assert sorted(ids) == sorted(made.table(0)["id"])


def test_bytes_cross_from_workers_where_both_sides_hold_them(cohort):
    made = mix(cohort(4, "scans", dtype="uint8"), cohort(9, dtype="uint8"), ratio=0.5)
    floats = mix(cohort(4, "scans"), cohort(9), ratio=0.5)
    batch, plain = (next(iter(DataLoader(one, batch_size=8))) for one in (made, floats))
    assert batch["image"].dtype == torch.uint8
    assert torch.equal(as_float(batch["image"]), plain["image"])


# Transforms


def test_monai_dictionary_transforms_and_meta_tensors(cohort):
    from monai.data import MetaTensor
    from monai.transforms import RandFlipd

    flip = RandFlipd("image", prob=1.0, spatial_axis=0)
    sides = [cohort(n, name, meta_tensor=True) for n, name in ((3, "scans"), (9, "tiny"))]
    plain = mix(*sides, ratio=0.5, match="histogram")
    made = mix(*sides, ratio=0.5, match="histogram", transform=flip)
    for one, other in zip(made, plain, strict=True):
        assert isinstance(one["image"], MetaTensor)
        assert torch.equal(other["image"].affine, torch.tensor(TINY.affine, dtype=torch.float64))
        assert torch.equal(one["image"].as_tensor(), other["image"].as_tensor().flip(1))
    batch = next(iter(DataLoader(made, batch_size=6)))
    assert batch["image"].shape == (6, 1, *TINY.shape)


def test_samples_as_torchio_subjects(cohort, mixed):
    tio = pytest.importorskip("torchio")
    sample = cohort(1, meta_tensor=True)[0]
    subject = as_subject(sample)
    assert np.allclose(subject["image"].affine, TINY.affine)
    assert torch.equal(subject["image"].data, sample["image"].as_tensor())
    assert subject["id"] == "tiny000000"

    def flip(sample):
        return tio.RandomFlip(axes=(0,), flip_probability=1)(as_subject(sample))

    flipped, plain = mixed(transform=flip)[0], mixed()[0]
    assert torch.equal(flipped["image"].data, plain["image"].flip(1))
    assert flipped["origin"] == plain["origin"]


# Intensities


def head(seed, *, gain=1.0, gamma=1.0):
    """Black around a box of smooth tissue and noise."""
    draw = np.random.default_rng(seed)
    image = np.zeros((1, 24, 24, 24))
    image[:, 4:20, 4:20, 4:20] = 0.3 + 0.6 * draw.random((1, 16, 16, 16)) ** 1.5
    return torch.from_numpy(gain * image**gamma).float()


def test_matching_undoes_a_change_of_contrast():
    reference = Landmarks.of([head(seed) for seed in range(5)])
    assert np.all(np.diff(reference.values) > 0)
    for seed in range(10, 13):
        plain, changed = head(seed), head(seed, gain=0.7, gamma=1.6)
        matched = reference(changed)
        before, after = ((image - plain).abs().mean() for image in (changed, matched))
        assert after < 0.1 * before
        assert matched.shape == changed.shape
        assert matched.dtype == changed.dtype
        assert torch.equal(matched == 0, changed == 0)


def test_landmarks_agree_with_a_plain_reading_of_the_paper():
    images = [head(seed, gain=0.5 + 0.1 * seed) for seed in range(4)]
    deciles = [1, *range(10, 100, 10), 99]
    each = []
    for image in images:
        values = image.numpy().astype(np.float64).ravel()
        each.append(np.percentile(values[values > values.mean()], deciles))
    low, high = np.mean([own[0] for own in each]), np.mean([own[-1] for own in each])
    scaled = [low + (own - own[0]) * (high - low) / (own[-1] - own[0]) for own in each]
    assert np.allclose(Landmarks.of(images).values[1:-1], np.mean(scaled, axis=0), atol=1e-6)


@given(st.integers(0, 2**32 - 1), st.floats(0.2, 4), st.floats(0.3, 3))
def test_matching_keeps_order_and_range(seed, gain, gamma):
    reference = Landmarks.of([head(0), head(1)])
    image = head(seed, gain=gain, gamma=gamma)
    matched = reference(image)
    order = image.flatten().argsort()
    assert (matched.flatten()[order].diff() >= 0).all()
    assert float(matched.min()) >= reference.values[0]
    assert float(matched.max()) <= reference.values[-1] + 1e-6


def test_images_without_contrast_are_matched_too():
    reference = Landmarks.of([head(0)])
    assert not reference(torch.zeros(1, 4, 4, 4)).any()
    two = reference(torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert two.tolist() == pytest.approx([0, 0, *[reference.values[1:].mean()] * 2])
    halves = reference(head(3).half())
    assert halves.dtype == torch.float16
    with pytest.raises(UsageError, match=r"found torch.uint8; use dtype='float32'"):
        reference(torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(UsageError, match="at least one image"):
        Landmarks.of([])


def test_only_synthetic_images_are_matched(mixed):
    plain, made = mixed(), mixed(match="histogram")
    for one, other in zip(plain, made, strict=True):
        assert torch.equal(one["image"], other["image"]) == (one["origin"] == "real")
    assert torch.equal(made[0]["image"], mixed(match="histogram")[0]["image"])
    negative = mixed(match=torch.neg)
    for one, other in zip(plain, negative, strict=True):
        sign = -1 if one["origin"] == "synthetic" else 1
        assert torch.equal(sign * one["image"], other["image"])


def test_patches_are_not_matched(cohort):
    with pytest.raises(UsageError, match="takes whole volumes"):
        mix(cohort(3, "scans"), cohort(3, patch_size=4), ratio=0.5, match="histogram")
