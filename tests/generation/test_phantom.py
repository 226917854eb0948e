import hashlib
import importlib.util
import itertools
import pickle

import numpy as np
import pandas as pd
import pytest
import torch

from generation import atlas, phantom
from generation.covariates import BRAIN_VOLUME, NAMES, VENTRICULAR_VOLUME, CovariateError
from generation.phantom import PhantomGenerator
from generation.volumetry import measure
from synthbrain import draw_cohort
from synthbrain.testing import check_generator

MEASURED = (VENTRICULAR_VOLUME, BRAIN_VOLUME)


# Trained ranges from end to end: sex, age, ventricular volume, brain volume.
SPAN = (
    (0, 0.10, 0.00, 1.00), (1, 0.30, 0.15, 0.75), (1, 0.60, 0.45, 0.95), (0, 0.75, 0.60, 0.25),
    (1, 1.00, 1.00, 0.00),
)  # fmt: skip


@pytest.fixture(scope="module")
def generator(phantom):
    return phantom


@pytest.fixture(scope="module")
def pair(generator):
    """Two volumes that differ in their seed alone, and their rows."""
    same = (1.0, 0.5, 0.3, 0.5)
    table = rows(same, same)
    return generator.sample(table)[:, 0], table


def rows(*vectors, seed=1):
    table = pd.DataFrame(vectors, columns=list(NAMES), dtype=float)
    return table.assign(seed=range(seed, seed + len(table)))


def as_stored(volume):
    return (volume.numpy() * 255).round().astype(np.uint8) / np.float32(255)


def normalised(volume):
    """Ventricular and brain volume of one head as stored, measured and normalised."""
    found = measure(as_stored(volume))
    return [float(c.normalise(getattr(found, c.name))) for c in MEASURED]


def errors(generator, table):
    """Measured less asked volumes, one line a row; they must follow each other closely."""
    got = [normalised(generator.sample(table.iloc[[i]])[0]) for i in range(len(table))]
    asked = table[[c.name for c in MEASURED]].to_numpy()
    for column, covariate in enumerate(MEASURED):
        assert np.corrcoef(asked[:, column], np.array(got)[:, column])[0, 1] >= 0.99, covariate.name
    return np.array(got) - asked


@pytest.mark.slow
def test_it_keeps_the_contract(generator):
    check_generator(generator)


def test_volumes_are_float32_between_0_and_1(generator, pair):
    volumes, _ = pair
    assert (volumes.shape, volumes.dtype) == ((2, *generator.shape), torch.float32)
    assert torch.isfinite(volumes).all()
    assert volumes.min() >= 0
    assert volumes.max() <= 1


def test_measured_volumes_are_the_asked_ones(generator):
    assert abs(errors(generator, rows(*SPAN))).max() <= 0.02


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_measured_volumes_of_64_drawn_rows(generator):
    found = errors(generator, draw_cohort(64, seed=3).table)
    assert (abs(found).mean(axis=0) <= 0.01).all()
    assert abs(found).max() <= 0.03


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_measured_volumes_of_64_rows_over_the_whole_range(generator):
    draw = np.random.default_rng(5)
    table = pd.DataFrame({name: draw.random(64) for name in NAMES})
    found = errors(
        generator, table.assign(sex=table["sex"].round(), seed=draw.integers(0, 2**62, 64))
    )
    assert (abs(found).mean(axis=0) <= 0.01).all()  # the corners of the square are not anatomy


def test_the_seed_alone_makes_another_brain(pair):
    (a, b), _ = pair
    head = (a > 0.1) | (b > 0.1)
    assert (a - b)[head].abs().mean() > 0.03
    assert torch.corrcoef(torch.stack([a[head], b[head]]))[0, 1] < 0.95


def test_the_seed_leaves_the_volumes(pair):
    for volume in pair[0]:
        assert normalised(volume) == pytest.approx([0.3, 0.5], abs=0.02)


