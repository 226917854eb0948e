import logging
import pickle
import threading

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Subset

from synthbrain import Manifest, SynthBrainDataset, as_float
from synthbrain.errors import DamagedShardError, GeneratorError, MissingVolumeError, UsageError
from synthbrain.header import Geometry
from synthbrain.quantise import intensities
from synthbrain.sampler import epoch_order
from synthbrain.testing import TINY, TinyGenerator, tiny_manifest

STARTS = ("fork", "spawn", "forkserver")


@pytest.fixture
def manifest():
    return tiny_manifest(12)


@pytest.fixture
def dataset(manifest, tmp_path):
    """Builds a dataset of the manifest with the tiny generator."""

    def make(rows=manifest, **options):
        options = {"generator": TinyGenerator(), "store": tmp_path / "store"} | options
        return SynthBrainDataset(rows, **options)

    return make


def stored(ds, index):
    return ds.resolver.volumes([index])[0]


def same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if torch.is_tensor(value):
            assert torch.equal(value, other[key]), key
        else:
            assert np.array_equal(value, other[key]), key


# Samples


def test_a_sample_is_the_volume_and_the_covariates_of_its_row(dataset, manifest):
    ds = dataset()
    sample = ds[3]
    assert set(sample) == {
        "image", "sex", "age", "ventricular_volume", "brain_volume", "id", "made_by"
    }  # fmt: skip
    assert sample["image"].shape == (1, *TINY.shape)
    assert sample["image"].dtype == torch.float32
    assert np.array_equal(sample["image"][0].numpy(), intensities(stored(ds, 3), TINY))
    assert 0 <= float(sample["image"].min()) < float(sample["image"].max()) <= 1
    row = manifest.table.iloc[3]
    assert sample["id"] == row.name
    assert type(sample["id"]) is str
    assert sample["made_by"] == "tiny-01234567"
    for name in ("sex", "age", "ventricular_volume", "brain_volume"):
        assert sample[name] == np.float32(row[name])
        assert sample[name].dtype == np.float32


def test_natural_units_are_years_cubic_millimetres_and_words(dataset, manifest):
    row, sample = manifest.table.iloc[3], dataset(units="natural")[3]
    assert sample["age"] == pytest.approx(44 + 38 * row["age"], rel=1e-6)
    assert sample["ventricular_volume"] == pytest.approx(
        6995.68 + row["ventricular_volume"] * (171375 - 6995.68), rel=1e-6
    )
    assert sample["brain_volume"] == pytest.approx(
        1144240 + row["brain_volume"] * (1793910 - 1144240), rel=1e-6
    )
    assert sample["sex"] == ("male" if row["sex"] else "female")
    batch = next(iter(DataLoader(dataset(units="natural"), batch_size=3)))
    assert set(batch["sex"]) <= {"male", "female"}


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
def test_images_come_in_the_type_asked_for(dataset, dtype):
    ds = dataset(dtype=dtype)
    image = ds[0]["image"]
    assert image.dtype == getattr(torch, dtype)
    expected = torch.from_numpy(stored(ds, 0)).unsqueeze(0)
    assert torch.equal(image, expected if dtype == "uint8" else (expected / 255).half())
    assert torch.allclose(as_float(image).float(), expected / 255, atol=1e-3)


def test_a_manifest_of_halves(dataset, of_geometry):
    rows = of_geometry(TINY.model_copy(update={"dtype": "float16"}))
    ds = dataset(rows)
    expected = TinyGenerator().sample(rows.table)
    assert torch.equal(ds[1]["image"], expected[1].half().float())
    batch = next(iter(ds.loader(batch_size=4)))
    assert torch.equal(batch["image"], expected.half().float())
    scale = np.float32(ds.resolver.store_of(1).about(1)["scale"])
    assert np.array_equal(stored(ds, 1) * scale, ds[1]["image"][0])
    with pytest.raises(UsageError, match="not stored as bytes"):
        dataset(rows, dtype="uint8")


def test_indices_are_those_of_a_sequence(dataset):
    ds = dataset()
    same(ds[-1], ds[len(ds) - 1])
    same(ds[np.int64(3)], ds[3])
    same(ds[torch.tensor(3)], ds[3])
    for outside in (12, -13):
        with pytest.raises(IndexError, match="of a dataset with 12 rows"):
            ds[outside]
        with pytest.raises(IndexError):
            ds.__getitems__([0, outside])
    with pytest.raises(TypeError):
        ds[1.5]


