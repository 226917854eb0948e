import importlib.util
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from generation import atlas
from generation.atlas import HEAD_ORIGIN, HEAD_SHAPE, ORIGIN, Atlas, digest, load_atlas

HALF = ("tissue", "pial", "ventricle", "skull", "head", "growth")
TINY = {name: np.arange(6, dtype=np.float16).reshape(1, 2, 3) for name in HALF} | {
    "brain_origin": np.array([1.0, 2.0, 3.0])
}
NAMES = {field.name for field in fields(Atlas)}


@pytest.fixture
def derived(monkeypatch):
    """Derives small arrays instead, at once; a list that grows whenever it does."""
    calls = []

    def derive():
        calls.append(None)
        return {name: array.copy() for name, array in TINY.items()}

    monkeypatch.setattr(atlas, "_derive", derive)
    return calls


@pytest.fixture
def kept(derived, tmp_path):
    """The file of a small atlas that was derived once."""
    load_atlas(tmp_path / "cache")
    derived.clear()
    (path,) = (tmp_path / "cache").iterdir()
    return path


def is_tiny(found):
    return all(np.array_equal(getattr(found, name), array) for name, array in TINY.items())


class Bomb:
    """Leaves a file where it was unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_the_atlas_is_derived_once_and_kept(derived, tmp_path):
    first, second = load_atlas(tmp_path / "a" / "cache"), load_atlas(tmp_path / "a" / "cache")
    assert len(derived) == 1
    assert is_tiny(first)
    assert is_tiny(second)
    (path,) = (tmp_path / "a" / "cache").iterdir()
    assert path.name == f"atlas-{digest()[:16]}.npz"


def test_fields_are_float32_whatever_they_were_kept_as(kept):
    found = load_atlas(kept.parent)
    assert {getattr(found, name).dtype for name in HALF} == {np.dtype(np.float32)}
    assert found.brain_origin.dtype == np.float64


def test_without_a_cache_nothing_is_written(derived, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_tiny(load_atlas())
    assert is_tiny(load_atlas())
    assert len(derived) == 2
    assert list(tmp_path.iterdir()) == []


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def empty(path):
    path.write_bytes(b"")


def garble(path):
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def mix(path):
    with path.open("wb") as file:
        np.savez(file, tissue=np.zeros(3), other=np.ones(3))


def flip(path, offset, bit):
    """Flip a bit of the archive's first directory entry."""
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + offset] ^= 1 << bit
    path.write_bytes(content)


def look_encrypted(path):
    flip(path, 8, 0)


def look_like_a_later_format(path):
    flip(path, 6, 6)


def make_a_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage", [cut, empty, garble, mix, look_encrypted, look_like_a_later_format]
)
def test_a_damaged_file_is_derived_again_and_replaced(kept, derived, damage):
    damage(kept)
    assert is_tiny(load_atlas(kept.parent))
    assert is_tiny(load_atlas(kept.parent))
    assert len(derived) == 1
    assert list(kept.parent.iterdir()) == [kept]


def test_what_cannot_be_replaced_is_let_be(kept, derived):
    make_a_folder(kept)
    assert is_tiny(load_atlas(kept.parent))
    assert len(derived) == 1
    assert list(kept.parent.iterdir()) == [kept]


@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_never_gives_other_fields(tmp_path_factory, position, bit):
    folder = tmp_path_factory.mktemp("flip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atlas, "_derive", lambda: TINY)
        load_atlas(folder)
        (path,) = folder.iterdir()
        content = bytearray(path.read_bytes())
        content[int(position * len(content))] ^= 1 << bit
        path.write_bytes(content)
        assert is_tiny(load_atlas(folder))


@pytest.mark.parametrize("wrapped", [True, False], ids=["in an archive", "bare"])
def test_pickles_are_never_opened(kept, derived, tmp_path, wrapped):
    bomb = Bomb(tmp_path / "exploded")
    if wrapped:
        with kept.open("wb") as file:
            np.savez(file, **{name: np.array([bomb], dtype=object) for name in NAMES})
    else:
        kept.write_bytes(pickle.dumps(bomb))
    assert is_tiny(load_atlas(kept.parent))
    assert len(derived) == 1
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(bomb)).close()
    assert (tmp_path / "exploded").exists(), "the bomb is a dud, and the test no test"


