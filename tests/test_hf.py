import sys

import numpy as np
import pandas as pd
import pytest
import torch
from local_hub import LocalHub

from generation.covariates import NAMES
from synthbrain import Manifest, SynthBrainDataset
from synthbrain.errors import DamagedShardError, SourceError, UsageError
from synthbrain.header import Geometry
from synthbrain.hf import from_hf, to_hf
from synthbrain.publish.layout import build
from synthbrain.testing import TINY, TinyGenerator, TinyLatentGenerator, tiny_manifest

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    dataset = SynthBrainDataset(tiny_manifest(20), generator=TinyGenerator(), store=store)
    dataset.fill(progress=False)
    return dataset


@pytest.fixture(scope="module")
def folder(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "set"
    build(dataset, folder, voxels=True, progress=False)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def load(folder, config="default", split="train", **options):
    return datasets.load_dataset(str(folder), config, split=split, **options)


def same(found, dataset, ids=None):
    """The samples are exactly those of the dataset."""
    truth, count = {sample["id"]: sample for sample in dataset}, 0
    for sample in found:
        expected = truth.pop(sample["id"])
        assert torch.equal(sample.pop("image"), expected.pop("image"))
        assert sample == expected
        assert all(type(sample[name]) is np.float32 for name in NAMES)
        count += 1
    return count


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("config", ["default", "volumes"])
def test_published_rows_become_the_samples_they_were(dataset, folder, config, streaming):
    total = 0
    for split in ("train", "validation", "test"):
        rows = load(folder, config, split, streaming=streaming)
        total += same(from_hf(rows, repo=folder), dataset)
    assert total == len(dataset)


def test_rows_may_be_filtered_shuffled_and_indexed(dataset, folder):
    rows = load(folder)
    old = rows.filter(lambda age: age > 0.5, input_columns="age").shuffle(seed=1)
    found = from_hf(old, repo=folder)
    assert len(found) == len(old)
    assert found[0]["id"] == old[0]["id"]
    assert same(found, dataset) == len(old)
    stream = from_hf(load(folder, streaming=True).shuffle(seed=1, buffer_size=8), repo=folder)
    stream.set_epoch(3)
    assert same(stream, dataset) == len(rows)


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
def test_types(dataset, folder, dtype):
    of_type = SynthBrainDataset(
        dataset.manifest, generator=TinyGenerator(), store=dataset.resolver.folder, dtype=dtype
    )
    for config in ("default", "volumes"):
        assert same(from_hf(load(folder, config), repo=folder, dtype=dtype), of_type)


def test_batches_of_a_loader(dataset, folder):
    found = from_hf(load(folder), repo=folder)
    loader = torch.utils.data.DataLoader(found, batch_size=4, num_workers=2)
    batches = list(loader)
    assert batches[0]["image"].shape == (4, 1, *TINY.shape)
    assert sum(len(batch["id"]) for batch in batches) == len(found)


def test_packs_are_read_over_http_by_range(dataset, folder):
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}
    with LocalHub({"datasets/org/tiny": files}).running() as hub:
        address = f"{hub.url}/datasets/org/tiny/resolve/main"
        assert same(from_hf(load(folder, split="test"), repo=address), dataset)
        asked = [span for method, path, span in hub.log if path.endswith(".zip")]
        assert asked
        assert all(span for span in asked), "a whole pack was downloaded"
        hub.fault = 403
        with pytest.raises(
            SourceError, match=r"manifest.json is closed to you .*set HF_TOKEN"
        ) as told:
            from_hf(load(folder), repo=address)
        assert "\n" not in str(told.value)


def test_other_bytes_than_the_rows_promise_are_refused(folder, tmp_path):
    rows = load(folder)
    copy = tmp_path / "set"
    (copy / "packs").mkdir(parents=True)
    data = bytearray((folder / rows[0]["pack"]).read_bytes())
    data[rows[0]["offset"] + 5] ^= 1
    (copy / rows[0]["pack"]).write_bytes(data)
    (copy / "manifest.json").write_bytes((folder / "manifest.json").read_bytes())
    found = from_hf(rows, repo=copy)
    with pytest.raises(DamagedShardError, match=r"other bytes for 'tiny.*same revision"):
        found[0]
    assert found[1]


