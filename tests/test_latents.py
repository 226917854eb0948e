"""Latents: the same store, claims and healing as volumes, and volumes decoded from them."""

import logging
import pickle
import re

import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from torch.utils.data import DataLoader

from generation.generator import Generator, LatentGenerator
from synthbrain import Manifest, SynthBrainDataset
from synthbrain.errors import (
    DamagedShardError,
    GeneratorError,
    GeometryError,
    MissingVolumeError,
    UsageError,
)
from synthbrain.header import LatentGeometry
from synthbrain.quantise import halves, intensities
from synthbrain.resolver import Resolver
from synthbrain.rows import make_table
from synthbrain.sources.base import Cost
from synthbrain.testing import TINY, TinyGenerator, TinyLatentGenerator, tiny_manifest

SHAPE = (3, 2, 3, 2)
MAKER = "tiny-latent-fedcba98"


class Recorder(TinyLatentGenerator):
    """Remembers what it was asked for: what, and how many rows or which."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.calls = []

    def sample(self, rows):
        self.calls.append(("sample", rows.index.tolist()))
        return super().decode(super().sample_latents(rows))

    def sample_latents(self, rows):
        self.calls.append(("latents", rows.index.tolist()))
        return super().sample_latents(rows)

    def decode(self, latents):
        self.calls.append(("decode", len(latents)))
        return super().decode(latents)


@pytest.fixture
def manifest():
    return tiny_manifest(10)


@pytest.fixture
def generator():
    return Recorder()


@pytest.fixture
def resolver(manifest, generator, tmp_path):
    return Resolver(manifest, tmp_path / "store", generator, representation="latent")


@pytest.fixture
def images(manifest, generator, tmp_path):
    """A resolver of volumes in the same store."""
    return Resolver(manifest, tmp_path / "store", generator)


@pytest.fixture
def dataset(manifest, tmp_path):
    """Builds a dataset of latents in the same store."""

    def make(rows=manifest, **options):
        default = {"generator": TinyLatentGenerator(), "representation": "latent"}
        return SynthBrainDataset(rows, store=tmp_path / "store", **(default | options))

    return make


def expected(manifest):
    """Every row's latent as stored."""
    return TinyLatentGenerator().sample_latents(manifest.table).half().numpy()


def fill(resolver):
    return sorted(resolver.fill(resolver.plan()))


def flip(path, position=20):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_what_makes_latents_is_told_from_what_does_not():
    assert isinstance(TinyLatentGenerator(), LatentGenerator)
    assert isinstance(TinyLatentGenerator(), Generator)
    assert not isinstance(TinyGenerator(), LatentGenerator)


# Rounding


def test_rounding_is_to_the_nearest_half():
    values = np.random.default_rng(0).normal(0, 3, 10_000).astype(np.float32)
    stored = halves(values)
    assert stored.dtype == np.float16
    assert np.abs(stored.astype(np.float32) / values - 1).max() <= 1 / 2048
    for limit in (65504.0, -65504.0):
        assert halves(np.array([limit], np.float32)) == [limit]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (np.nan, "must be finite"),
        (np.inf, "must be finite"),
        (-np.inf, "must be finite"),
        (65505.0, "±65504 to fit float16, found 65505"),
        (-1e6, "found 1e+06"),
    ],
)
def test_what_is_no_half_is_refused_and_named_and_not_kept(resolver, generator, value, says):
    def draw(rows):
        latents = TinyLatentGenerator().sample_latents(rows)
        latents[rows.index.get_loc("tiny000002"), 1, 0, 2, 1] = value
        return latents

    generator.sample_latents = draw
    with pytest.raises(GeneratorError) as refused:
        fill(resolver)
    assert f"{MAKER} made a wrong latent of tiny000002" in str(refused.value)
    assert says in str(refused.value)
    assert resolver.recipes.positions() == [0, 1]
    assert not list(resolver.folder.rglob("*.claim"))


# Store