def test_samples_of_a_sequence_share_no_memory(dataset):
    ds = dataset(dtype="uint8")
    for _ in range(2):  # made, then stored
        one, other = ds.__getitems__([2, 2])
        one["image"].zero_()
        assert other["image"].any()


def test_the_table_is_a_copy(dataset, manifest):
    ds = dataset()
    table = ds.table
    table["age"] = 0.0
    assert ds.table.equals(manifest.table)


def test_repr_says_what_it_is(dataset):
    assert repr(dataset()) == "<SynthBrainDataset of tiny: 12 rows, tiny-01234567>"


# Making


def test_missing_rows_of_a_batch_are_made_in_one_call(dataset, recorder):
    for options in ({}, {"patch_size": 8}):
        generator = recorder(batch_size=16)
        generator.name = f"recorder{len(options)}"
        ds = dataset(generator=generator, **options)
        ds[2]
        ds.__getitems__([0, 2, 5, 7, 5])
        assert [sorted(batch) for batch in generator.batches] == [
            ["tiny000002"],
            ["tiny000000", "tiny000005", "tiny000007"],
        ]


def test_filling_makes_what_is_missing_and_says_how_much(dataset, recorder, capfd):
    generator = recorder()
    ds = dataset(generator=generator)
    ds[4]
    assert ds.missing() == [f"tiny{i:06d}" for i in range(12) if i != 4]
    assert ds.plan().missing == 11
    assert ds.fill() == 11
    assert "filling: 11/11" in capfd.readouterr().err
    assert ds.fill(progress=False) == 0
    assert capfd.readouterr().err == ""
    assert ds.missing() == []
    assert len(generator.made) == 12


def test_without_a_generator_stored_rows_are_read_and_missing_ones_raise(dataset):
    dataset().__getitems__([0, 1])
    ds = dataset(generator=None)
    assert ds[0]["made_by"] == "tiny-01234567"
    with pytest.raises(MissingVolumeError, match="run `synthbrain fill`, or pass a generator"):
        ds[2]
    with pytest.raises(MissingVolumeError):
        ds.fill(progress=False)
    assert ds.missing() == [f"tiny{i:06d}" for i in range(2, 12)]


def test_without_a_generator_several_makers_must_be_told_apart(dataset):
    other = TinyGenerator()
    other.digest = "f" * 16
    for generator in (TinyGenerator(), other):
        dataset(generator=generator)[0]
    with pytest.raises(GeneratorError, match="volumes of 2 generators"):
        dataset(generator=None)
    assert dataset(generator=None, made_by="tiny-ffffffff")[0]["made_by"] == "tiny-ffffffff"


def test_a_selection_reads_its_parents_store(dataset, manifest, recorder, home):
    dataset().fill(progress=False)
    older = manifest.select(age_range=(0.5, 1.0))
    older.save(home / "cohorts" / "older")
    generator = recorder()
    for rows in (older, "older", manifest.select(where="age >= 0.5")):
        ds = dataset(rows, generator=generator)
        assert ds.missing() == []
        for index, id in enumerate(ds.table.index):
            whole = manifest.table.index.get_loc(id)
            assert torch.equal(ds[index]["image"], dataset()[whole]["image"])
    assert generator.batches == []


def test_what_a_selection_makes_its_parent_has(dataset, manifest):
    dataset(manifest.select(ids=["tiny000007"])).fill(progress=False)
    assert dataset().resolver.stored().nonzero()[0].tolist() == [7]


def test_a_damaged_row_heals_unless_told_not_to(dataset, caplog):
    before = dataset()[3]
    path = dataset().resolver.path(3)
    path.write_bytes(path.read_bytes()[:-5] + b"hello")
    with pytest.raises(DamagedShardError):
        dataset(heal=False)[3]
    with caplog.at_level(logging.WARNING, "synthbrain"):
        same(dataset()[3], before)
    assert "tiny000003 is damaged" in caplog.text
    assert path.with_name(path.name + ".bad").exists()


def test_the_default_store_is_in_the_packages_home(manifest, home):
    SynthBrainDataset(manifest, generator=TinyGenerator())[0]
    assert list(home.glob("store/tiny-*/tiny-01234567/volumes/block-0000/c.0.0.0.0"))