def test_the_manifest_may_be_given(dataset, folder, tmp_path):
    (tmp_path / "packs").symlink_to(folder / "packs")
    for manifest in (folder, Manifest.open(folder)):
        rows = from_hf(load(folder), repo=f"file://{tmp_path}", manifest=manifest)
        assert same(rows, dataset)


def test_rows_that_cannot_be_samples_are_told(folder):
    with pytest.raises(UsageError, match=r"repo='ORG/NAME'"):
        from_hf(load(folder))
    with pytest.raises(UsageError, match=r"neither 'volume' nor pack, .*found id, age"):
        from_hf(load(folder).select_columns(["id", "age"]))
    with pytest.raises(UsageError, match="dtype must be one of"):
        from_hf(load(folder), repo=folder, dtype="int8")


def test_without_datasets_it_says_what_is_missing(dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="pip install datasets"):
        to_hf(dataset)


class TestToHf:
    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("image", ["uint8", "float32"])
    def test_there_and_back(self, dataset, image, streaming):
        found = to_hf(dataset, image=image, streaming=streaming)
        assert found.features["volume"] == datasets.Array3D(TINY.shape, image)
        assert same(from_hf(found), dataset) == len(dataset)

    def test_rows_say_what_voxels_mean(self, dataset):
        found = to_hf(dataset)
        row = found.with_format("numpy", dtype=np.float64)[3]
        assert np.array_equal(row["affine"], TINY.affine)
        assert row["scale"] == TINY.scale
        assert np.array_equal(row["volume"], dataset.resolver.volumes([3])[0])
        assert found[3]["seed"] == dataset.table["seed"].iloc[3]
        assert 44 <= found[3]["age_years"] <= 82
        assert found.info.license == "CC0"
        assert to_hf(dataset, image="float32")[3]["scale"] == 1.0

    def test_volumes_are_copied_once(self, dataset):
        first, again = to_hf(dataset), to_hf(dataset)
        assert first.cache_files == again.cache_files
        assert to_hf(dataset, image="float32").cache_files != first.cache_files

    def test_workers_share_a_stream(self, dataset):
        stream = from_hf(to_hf(dataset, streaming=True))
        loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2)
        assert sorted(sample["id"] for sample in loader) == sorted(dataset.table.index)

    def test_what_is_missing_is_made(self, tmp_path):
        fresh = SynthBrainDataset(tiny_manifest(3), generator=TinyGenerator(), store=tmp_path)
        assert len(to_hf(fresh)) == 3
        assert fresh.missing() == []

    def test_halves_and_latents(self, of_geometry, tmp_path):
        geometry = Geometry(shape=(16, 24, 16), chunks=(8, 12, 8), dtype="float16")
        halves = SynthBrainDataset(of_geometry(geometry), generator=TinyGenerator(), store=tmp_path)
        with pytest.raises(UsageError, match="image='float32'"):
            to_hf(halves)
        assert same(from_hf(to_hf(halves, image="float32")), halves)
        halves.fill(progress=False)
        build(halves, tmp_path / "set", voxels=True, progress=False)
        for config in ("default", "volumes"):
            split = halves.table["split"].iloc[0]
            found = from_hf(load(tmp_path / "set", config, split), repo=tmp_path / "set")
            assert same(found, halves)
        with pytest.raises(UsageError, match="not bytes"):
            from_hf(load(tmp_path / "set", split=split), repo=tmp_path / "set", dtype="uint8")[0]
        latents = SynthBrainDataset(
            tiny_manifest(3), generator=TinyLatentGenerator(), representation="latent",
            store=tmp_path,
        )  # fmt: skip
        with pytest.raises(UsageError, match="representation='image'"):
            to_hf(latents)
        with pytest.raises(UsageError, match="image must be"):
            to_hf(halves, image="int8")


def test_published_volumes_of_one_store_are_not_taken_for_anothers(tmp_path):
    tiny = tiny_manifest(3)
    table = tiny.table.assign(origin="published", seed=pd.array([pd.NA] * 3, dtype="Int64"))
    manifest = Manifest.create(tiny.header, table)
    files = []
    for value in (10, 20):
        dataset = SynthBrainDataset(manifest, generator=None, store=tmp_path / str(value))
        for row in range(3):
            dataset.resolver.published.write(row, np.full(TINY.shape, value, np.uint8))
        found = to_hf(dataset)
        assert np.unique(found[1]["volume"]).tolist() == [value]
        files.append(found.cache_files)
    assert to_hf(dataset).cache_files == files[1] != files[0]