def test_filling_stores_exactly_what_the_generator_draws(resolver, manifest, generator):
    plan = resolver.plan()
    assert plan.sample.tolist() == list(range(10))
    assert plan.bytes_to_store == 10 * 36 * 2
    assert not resolver.folder.exists()
    assert fill(resolver) == list(range(10))
    assert [kind for kind, _ in generator.calls] == ["latents"] * 3
    for index, latent in enumerate(expected(manifest)):
        found = resolver.recipes.read(index)
        assert found.dtype == np.float16
        assert np.array_equal(found, latent)
    assert fill(resolver) == []
    assert len(generator.calls) == 3
    assert not list(resolver.folder.rglob("*.claim"))


def test_latents_lie_beside_volumes(resolver, images, manifest):
    fill(resolver)
    fill(images)
    maker = resolver.folder / manifest.store_key / MAKER
    assert {path.name for path in maker.iterdir()} == {"latents", "volumes"}
    assert resolver.path(7) == maker / "latents" / "block-0000" / "c.7.0.0.0.0"
    assert images.path(7) == maker / "volumes" / "block-0000" / "c.7.0.0.0"
    assert resolver.stored().all()
    assert images.stored().all()


def test_zarr_reads_them(resolver, manifest):
    fill(resolver)
    block = zarr.open_array(resolver.path(0).parent, mode="r")
    assert block.shape == (1000, *SHAPE)
    assert block.chunks == (1, *SHAPE)
    assert block.metadata.dimension_names == ("volume", "channel", "x", "y", "z")
    assert block.attrs["representation"] == "latent"
    assert block.attrs["made_by"] == MAKER
    assert np.array_equal(block[:10], expected(manifest))


def test_what_zarr_writes_is_served(resolver, manifest, generator):
    resolver.volumes([0])
    block = zarr.open_array(resolver.path(0).parent, mode="r+")
    foreign = np.arange(36, dtype=np.float16).reshape(SHAPE)
    block[4] = foreign
    assert np.array_equal(resolver.volumes([4])[0], foreign)
    assert len(generator.calls) == 1


def test_latents_of_another_shape_are_refused(resolver, manifest):
    fill(resolver)
    other = TinyLatentGenerator()
    other.latent_shape = (4, 2, 3, 2)
    reader = Resolver(manifest, resolver.folder, other, representation="latent")
    with pytest.raises(GeometryError, match="use another store folder"):
        reader.volumes([0])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x[:, :2], "(4, 2, 2, 3, 2) for 4 rows, expected (4, 3, 2, 3, 2)"),
        (lambda x: x[:-1], "(3, 3, 2, 3, 2) for 4 rows"),
        (lambda x: x.flatten(1), "(4, 36) for 4 rows"),
    ],
)
def test_latents_that_are_not_of_the_promised_shape_are_refused(resolver, generator, change, says):
    generator.sample_latents = lambda rows: change(TinyLatentGenerator().sample_latents(rows))
    with pytest.raises(GeneratorError, match=re.escape(says)):
        fill(resolver)


def test_damage_is_healed_and_kept(resolver, manifest, generator, caplog):
    fill(resolver)
    generator.calls.clear()
    flip(resolver.path(3))
    resolver.path(5).write_bytes(b"")
    with caplog.at_level(logging.WARNING, "synthbrain"):
        found = resolver.volumes([2, 3, 5])
    assert all(
        np.array_equal(v, expected(manifest)[i]) for i, v in zip([2, 3, 5], found, strict=True)
    )
    assert generator.calls == [("latents", ["tiny000003", "tiny000005"])]
    assert resolver.path(3).with_name("c.3.0.0.0.0.bad").exists()
    assert "latent tiny000003 is damaged" in caplog.text
    assert all(damage is None for _, damage in resolver.recipes.verify())


def test_without_healing_damage_raises(manifest, tmp_path, generator):
    options = {"heal": False, "representation": "latent"}
    resolver = Resolver(manifest, tmp_path, generator, **options)
    fill(resolver)
    flip(resolver.path(3))
    with pytest.raises(DamagedShardError, match=str(resolver.path(3))):
        resolver.volumes([3])
    with pytest.raises(DamagedShardError, match=str(resolver.path(3))):
        Resolver(manifest, tmp_path, generator, heal=False).volumes([3])