def test_a_folder_of_nifti_files_is_a_source(dataset, manifest, tmp_path):
    import nibabel

    values = np.linspace(0, 1, 16 * 24 * 16, dtype=np.float32).reshape(TINY.shape)
    image = nibabel.Nifti1Image(values, np.array(TINY.affine))
    nibabel.save(image, tmp_path / "tiny000000.nii.gz")
    from synthbrain import FolderSource

    ds = dataset(sources=[FolderSource(tmp_path, made_by="tiny-01234567")])
    assert np.abs(ds[0]["image"][0].numpy() - values).max() <= 1 / 510 + 1e-6


# Patches


def test_a_patch_is_a_slice_whose_place_is_reported(dataset):
    ds = dataset(patch_size=(8, 12, 5))
    for index in range(len(ds)):
        sample = ds[index]
        x, y, z = (int(n) for n in sample["patch_start"])
        whole = torch.from_numpy(intensities(stored(ds, index), TINY))
        assert sample["image"].shape == (1, 8, 12, 5)
        assert torch.equal(sample["image"][0], whole[x : x + 8, y : y + 12, z : z + 5])


def test_a_patch_depends_on_seed_epoch_and_row_alone(dataset, manifest):
    ds = dataset(patch_size=4)
    places = [ds[i]["patch_start"].tolist() for i in range(12)]
    assert len({tuple(place) for place in places}) > 6
    assert places == [s["patch_start"].tolist() for s in ds.__getitems__(list(range(12)))]
    assert places == [dataset(patch_size=4)[i]["patch_start"].tolist() for i in range(12)]
    assert places != [dataset(patch_size=4, seed=1)[i]["patch_start"].tolist() for i in range(12)]
    part = dataset(manifest.select(ids=["tiny000005"]), patch_size=4)
    assert part[0]["patch_start"].tolist() == places[5]
    ds.set_epoch(1)
    assert places != [ds[i]["patch_start"].tolist() for i in range(12)]
    ds.set_epoch(0)
    assert places == [ds[i]["patch_start"].tolist() for i in range(12)]


def test_patches_reach_every_corner(dataset):
    ds = dataset(patch_size=(15, 23, 15))
    starts = set()
    for epoch in range(12):
        ds.set_epoch(epoch)
        starts |= {tuple(s["patch_start"].tolist()) for s in ds.__getitems__(range(12))}
    assert starts == {(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)}
    assert dataset(patch_size=TINY.shape)[0]["patch_start"].tolist() == [0, 0, 0]


def test_a_meta_tensor_carries_the_affine_of_its_patch(dataset):
    whole = dataset(meta_tensor=True)[2]["image"]
    assert torch.equal(whole.affine, torch.tensor(TINY.affine, dtype=torch.float64))
    sample = dataset(meta_tensor=True, patch_size=4)[2]
    corner = torch.tensor([*sample["patch_start"].tolist(), 1.0], dtype=torch.float64)
    origin = torch.tensor([0.0, 0, 0, 1], dtype=torch.float64)
    assert torch.allclose(sample["image"].affine @ origin, whole.affine @ corner)
    x, y, z = (int(n) for n in sample["patch_start"])
    assert torch.equal(sample["image"][0, 0, 0, 0], whole[0, x, y, z])


# Transforms


def test_a_transform_sees_each_sample(dataset):
    ds = dataset(transform=lambda sample: sample["id"].upper())
    assert ds[1] == "TINY000001"
    assert ds.__getitems__([0, 2]) == ["TINY000000", "TINY000002"]


@pytest.mark.parametrize("meta_tensor", [False, True])
def test_monai_dictionary_transforms(dataset, meta_tensor):
    from monai.data import list_data_collate
    from monai.transforms import Compose, RandFlipd, SpatialPadd

    steps = Compose(
        [RandFlipd("image", prob=1.0, spatial_axis=0), SpatialPadd("image", (24, 24, 24))]
    )
    ds = dataset(transform=steps, meta_tensor=meta_tensor)
    sample = ds[0]
    plain = dataset()[0]["image"]
    assert sample["image"].shape == (1, 24, 24, 24)
    assert torch.equal(torch.as_tensor(sample["image"])[:, 4:20, :, 4:20], plain.flip(1))
    batch = next(iter(DataLoader(ds, batch_size=3, collate_fn=list_data_collate)))
    assert batch["image"].shape == (3, 1, 24, 24, 24)
    assert next(iter(ds.loader(batch_size=3)))["image"].shape == (3, 1, 24, 24, 24)