def test_a_cache_that_cannot_be_a_folder_costs_time_only(derived, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("mine")
    assert is_tiny(load_atlas(blocked / "cache"))
    assert is_tiny(load_atlas(blocked))
    assert len(derived) == 2
    assert blocked.read_text() == "mine"


def test_a_full_disk_costs_time_only(derived, small_disk, monkeypatch):
    folder, _ = small_disk("64k")
    monkeypatch.setitem(TINY, "head", np.zeros((1, 300, 300), np.float16))
    assert is_tiny(load_atlas(folder / "cache"))
    assert list((folder / "cache").iterdir()) == []


def test_a_read_only_disk_costs_time_only(derived, small_disk):
    folder, remount = small_disk("1m")
    (folder / "cache").mkdir()
    remount("ro")
    assert is_tiny(load_atlas(folder / "cache"))
    assert is_tiny(load_atlas(folder / "other"))
    assert list(folder.rglob("*")) == [folder / "cache"]


def test_processes_at_once_do_not_disturb_each_other(python, tmp_path):
    script = """
        import sys, time
        from pathlib import Path
        import numpy as np
        from generation import atlas

        folder, own = Path(sys.argv[1]), Path(sys.argv[2])

        def derive():  # nobody is done before everybody has begun
            own.touch()
            while len(list(own.parent.iterdir())) < 3:
                time.sleep(0.001)
            large = np.arange(300_000, dtype=np.float32)
            names = ("tissue", "pial", "ventricle", "skull", "head", "growth", "brain_origin")
            return {name: large for name in names}

        atlas._derive = derive
        print(atlas.load_atlas(folder).head.sum(dtype=float))
        print(atlas.load_atlas(folder).growth.sum(dtype=float))
    """
    (tmp_path / "here").mkdir()
    with ThreadPoolExecutor() as pool:
        found = list(
            pool.map(
                lambda number: python(script, tmp_path / "cache", tmp_path / "here" / str(number)),
                range(3),
            )
        )
    total = float(np.arange(300_000).sum())
    assert found == [f"{total}\n{total}\n"] * 3
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".npz"]


def test_another_version_has_another_digest(monkeypatch):
    before = digest()
    monkeypatch.setattr(atlas, "VERSION", atlas.VERSION + 1)
    assert digest() != before


def test_another_template_has_another_digest(monkeypatch, tmp_path):
    monkeypatch.setattr(atlas, "template_folder", lambda: tmp_path)
    paths = [tmp_path / name for name in atlas.TEMPLATE_FILES.values()]
    for path in paths:
        path.write_bytes(b"one")
    found = {digest()}
    for path in paths:
        path.write_bytes(b"another")
        found.add(digest())
    assert len(found) == 1 + len(paths)


@pytest.mark.parametrize("spec", [None, SimpleNamespace(origin="/nowhere/nilearn/__init__.py")])
def test_without_the_template_it_says_what_to_install(monkeypatch, spec):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    for ask in (atlas.template_folder, digest, load_atlas):
        with pytest.raises(FileNotFoundError, match="pip install nilearn"):
            ask()


@pytest.fixture(scope="module")
def real(atlas_cache):
    return load_atlas(atlas_cache)


def around_brain(real):
    """Where the brain's fields lie in those of the head."""
    start = np.subtract(real.brain_origin, HEAD_ORIGIN).astype(int)
    return tuple(slice(a, a + n) for a, n in zip(start, real.pial.shape, strict=True))


def test_the_fields_fit_together(real):
    assert real.skull.shape == real.head.shape == HEAD_SHAPE
    assert real.tissue.shape == real.pial.shape == real.ventricle.shape
    assert real.growth.shape[0] == 3
    assert (real.brain_origin >= ORIGIN).all()
    for name in NAMES:
        assert np.isfinite(getattr(real, name)).all()


def test_skull_holds_brain_and_brain_holds_ventricles(real):
    assert (real.skull[around_brain(real)][real.pial > 0] < 0).mean() > 0.999
    assert (real.pial[real.ventricle < 0] > 0).all()
    intracranial = (real.skull < 0).sum()
    assert 1_900_000 < intracranial < 2_200_000
    assert 0.6 < (real.pial > 0).sum() / intracranial < 1
    assert 5_000 < (real.ventricle < 0).sum() < 40_000


def test_both_sides_have_a_ventricle_and_a_white_core(real):
    left, right = np.array_split(real.ventricle < 0, 2)
    assert 0.8 < left.sum() / right.sum() < 1.25
    deep = real.pial > 10
    assert 0.3 < real.tissue[deep].mean() < 1
    assert real.tissue.min() >= -0.11
    assert real.tissue.max() <= 1.16


def test_intensities_lie_between_those_of_air_and_of_fat(real):
    assert real.head.min() >= 0
    assert real.head.max() <= 1
    assert not real.head[[0, -1]].any(), "no air beside the head"


def test_the_flow_leaves_the_ventricles_and_rests_at_the_skull(real):
    size = np.hypot.reduce(real.growth)
    start = np.subtract(ORIGIN, HEAD_ORIGIN).astype(int)
    coarse = [slice(a, a + n * atlas.GROWTH_STEP, atlas.GROWTH_STEP)
              for a, n in zip(start, size.shape, strict=True)]  # fmt: skip
    skull = real.skull[tuple(coarse)]
    assert not size[skull > 0].any()
    assert size.max() > 5
    x, y, z = (real.growth[axis] for axis in range(3))
    outflow = np.gradient(x, axis=0) + np.gradient(y, axis=1) + np.gradient(z, axis=2)
    assert outflow[tuple(n // 2 for n in size.shape)] != 0