KILL = """
    import os, random, signal, sys, time
    from pathlib import Path
    import numpy as np, torch
    from synthbrain import Manifest
    from synthbrain.resolver import Resolver
    from synthbrain.testing import TinyLatentGenerator

    torch.set_num_threads(1)  # so that forked children may use torch
    manifest, folder = Manifest.open(sys.argv[1]), Path(sys.argv[2])
    drawn = TinyLatentGenerator().sample_latents(manifest.table)
    expected = drawn.half().numpy()

    class Slow(TinyLatentGenerator):
        def sample_latents(self, rows):
            time.sleep(0.001 * len(rows))
            return drawn[[manifest.table.index.get_loc(id) for id in rows.index]]

    def start(store):
        child = os.fork()
        if child == 0:
            resolver = Resolver(manifest, store, Slow(), representation="latent")
            for index in resolver.fill(resolver.plan()):
                pass
            os._exit(0)
        return child

    def check(store):
        reader = Resolver(manifest, store, Slow(), representation="latent")
        assert [d for _, d in reader.recipes.verify() if d is not None] == []
        stored = reader.stored()
        for index in np.flatnonzero(stored):
            assert np.array_equal(reader.recipes.read(index), expected[index]), index
        return int(stored.sum())

    random.seed(0)
    partial, begun = 0, time.monotonic()
    assert os.waitpid(start(folder / "whole"), 0)[1] == 0
    whole = time.monotonic() - begun
    for number in range(12):
        store = folder / str(number)
        child = start(store)
        time.sleep(random.uniform(0, whole))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        partial += 0 < check(store) < len(manifest)
        children = [start(store), start(store)]
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
        assert check(store) == len(manifest)
    print(partial)
"""


def test_a_fill_killed_at_any_moment_leaves_whole_latents_and_blocks_nothing(tmp_path, python):
    saved = tiny_manifest(40).save(tmp_path / "many")
    assert int(python(KILL, saved, tmp_path)) >= 2, "the kills landed before or after the work"


# Without a generator, published rows, and sources


def test_stored_latents_are_read_without_a_generator(resolver, manifest):
    resolver.volumes([0, 4])
    reader = Resolver(manifest, resolver.folder, representation="latent")
    assert reader.made_by == MAKER
    assert reader.geometry == LatentGeometry(SHAPE)
    assert np.array_equal(reader.volumes([4])[0], expected(manifest)[4])
    with pytest.raises(MissingVolumeError, match=r"1 of the latents asked for.*'tiny000001'"):
        reader.volumes([1])


def test_an_empty_store_without_a_generator_has_no_latents(manifest, tmp_path):
    reader = Resolver(manifest, tmp_path, representation="latent")
    assert reader.plan().unavailable.tolist() == list(range(10))
    with pytest.raises(MissingVolumeError, match="generator=None never samples"):
        reader.volumes([0])


def test_makers_are_told_apart_by_their_latents(resolver, manifest):
    resolver.volumes([0])
    Resolver(manifest, resolver.folder, TinyGenerator()).volumes([0])
    assert Resolver(manifest, resolver.folder, representation="latent").made_by == MAKER
    assert Resolver(manifest, resolver.folder).made_by == "tiny-01234567"
    other = TinyLatentGenerator()
    other.digest = "f" * 16
    Resolver(manifest, resolver.folder, other, representation="latent").volumes([0])
    with pytest.raises(GeneratorError, match="holds latents of 2 generators"):
        Resolver(manifest, resolver.folder, representation="latent")


class Shelf:
    name = "shelf"

    def __init__(self, made_by):
        self.made_by = made_by

    def holds(self, ids):
        raise AssertionError("a source was asked for latents")

    def cost(self, ids):
        return Cost(bytes=1, seconds=1.0)

    def fetch(self, ids, geometry):
        raise AssertionError("a source was asked for latents")


def test_sources_are_never_asked_for_latents(manifest, tmp_path, generator):
    sources = [Shelf(MAKER)]
    resolver = Resolver(manifest, tmp_path, generator, sources=sources, representation="latent")
    assert fill(resolver) == list(range(10))