def test_torchio_transforms(dataset):
    tio = pytest.importorskip("torchio")
    ds = dataset(transform=tio.RandomFlip(axes=(0,), flip_probability=1, include=["image"]))
    sample = ds[0]
    assert torch.equal(sample["image"], dataset()[0]["image"].flip(1))
    assert sample["id"] == "tiny000000"


def test_meta_tensors_are_collated(dataset):
    batch = next(iter(DataLoader(dataset(meta_tensor=True), batch_size=2)))
    assert batch["image"].shape == (2, 1, *TINY.shape)


# Loaders and processes


def batches(loader):
    return [
        {key: value.clone() if torch.is_tensor(value) else value for key, value in batch.items()}
        for batch in loader
    ]


def assert_same_batches(ones, others):
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        same(one, other)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("start", STARTS)
def test_workers_give_the_same_bytes_after_the_parent_has_read(dataset, start):
    ds = dataset()
    ds.fill(progress=False)
    ds.__getitems__(list(range(12)))  # starts this process's reading threads
    plain = batches(DataLoader(ds, batch_size=4))
    options = {"batch_size": 4, "num_workers": 2, "multiprocessing_context": start, "timeout": 60}
    assert_same_batches(batches(DataLoader(ds, **options)), plain)
    if start == "fork":
        assert_same_batches(batches(ds.loader(**options)), plain)
        patches = dataset(patch_size=5)
        assert_same_batches(
            batches(DataLoader(patches, **options)), batches(DataLoader(patches, batch_size=4))
        )


@pytest.mark.timeout(120)
def test_forked_workers_make_what_is_missing(dataset):
    ds = dataset()
    ds[0]
    options = {"batch_size": 3, "num_workers": 2, "timeout": 60, "multiprocessing_context": "fork"}
    found = batches(ds.loader(**options))
    assert ds.missing() == []
    assert_same_batches(found, batches(DataLoader(ds, batch_size=3)))