def test_there_is_no_noise_in_the_air(pair):
    for volume in pair[0]:
        corner = volume[:20, -20:, -20:]  # above the forehead
        assert not corner.any()
        assert (volume == 0).float().mean() > 0.2


def test_age_lowers_contrast_and_leaves_the_shape(generator):
    young, old = (generator.sample(rows((0, age, 0.3, 0.5)))[0, 0] for age in (0.0, 1.0))
    cortex = (young > 0.45) & (young < 0.52)
    white = young > 0.66
    inner = torch.zeros_like(white)
    inner[50:110, 70:150, 80:110] = True
    contrast = [float(v[white & inner].mean() - v[cortex & inner].mean()) for v in (young, old)]
    assert contrast[1] < 0.85 * contrast[0]
    assert torch.equal(young == 0, old == 0)


def test_men_have_larger_heads():
    seeds = range(200)
    table = pd.concat([rows(*[(sex, 0.5, 0.2, 0.5)] * len(seeds)) for sex in (0, 1)])
    traits = [phantom._Traits(int(seed)) for seed in table["seed"]]
    vectors = table[list(NAMES)].to_numpy(np.float32)
    volumes = phantom._targets(vectors, traits, torch.device("cpu")).intracranial.numpy()
    women, men = volumes[:200], volumes[200:]
    assert 1.10 < men.mean() / women.mean() < 1.15
    assert women.min() > 1.2e6
    assert men.max() < 1.85e6


def least_determinant(warp):
    """Least Jacobian determinant over all corners of all cells of a warp ``(3, x, y, z)``, mm."""
    slopes = [torch.diff(warp, dim=axis) / step for axis, step in enumerate(phantom.COARSE.step, 1)]
    least = torch.inf
    for corner in itertools.product((0, 1), repeat=3):
        columns = []
        for axis, slope in enumerate(slopes):
            sides = [slice(c, c + n - 1) for c, n in zip(corner, warp.shape[1:], strict=True)]
            sides[axis] = slice(None)
            columns.append(slope[:, *sides])
        u, v, w = columns
        least = min(least, float((u * torch.linalg.cross(v, w, dim=0)).sum(0).min()))
    return least


@pytest.mark.parametrize(
    ("ventricles", "brain", "seed"),
    [(-0.5, 0.5, 1), (0.3, 0.9, 2), (1.0, 0.1, 3), (1.0, 0.9, 4), (1.4, 0.5, 5), (1.9, 0.0, 6),
     (1.9, 1.0, 7)],
)  # fmt: skip
def test_nothing_folds_far_beyond_the_range(generator, ventricles, brain, seed):
    warp = generator.deformation(rows((seed % 2, 0.5, ventricles, brain), seed=seed))
    assert warp.shape == (1, 3, *phantom.COARSE_SHAPE)
    rounding = 1e-4 if ventricles > 1.5 else 0.0  # where a cell is swept from almost nothing
    assert least_determinant(warp[0].double()) > -rounding


def test_ventricles_extrapolate(generator):
    asked = (-0.5, 0.0, 1.9)
    found = [normalised(generator.sample(rows((1, 0.5, v, 0.4)))[0])[0] for v in asked]
    assert found[1:] == pytest.approx(asked[1:], abs=0.04)
    assert -0.1 < found[0] < found[1] - 0.01, "they shrink, and do not vanish"
    assert (np.diff(found[1:]) > 0.3).all()


def test_brain_volume_saturates_instead_of_breaking(generator):
    small, large = generator.sample(rows((0, 0.5, 0.2, -1.0), (0, 0.5, 0.2, 2.5)))
    volumes = [measure(as_stored(head)).brain_volume for head in (small, large)]
    assert 0.7e6 < volumes[0] < 1.0e6
    assert 1.75e6 < volumes[1] < 2.05e6