def test_published_rows_have_no_latents(tmp_path, generator):
    tiny = tiny_manifest(4)
    columns = {name: tiny.table[name].to_numpy() for name in tiny.table.columns}
    columns["origin"] = np.array(["published", "recipe"] * 2, dtype=object)
    columns["seed"] = pd.array([pd.NA, 1] * 2, dtype="Int64")
    rows = Manifest.create(tiny.header, make_table(columns, tiny.table.index))
    sources = [Shelf("published")]
    resolver = Resolver(rows, tmp_path, generator, sources=sources, representation="latent")
    plan = resolver.plan()
    assert (plan.sample.tolist(), plan.unavailable.tolist()) == ([1, 3], [0, 2])
    with pytest.raises(MissingVolumeError, match=r"no latents; ask for representation='image'"):
        resolver.volumes([0])
    assert len(resolver.volumes([1, 3])) == 2


# Volumes from latents


def test_a_volume_is_decoded_from_its_stored_latent(resolver, images, manifest, generator):
    resolver.volumes([1, 2])
    generator.calls.clear()
    assert fill(images) == list(range(10))
    decoded = sum(count for kind, count in generator.calls if kind == "decode")
    sampled = [id for kind, ids in generator.calls if kind == "sample" for id in ids]
    assert decoded == 2
    assert sampled == [f"tiny{i:06d}" for i in (0, 3, 4, 5, 6, 7, 8, 9)]
    direct = TinyLatentGenerator().sample(manifest.table)[:, 0].numpy()
    for index in range(10):
        error = np.abs(intensities(images.recipes.read(index), TINY) - direct[index])
        assert error.max() <= 1 / 510 + 5e-4
    assert images.maker_of(1) == MAKER


def test_a_store_of_latents_alone_gives_every_volume_without_sampling(resolver, images, generator):
    fill(resolver)
    generator.calls.clear()
    images.volumes(range(10))
    images.volumes(range(10))
    assert generator.calls == [("decode", 4), ("decode", 4), ("decode", 2)]
    assert images.stored().all()


def test_a_volume_whose_latent_is_damaged_is_sampled(resolver, images, generator, caplog):
    fill(resolver)
    flip(resolver.path(3))
    generator.calls.clear()
    images.volumes([2, 3])
    assert generator.calls == [("decode", 1), ("sample", ["tiny000003"])]
    assert "latent tiny000003 is damaged" in caplog.text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x[:, 0], "(2, 16, 24, 16) for 2 rows, expected (2, 1, 16, 24, 16)"),
        (lambda x: x * float("nan"), "wrong volume of tiny000000: intensities must be finite"),
        (lambda x: x + 1, "must lie in [0, 1]"),
    ],
)
def test_a_wrongly_decoded_volume_is_refused_and_not_kept(
    resolver, images, generator, change, says
):
    resolver.volumes([0, 1])
    generator.decode = lambda latents: change(TinyLatentGenerator().decode(latents))
    with pytest.raises(GeneratorError, match=re.escape(says)):
        images.volumes([0, 1])
    assert images.recipes.positions() == []


# Dataset


def test_a_sample_holds_the_latent_in_place_of_the_image(dataset, manifest):
    ds = dataset()
    sample = ds[3]
    assert set(sample) == {
        "latent", "sex", "age", "ventricular_volume", "brain_volume", "id", "made_by"
    }  # fmt: skip
    assert sample["latent"].shape == SHAPE
    assert sample["latent"].dtype == torch.float32
    assert np.array_equal(sample["latent"].numpy(), expected(manifest)[3])
    assert sample["made_by"] == MAKER
    half = dataset(dtype="float16")[3]["latent"]
    assert half.dtype == torch.float16
    assert torch.equal(half.float(), sample["latent"])
    assert ds.representation == "latent"
    assert repr(ds) == f"<SynthBrainDataset of tiny: 10 rows, latents, {MAKER}>"


def test_filling_and_what_is_missing_are_about_latents(dataset, manifest, tmp_path):
    ds = dataset(generator=Recorder())
    ds[4]
    assert len(ds.missing()) == 9
    assert ds.fill(progress=False) == 9
    assert ds.missing() == []
    assert len(dataset(representation="image").missing()) == 10
    reader = dataset(generator=None)
    assert np.array_equal(reader[7]["latent"].numpy(), expected(manifest)[7])
    kinds = {kind for kind, _ in ds.resolver.generator.calls}
    assert kinds == {"latents"}


