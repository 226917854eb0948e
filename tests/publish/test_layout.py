import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from generation.covariates import NAMES
from synthbrain import Manifest, SynthBrainDataset
from synthbrain.errors import DamagedShardError, MissingVolumeError, UsageError
from synthbrain.files import sha256_of
from synthbrain.header import Geometry, Header, Licence
from synthbrain.publish import tables
from synthbrain.publish.layout import build
from synthbrain.publish.tables import picture
from synthbrain.rows import digest_contents, make_table
from synthbrain.testing import TINY, TinyGenerator, tiny_manifest


def files(folder):
    return {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}


def bytes_of(folder):
    return {name: path.read_bytes() for name, path in files(folder).items()}


def with_licence(dataset, **licence):
    header = dataset.manifest.header.model_copy(update={"licence": Licence(**licence)})
    return SynthBrainDataset(
        Manifest.create(header, dataset.manifest.table), generator=TinyGenerator(),
        store=dataset.resolver.folder,
    )  # fmt: skip


def test_the_published_manifest_opens_with_all_its_digests(dataset, folder):
    published = Manifest.open(folder)
    assert published.header.rows_digest == dataset.manifest.header.rows_digest
    assert published.header.parent is None
    assert published.header.content_digest == digest_contents(published.sha256)
    for i, digest in enumerate(published.sha256):
        assert digest == sha256_of(dataset.resolver.path(i))
    assert published.header.provenance["made_by"] == "tiny-01234567"
    assert published.header.sources["packs"].url == "hf://datasets/org/tiny"
    assert published.store_key == dataset.manifest.store_key


def test_every_row_points_at_its_shard(dataset, folder):
    rows = pd.concat(pd.read_parquet(path) for path in folder.glob("data/*.parquet"))
    assert sorted(rows["id"]) == sorted(dataset.table.index)
    for row in rows.itertuples():
        index = dataset.table.index.get_loc(row.id)
        pack = (folder / row.pack).read_bytes()
        shard = pack[row.offset : row.offset + row.size]
        assert shard == dataset.resolver.path(index).read_bytes()
        assert row.age == dataset.table["age"].iloc[index]
        assert row.seed == dataset.table["seed"].iloc[index]
        assert row.age_years == pytest.approx(44 + 38 * row.age)
        assert row.sex_label == ("male" if row.sex else "female")