def test_processes_and_threads_do_not_matter(generator, pair, python):
    volumes, table = pair
    script = """
        import hashlib, pickle, sys
        import pandas as pd, torch

        generator, table = pickle.loads(bytes.fromhex(sys.argv[1]))
        torch.set_num_threads(3)
        print(hashlib.sha256(generator.sample(table).numpy().tobytes()).hexdigest())
    """
    here = hashlib.sha256(volumes[0].numpy().tobytes()).hexdigest()
    there = python(script, pickle.dumps((generator, table.iloc[:1])).hex())
    assert there.split() == [here]


def test_batches_do_not_matter(generator, pair, monkeypatch):
    volumes, table = pair
    other = rows(SPAN[-1], seed=3)
    apart = torch.cat([generator.sample(other), volumes[:1, None]])
    monkeypatch.setattr(generator, "batch_size", 2)
    together = generator.sample(pd.concat([other, table.iloc[:1]]))
    assert together.shape == (2, 1, 160, 224, 160)
    assert (together - apart).abs().max() <= 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_makes_the_same(generator):
    table = rows(SPAN[1], SPAN[3], SPAN[4])
    on_gpu = PhantomGenerator(cache=generator.cache, device="cuda")
    assert on_gpu.batch_size > 1
    assert (on_gpu.sample(table).cpu() - generator.sample(table)).abs().max() <= 1e-4


def test_no_rows_give_no_volumes(generator):
    assert generator.sample(rows((0, 0, 0, 0)).iloc[:0]).shape == (0, 1, 160, 224, 160)


@pytest.mark.usefixtures("pair")
def test_a_pickled_generator_carries_no_fields(generator):
    packed = pickle.dumps(generator)
    assert len(packed) < 1000
    copy = pickle.loads(packed)
    assert (copy.cache, copy.device) == (generator.cache, generator.device)
    assert copy.digest == generator.digest


def test_its_identity_is_cheap(python, tmp_path):
    script = """
        import sys
        from pathlib import Path
        from generation.phantom import PhantomGenerator

        PhantomGenerator(cache=Path(sys.argv[1])).digest
        print([m for m in ("nilearn", "monai", "scipy", "nibabel") if m in sys.modules])
    """
    assert python(script, tmp_path / "cache").strip() == "[]"
    assert not (tmp_path / "cache").exists(), "the atlas was derived"


def test_its_identity_needs_no_atlas(monkeypatch):
    monkeypatch.setattr(atlas, "load_atlas", lambda cache: pytest.fail("asked for the atlas"))
    assert len(PhantomGenerator().digest) == 64


def test_its_identity_changes_with_every_version(monkeypatch):
    before = PhantomGenerator().digest
    monkeypatch.setattr(atlas, "VERSION", 10**6)
    changed = PhantomGenerator().digest
    monkeypatch.setattr(phantom, "VERSION", 10**6)
    assert len({before, changed, PhantomGenerator().digest}) == 3


def test_rows_must_be_whole(generator):
    whole = rows((0, 0.5, 0.2, 0.5))
    for table in (whole.drop(columns="age"), whole.assign(age=np.nan)):
        for use in (generator.sample, generator.deformation):
            with pytest.raises(CovariateError, match="age"):
                use(table)


def test_without_nilearn_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install nilearn"):
        PhantomGenerator().digest  # noqa: B018
    with pytest.raises(FileNotFoundError, match="pip install nilearn"):
        PhantomGenerator().sample(rows((0, 0.5, 0.2, 0.5)))


def test_what_is_remembered_of_the_growth_is_what_would_be_derived(atlas_cache, tmp_path):
    for path in atlas_cache.glob("atlas-*.npz"):
        (tmp_path / path.name).symlink_to(path)
    derived = PhantomGenerator(cache=tmp_path)._course
    (kept,) = tmp_path.glob("course-*.npz")
    read = PhantomGenerator(cache=tmp_path)._course
    assert all(torch.equal(one, other) for one, other in zip(derived, read, strict=True))
    kept.write_bytes(kept.read_bytes()[:100])
    again = PhantomGenerator(cache=tmp_path)._course
    assert all(torch.equal(one, other) for one, other in zip(derived, again, strict=True))