@pytest.mark.timeout(120)
def test_workers_forked_while_threads_read_do_not_hang(dataset):
    ds = dataset()
    ds.fill(progress=False)
    stop = threading.Event()

    def read():
        while not stop.is_set():
            ds.__getitems__(list(range(12)))

    readers = [threading.Thread(target=read, daemon=True) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        options = {"num_workers": 2, "timeout": 60, "multiprocessing_context": "fork"}
        for _ in range(3):
            assert len(list(DataLoader(ds, batch_size=4, **options))) == 3
    finally:
        stop.set()
        for reader in readers:
            reader.join()


def test_another_process_gives_the_same_bytes(dataset, manifest, tmp_path, python):
    ds = dataset(patch_size=6)
    folder = manifest.save(tmp_path / "saved")
    ds[0]
    printed = python(
        """
        import hashlib, sys
        from synthbrain import SynthBrainDataset
        from synthbrain.testing import TinyGenerator

        ds = SynthBrainDataset(sys.argv[1], generator=TinyGenerator(), store=sys.argv[2])
        patches = SynthBrainDataset(
            sys.argv[1], generator=TinyGenerator(), store=sys.argv[3], patch_size=6
        )
        for i in range(12):
            for sample in (ds[i], patches[i]):
                print(hashlib.sha256(sample["image"].numpy().tobytes()).hexdigest())
        """,
        folder,
        tmp_path / "store",
        tmp_path / "elsewhere",
    )
    import hashlib

    here = [
        hashlib.sha256(sample["image"].contiguous().numpy().tobytes()).hexdigest()
        for i in range(12)
        for sample in (dataset()[i], ds[i])
    ]
    assert printed.split() == here


def test_the_fast_loader_equals_a_plain_one(dataset):
    for options in ({}, {"patch_size": 7}, {"units": "natural"}, {"dtype": "uint8"}):
        ds = dataset(**options)
        plain = batches(DataLoader(ds, batch_size=5))
        assert_same_batches(batches(ds.loader(batch_size=5)), plain)
        assert ds.dtype == options.get("dtype", "float32")
    assert len(dataset().loader(batch_size=5)) == 3


@pytest.mark.parametrize("options", [{}, {"dtype": "uint8"}, {"transform": dict}])
def test_the_fast_loader_moves_images_wherever_they_are_cast(dataset, options):
    batch = next(iter(dataset(**options).loader(batch_size=2, device="meta")))
    assert batch["image"].device.type == "meta"
    assert batch["age"].device.type == "cpu"


def test_the_fast_loader_passes_on_what_is_no_batch_of_images(dataset):
    ds = dataset()
    assert [len(batch) for batch in ds.loader(batch_size=5, collate_fn=list)] == [5, 5, 2]


def test_whoever_collates_gets_what_a_plain_loader_gives(dataset):
    ds = dataset()

    def pair(samples):
        return torch.stack([sample["image"] for sample in samples])

    assert next(iter(ds.loader(batch_size=2, collate_fn=list)))[0]["image"].dtype == torch.float32
    fast, plain = (
        list(of(ds, batch_size=5, collate_fn=pair)) for of in (type(ds).loader, DataLoader)
    )
    assert all(torch.equal(one, other) for one, other in zip(fast, plain, strict=True))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("copied", [False, True])
def test_set_epoch_reaches_running_workers(dataset, copied):
    ds = dataset(patch_size=4)
    if copied:
        ds = pickle.loads(pickle.dumps(ds))
    ds.fill(progress=False)
    options = {"num_workers": 2, "persistent_workers": True, "timeout": 60, "batch_size": 4}
    loader = ds.loader(multiprocessing_context="fork", **options)
    places = []
    for epoch in (0, 1, 0):
        ds.set_epoch(epoch)
        places.append(torch.cat([batch["patch_start"] for batch in loader]))
    assert not torch.equal(places[0], places[1])
    assert torch.equal(places[0], places[2])


def order_and_patches(loader):
    found = batches(loader)
    return [id for batch in found for id in batch["id"]], torch.cat(
        [batch["patch_start"] for batch in found]
    )


def test_a_loader_that_shuffles_goes_from_epoch_to_epoch(dataset, manifest):
    ds = dataset(patch_size=4, seed=8)
    loader = ds.loader(batch_size=5, shuffle=True)
    epochs = [order_and_patches(loader) for _ in range(3)]
    for epoch, (ids, starts) in enumerate(epochs):
        rows = epoch_order(12, seed=8, epoch=epoch)
        assert ids == manifest.table.index[rows].tolist()
        ds.set_epoch(epoch)
        expected = torch.stack([torch.as_tensor(ds[int(row)]["patch_start"]) for row in rows])
        assert torch.equal(starts, expected)
    for _ in range(2):
        ds.set_epoch(1)
        ids, starts = order_and_patches(loader)
        assert ids == epochs[1][0]
        assert torch.equal(starts, epochs[1][1])
    assert order_and_patches(loader)[0] == epochs[2][0]


def test_no_sampler_is_no_sampler_however_it_is_said(dataset, manifest):
    ds = dataset(seed=3)
    expected = [manifest.table.index[row] for row in epoch_order(12, 3, 0)]
    loader = ds.loader(batch_size=None, sampler=None, batch_sampler=None, shuffle=True)
    assert [sample["id"] for sample in loader] == expected


def test_without_shuffling_rows_and_patches_stay_as_they_are(dataset, manifest):
    ds = dataset(patch_size=4)
    ds.set_epoch(3)
    loader = ds.loader(batch_size=5)
    (ids, starts), again = order_and_patches(loader), order_and_patches(loader)
    assert ids == again[0] == manifest.table.index.tolist()
    assert torch.equal(starts, again[1])


def test_the_later_word_on_the_epoch_counts(dataset):
    ds = dataset(patch_size=4)
    sampler = ds.sampler()
    ds.set_epoch(5)
    sampler.set_epoch(2)
    assert list(sampler) == epoch_order(12, 0, 2).tolist()
    assert int(ds.epochs) == 2
    ds.set_epoch(7)
    sampler.load_state_dict(ds.sampler().state_dict(consumed=4) | {"epoch": 4})
    assert list(sampler) == epoch_order(12, 0, 4)[4:].tolist()
    assert int(ds.epochs) == 4
    sampler.load_state_dict(ds.sampler().state_dict(consumed=4) | {"epoch": 4})
    ds.set_epoch(4)  # the same epoch: where in it the state was still holds
    assert list(sampler) == epoch_order(12, 0, 4)[4:].tolist()


@pytest.mark.parametrize("epoch", [-1, 1.5, "2", 2**63])
def test_what_is_no_epoch_is_refused(dataset, epoch):
    ds = dataset(patch_size=4)
    with pytest.raises(UsageError, match="epoch must be a whole number from 0 to"):
        ds.set_epoch(epoch)
    assert int(ds.epochs) == 0


def test_any_epoch_of_a_sampler_has_patches(dataset):
    ds = dataset(patch_size=4)
    ds.set_epoch(2**63 - 1)
    assert len(list(ds.loader(batch_size=5, shuffle=True))) == 3
    assert int(ds.epochs) == 2**63 - 1


def test_a_pickled_dataset_is_the_same(dataset):
    ds = dataset(patch_size=4, seed=5)
    ds.set_epoch(3)
    ds.__getitems__([0, 1, 2])
    twin = pickle.loads(pickle.dumps(ds))
    for index in range(4):
        same(twin[index], ds[index])
    before = ds[0]
    twin.set_epoch(4)
    same(ds[0], before)


def test_subsets_samplers_and_batch_samplers(dataset):
    ds = dataset()
    part = Subset(ds, [7, 3, 3, 11])
    batch = next(iter(DataLoader(part, batch_size=4)))
    assert batch["id"] == ["tiny000007", "tiny000003", "tiny000003", "tiny000011"]
    order = torch.Generator().manual_seed(0)
    sampler = BatchSampler(RandomSampler(ds, generator=order), batch_size=5, drop_last=True)
    ids = [id for batch in DataLoader(ds, batch_sampler=sampler) for id in batch["id"]]
    assert len(set(ids)) == 10
    ids = [sample["id"][0] for sample in DataLoader(ds, shuffle=True)]
    assert sorted(ids) == ds.table.index.tolist()


def test_full_size_volumes_and_patches(of_geometry, tmp_path):
    rows = of_geometry(Geometry(), 2)
    generator = TinyGenerator(Geometry().shape, batch_size=2)
    ds = SynthBrainDataset(rows, generator=generator, store=tmp_path)
    whole = ds[1]["image"]
    assert whole.shape == (1, 160, 224, 160)
    patches = SynthBrainDataset(rows, generator=None, store=tmp_path, patch_size=64)
    sample = patches[1]
    x, y, z = (int(n) for n in sample["patch_start"])
    assert torch.equal(sample["image"], whole[:, x : x + 64, y : y + 64, z : z + 64])


# The shipped manifest, and large ones


def test_items_of_a_large_manifest_need_no_table(dataset, tmp_path):
    ds = dataset(tiny_manifest(100_000))
    assert len(ds) == 100_000
    last = ds[99_999]
    assert last["id"] == "tiny099999"
    object.__setattr__(ds.manifest, "table", range(100_000))
    same(ds[-1], last)
    assert dataset(tiny_manifest(100_000)).plan().missing == 99_999


def test_the_shipped_manifest_is_the_default(tmp_path):
    generator = TinyGenerator(Geometry().shape)
    ds = SynthBrainDataset(split="test", limit=3, generator=generator, store=tmp_path)
    assert ds.manifest.header.parent.name == "synthbrain-100k"
    assert len(ds) == 3
    assert set(ds.table["split"]) == {"test"}
    assert isinstance(Manifest.open("synthbrain-100k"), Manifest)


def test_every_seed_has_patches_of_its_own():
    places = {
        tuple(
            int(n)
            for sample in SynthBrainDataset(
                tiny_manifest(4), generator=TinyGenerator(), patch_size=4,
                seed=seed,
            )
            for n in sample["patch_start"]
        )
        for seed in (2**63 + 1, 2**63 + 1000, 2**64 - 1)
    }  # fmt: skip
    assert len(places) == 3


def test_a_relative_store_stays_where_it_was(recorder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ds = SynthBrainDataset(tiny_manifest(2), store="here", generator=recorder())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    ds.fill(progress=False)
    assert (tmp_path / "here").is_dir()
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "1"])
def test_what_is_no_seed_is_refused(seed):
    with pytest.raises(
        UsageError, match="seed must be a whole number from 0 to 18446744073709551615"
    ):
        SynthBrainDataset(tiny_manifest(2), generator=None, seed=seed)
