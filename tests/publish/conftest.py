import pytest

from synthbrain import SynthBrainDataset
from synthbrain.publish.layout import build
from synthbrain.testing import TinyGenerator, TinyLatentGenerator, tiny_manifest


@pytest.fixture
def dataset(tmp_path):
    """Twelve tiny volumes, all stored."""
    dataset = SynthBrainDataset(
        tiny_manifest(12), generator=TinyGenerator(), store=tmp_path / "store"
    )
    dataset.fill(progress=False)
    return dataset


@pytest.fixture
def with_latents(tmp_path):
    """Four tiny volumes and their latents, all stored."""
    options = {"generator": TinyLatentGenerator(), "store": tmp_path / "store"}
    SynthBrainDataset(tiny_manifest(4), representation="latent", **options).fill(progress=False)
    dataset = SynthBrainDataset(tiny_manifest(4), **options)
    dataset.fill(progress=False)
    return dataset


@pytest.fixture
def folder(dataset, tmp_path):
    """A finished publishable folder of the dataset, voxels and all."""
    build(dataset, tmp_path / "set", voxels=True, repo_id="org/tiny", progress=False)
    return tmp_path / "set"