def test_pictures_are_the_three_middle_slices(dataset, folder):
    row = pd.read_parquet(next(folder.glob("data/train-*"))).iloc[0]
    found = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
    volume = dataset.resolver.volumes([dataset.table.index.get_loc(row["id"])])[0]
    x, y, z = TINY.shape
    assert found.shape == (max(y, z), y + x + x)
    axial = found[:y, y + x :]
    assert axial.T[:, ::-1].tolist() in [volume[:, :, k].tolist() for k in (z // 2 - 1, z // 2)]


def test_large_pictures_are_shrunk():
    geometry = Geometry()
    found = Image.open(io.BytesIO(picture(np.zeros(geometry.shape, np.uint8), geometry)))
    assert found.size == (272, 112)


def test_two_builds_have_the_same_bytes(dataset, folder, tmp_path):
    build(dataset, tmp_path / "again", voxels=True, repo_id="org/tiny", progress=False)
    assert bytes_of(folder) == bytes_of(tmp_path / "again")


def test_what_is_done_is_kept_and_the_rest_is_added(dataset, folder, monkeypatch):
    before = bytes_of(folder)
    times = {name: path.stat().st_mtime_ns for name, path in files(folder).items()}
    lost = ("manifest.json", "data/train-00000-of-00001.parquet")
    for name in lost:
        (folder / name).unlink()
    built = build(dataset, folder, voxels=True, repo_id="org/tiny", progress=False)
    assert built.written == 1
    assert bytes_of(folder) == before
    kept = set(before) - {*lost, "rows.parquet"}
    assert all(files(folder)[name].stat().st_mtime_ns == times[name] for name in kept)


def test_a_build_that_stops_is_not_taken_for_a_whole_one(dataset, folder, monkeypatch):
    before = bytes_of(folder)
    for path in folder.glob("data/*"):
        path.unlink()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tables, "picture", stop)
    with pytest.raises(KeyboardInterrupt):
        build(dataset, folder, voxels=True, repo_id="org/tiny", progress=False)
    assert not (folder / "manifest.json").exists()
    assert not [name for name in files(folder) if "partial" in name]
    monkeypatch.undo()
    build(dataset, folder, voxels=True, repo_id="org/tiny", progress=False)
    assert bytes_of(folder) == before


def test_files_are_cut_by_rows_and_stale_ones_go(dataset, folder, monkeypatch):
    kind = tables.previews(True)
    monkeypatch.setattr(
        tables, "previews", lambda c: tables.Table("data", kind.features, rows=4, group=3)
    )
    build(dataset, folder, progress=False)
    names = sorted(path.name for path in folder.glob("data/train-*"))
    assert names[0] == f"train-00000-of-{len(names):05d}.parquet"
    assert len(names) > 1
    rows = pd.concat(pd.read_parquet(path) for path in folder.glob("data/*.parquet"))
    assert len(rows) == 12
    assert not list(folder.glob("volumes/*"))


def test_missing_rows_are_an_error_or_left_out(tmp_path):
    dataset = SynthBrainDataset(
        tiny_manifest(12), generator=TinyGenerator(), store=tmp_path / "store"
    )
    with pytest.raises(MissingVolumeError, match=r"12 of 12 volumes .*synthbrain fill"):
        build(dataset, tmp_path / "set", stored_only=True, progress=False)
    for index in (9, 4):
        dataset[index]
    with pytest.raises(MissingVolumeError, match=r"10 of 12 .*'tiny000000' first.*--stored-only"):
        build(dataset, tmp_path / "set", progress=False)
    assert not (tmp_path / "set").exists()
    build(dataset, tmp_path / "set", stored_only=True, progress=False)
    published = Manifest.open(tmp_path / "set")
    assert published.table.index.tolist() == ["tiny000004", "tiny000009"]
    assert published.positions.tolist() == [4, 9]
    assert published.header.parent.name == "tiny"
    assert published.header.content_digest
    assert published.store_key == dataset.manifest.store_key


def test_a_selection_keeps_the_blocks_of_its_parent(tmp_path, monkeypatch):
    for module in ("store", "publish.pack", "publish.layout"):
        monkeypatch.setattr(f"synthbrain.{module}.BLOCK", 4)
    dataset = SynthBrainDataset(
        tiny_manifest(12), ids=["tiny000005", "tiny000011"], generator=TinyGenerator(),
        store=tmp_path / "store",
    )  # fmt: skip
    dataset.fill(progress=False)
    build(dataset, tmp_path / "set", progress=False)
    names = sorted(path.name for path in (tmp_path / "set" / "packs").iterdir())
    assert names == ["block-0001.zarr.zip", "block-0002.zarr.zip"]


def test_latents_are_published_too(with_latents, tmp_path):
    build(with_latents, tmp_path / "set", latents=True, progress=False)
    rows = pd.read_parquet(tmp_path / "set" / "latents" / "rows.parquet")
    assert rows["pack"].unique().tolist() == ["latents/block-0000.zarr.zip"]
    assert len(rows) == 4


def test_latents_that_are_not_stored_are_told(dataset, tmp_path):
    with pytest.raises(MissingVolumeError, match="12 of 12 latents are not stored"):
        build(dataset, tmp_path / "set", latents=True, progress=False)


class TestRights:
    def test_an_unknown_licence_is_refused(self, dataset, tmp_path):
        unknown = with_licence(dataset, status="unknown", note="nobody answers")
        with pytest.raises(UsageError, match=r"licence .*unknown .*nobody answers.*--rights"):
            build(unknown, tmp_path / "set", progress=False)
        assert not (tmp_path / "set").exists()

    def test_unless_rights_are_declared_which_is_published(self, dataset, tmp_path):
        unknown = with_licence(dataset, status="unknown")
        said = "I hold the rights: I made them"
        build(unknown, tmp_path / "set", rights=said, progress=False)
        assert Manifest.open(tmp_path / "set").header.provenance["rights"] == said
        assert said in (tmp_path / "set" / "README.md").read_text()

    def test_published_volumes_of_others_likewise(self, tmp_path):
        columns = {name: [0.5] for name in NAMES}
        columns |= {"split": ["hold-out"], "seed": [None], "origin": ["published"]}
        header = Header(name="pub", geometry=TINY, rows=0, licence=Licence(status="unknown"))
        manifest = Manifest.create(header, make_table(columns, ["a"]))
        dataset = SynthBrainDataset(manifest, generator=None, store=tmp_path / "store")
        dataset.resolver.published.write(0, np.zeros(TINY.shape, "uint8"))
        with pytest.raises(UsageError, match="another publisher's volumes is unknown"):
            build(dataset, tmp_path / "set", progress=False)
        build(dataset, tmp_path / "set", rights="They said yes.", progress=False)
        row = pd.read_parquet(tmp_path / "set/data/hold_out-00000-of-00001.parquet").iloc[0]
        assert pd.isna(row["seed"])
        assert row["made_by"] == "published"


class TestRefusals:
    def test_a_damaged_shard(self, dataset, tmp_path):
        path = dataset.resolver.path(3)
        data = bytearray(path.read_bytes())
        data[10] ^= 1
        path.write_bytes(data)
        with pytest.raises(DamagedShardError, match=path.name.replace(".", r"\.")):
            build(dataset, tmp_path / "set", progress=False)
        assert not (tmp_path / "set" / "manifest.json").exists()

    def test_a_folder_that_holds_another_set(self, folder, tmp_path):
        other = SynthBrainDataset(
            tiny_manifest(3, name="other"), generator=TinyGenerator(), store=tmp_path / "store"
        )
        other.fill(progress=False)
        with pytest.raises(UsageError, match=r"holds a set with manifest 'tiny', .*'other'"):
            build(other, folder, progress=False)
        assert (folder / "manifest.json").exists()

    def test_latents_alone_and_mixed_origins(self, with_latents, dataset, tmp_path):
        latents = SynthBrainDataset(
            with_latents.manifest, generator=with_latents.resolver.generator,
            representation="latent", store=tmp_path / "store",
        )  # fmt: skip
        with pytest.raises(UsageError, match="representation='image'"):
            build(latents, tmp_path / "set", progress=False)
        table = dataset.table
        table.loc[table.index[0], "origin"] = "published"
        mixed = SynthBrainDataset(
            Manifest.create(dataset.manifest.header, table), generator=None,
            made_by="x", store=tmp_path / "store",
        )  # fmt: skip
        with pytest.raises(UsageError, match="publish them apart"):
            build(mixed, tmp_path / "set", progress=False)


def test_a_folder_of_somebody_elses_is_left_alone(dataset, tmp_path):
    mine = {"data/mine.parquet": b"mine", "README.md": b"# mine", "other.txt": b"mine"}
    project = tmp_path / "project"
    (project / "data").mkdir(parents=True)
    for name, data in mine.items():
        (project / name).write_bytes(data)
    with pytest.raises(UsageError, match="would be lost; choose another"):
        build(dataset, project, progress=False)
    assert bytes_of(project) == mine
    cohort = dataset.manifest.save(tmp_path / "cohort")
    with pytest.raises(UsageError, match="would be lost; choose another"):
        build(dataset, cohort, progress=False)
    assert len(Manifest.open(cohort)) == len(dataset)
