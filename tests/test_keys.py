import numpy as np
import pandas as pd

from synthbrain import Manifest, SynthBrainDataset
from synthbrain.header import ArchiveSource
from synthbrain.keys import volume_keys
from synthbrain.testing import TinyGenerator, tiny_manifest


def published(store, **header):
    tiny = tiny_manifest(2)
    rows = tiny.table.assign(origin="published", seed=pd.array([pd.NA] * 2, dtype="Int64"))
    manifest = Manifest.create(tiny.header.model_copy(update=header), rows)
    return SynthBrainDataset(manifest, generator=None, store=store, sources=[])


def write(dataset, row, value):
    store = dataset.resolver.published
    store.path(row).unlink(missing_ok=True)
    store.write(row, np.full(dataset.manifest.header.geometry.shape, value, np.uint8))


def test_the_same_recipe_has_one_key_in_every_cohort_and_store(tmp_path):
    many, few = tiny_manifest(6), tiny_manifest(6).select(limit=3)
    one = SynthBrainDataset(many, generator=TinyGenerator(), store=tmp_path / "a")
    other = SynthBrainDataset(few, generator=TinyGenerator(), store=tmp_path / "b")
    assert volume_keys(one, [2, 0]) == [volume_keys(other)[row] for row in (2, 0)]
    assert len(set(volume_keys(one))) == 6
    elsewhere = SynthBrainDataset(many, generator=None, made_by="other-00000000", store=tmp_path)
    assert not set(volume_keys(one)) & set(volume_keys(elsewhere))


def test_a_scan_prepared_anew_is_another_volume(tmp_path):
    dataset = published(tmp_path)
    for row in (0, 1):
        write(dataset, row, 7)
    before = volume_keys(dataset)
    write(dataset, 1, 8)
    after = volume_keys(dataset)
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_what_can_be_fetched_keeps_its_key_when_it_is(tmp_path):
    sources = {"archive": ArchiveSource(kind="archive", url="https://example.org/a.tar")}
    dataset = published(tmp_path, sources=sources)
    before = volume_keys(dataset)
    write(dataset, 0, 7)
    assert volume_keys(dataset) == before