def test_decoding_a_batch_gives_its_images(dataset):
    ds, images = dataset(), dataset(representation="image")
    for batch, whole in zip(ds.loader(batch_size=5), images.loader(batch_size=5), strict=True):
        volumes = ds.decode(batch["latent"])
        assert volumes.shape == (5, 1, *TINY.shape)
        assert float((volumes - whole["image"]).abs().max()) <= 1 / 510 + 1e-6
        assert torch.equal(ds.decode(batch["latent"].half()), volumes)
        assert torch.equal(images.decode(batch["latent"]), volumes)


def test_decoded_volumes_can_be_trained_on(dataset):
    generator = TinyLatentGenerator()
    generator.decode = torch.inference_mode()(generator.decode)
    ds = dataset(generator=generator)
    network = torch.nn.Conv3d(1, 1, 3)
    network(ds.decode(ds[0]["latent"][None])).mean().backward()
    assert network.weight.grad.any()


def test_decoding_takes_latents_of_the_right_shape_and_a_generator(dataset):
    ds = dataset()
    sample = ds[0]["latent"]
    with pytest.raises(UsageError, match=re.escape("(n, 3, 2, 3, 2), found (3, 2, 3, 2)")):
        ds.decode(sample)
    with pytest.raises(GeneratorError, match=r"dataset's is none; pass generator="):
        dataset(generator=None).decode(sample[None])
    with pytest.raises(GeneratorError, match="dataset's is 'tiny'"):
        dataset(generator=TinyGenerator(), representation="image").decode(sample[None])


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"dtype": "uint8"}, UsageError, "'float32' or 'float16' for latents, found 'uint8'"),
        ({"patch_size": 8}, UsageError, "patch_size must be None for latents, found 8"),
        ({"meta_tensor": True}, UsageError, "meta_tensor must be False for latents"),
        ({"generator": TinyGenerator()}, GeneratorError, "'tiny' makes volumes without latents"),
        ({"representation": "latents"}, UsageError, "must be 'image', 'latent'; found 'latents'"),
    ],
)
def test_what_latents_do_not_have_is_refused(dataset, options, kind, says):
    with pytest.raises(kind, match=re.escape(says)) as refused:
        dataset(**options)
    assert "\n" not in str(refused.value)


def test_a_resolver_refuses_what_it_does_not_know(manifest, tmp_path):
    with pytest.raises(UsageError, match="must be 'image', 'latent'; found 'mesh'"):
        Resolver(manifest, tmp_path, representation="mesh")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_make_and_serve_latents(dataset, manifest, start):
    ds = pickle.loads(pickle.dumps(dataset()))
    options = {"batch_size": 4, "num_workers": 2, "multiprocessing_context": start, "timeout": 60}
    latents = torch.cat([batch["latent"].clone() for batch in ds.loader(**options)])
    assert np.array_equal(latents.numpy(), expected(manifest))
    assert latents.dtype == torch.float32
    assert ds.missing() == []
    if start == "fork":
        plain = torch.cat([batch["latent"].clone() for batch in DataLoader(ds, **options)])
        assert torch.equal(plain, latents)


@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}, {"transform": dict}])
def test_the_loader_moves_latents_and_keeps_their_type(dataset, options):
    ds = dataset(**options)
    (batch, *_) = ds.loader(batch_size=5)
    (plain, *_) = DataLoader(ds, batch_size=5)
    assert batch["latent"].dtype == plain["latent"].dtype == getattr(torch, ds.dtype)
    assert torch.equal(batch["latent"], plain["latent"])
    (moved, *_) = ds.loader(batch_size=5, device="meta")
    assert moved["latent"].device.type == "meta"
    assert moved["latent"].dtype == plain["latent"].dtype
    assert moved["age"].device.type == "cpu"


def test_latents_of_the_published_size(of_geometry, tmp_path):
    from synthbrain.header import Geometry

    rows, generator = of_geometry(Geometry(), 2), TinyLatentGenerator(Geometry().shape)
    ds = SynthBrainDataset(rows, generator=generator, representation="latent", store=tmp_path)
    assert ds[1]["latent"].shape == LatentGeometry().shape == (3, 20, 28, 20)
    assert ds.plan().bytes_to_store == 67_200
    assert 60_000 < ds.resolver.path(1).stat().st_size < 68_000
    assert ds.decode(ds[1]["latent"][None]).shape == (1, 1, 160, 224, 160)
