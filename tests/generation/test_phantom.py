import hashlib
import importlib.util
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


@pytest.fixture(scope="module")
def generator(atlas_cache):
    return PhantomGenerator(cache=atlas_cache)


def rows(*vectors, seed=1):
    table = pd.DataFrame(vectors, columns=list(NAMES), dtype=float)
    return table.assign(seed=range(seed, seed + len(table)))


def as_stored(volume):
    return (volume.numpy() * 255).round().astype(np.uint8) / np.float32(255)


def measured(generator, table):
    """Normalised ventricular and brain volumes, one line a row."""
    found = [measure(as_stored(generator.sample(table.iloc[[i]])[0])) for i in range(len(table))]
    return np.array([[c.normalise(getattr(m, c.name)) for c in MEASURED] for m in found])


def judge(generator, table):
    got = measured(generator, table)
    for column, covariate in enumerate(MEASURED):
        asked = table[covariate.name].to_numpy()
        assert np.corrcoef(asked, got[:, column])[0, 1] >= 0.99, covariate.name
        assert abs(got[:, column] - asked).mean() <= 0.02, covariate.name


def test_it_keeps_the_contract(generator):
    check_generator(generator)


def test_measured_volumes_are_the_asked_ones(generator):
    judge(
        generator,
        rows(
            (0, 0.10, 0.02, 0.80), (1, 0.50, 0.20, 0.50), (0, 0.90, 0.50, 0.30),
            (1, 0.70, 0.95, 0.50), (0, 0.90, 0.10, 0.05), (1, 0.20, 0.05, 0.95),
        ),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_measured_volumes_of_64_drawn_rows(generator):
    judge(generator, draw_cohort(64, seed=3).table)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_measured_volumes_of_64_rows_over_the_whole_range(generator):
    draw = np.random.default_rng(5)
    table = pd.DataFrame({name: draw.random(64) for name in NAMES})
    judge(generator, table.assign(sex=table["sex"].round(), seed=draw.integers(0, 2**62, 64)))


def test_the_seed_alone_makes_another_brain(generator):
    same = (1.0, 0.5, 0.3, 0.5)
    a, b = generator.sample(rows(same, same))[:, 0]
    head = (a > 0.1) | (b > 0.1)
    assert (a - b)[head].abs().mean() > 0.03
    assert torch.corrcoef(torch.stack([a[head], b[head]]))[0, 1] < 0.95


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


def test_nothing_folds_far_beyond_the_range(generator):
    table = rows(*[(i % 2, 0.5, v, 0.5) for i, v in enumerate((-0.5, 0.0, 1.0, 1.9, 1.9, 1.9))])
    for start in range(len(table)):
        into = generator.deformation(table.iloc[[start]])[0].double()
        steps = [torch.diff(into, dim=axis)[:, :79, :111, :79] for axis in (1, 2, 3)]
        jacobian = torch.stack(steps, dim=-1).permute(1, 2, 3, 0, 4) / 2
        determinant = -torch.linalg.det(jacobian)  # x runs from right to left in a volume
        assert determinant.min() > 0, table.iloc[start].tolist()


def test_ventricles_extrapolate(generator):
    asked = (-0.5, 0.0, 1.0, 1.4, 1.9)
    heads = [generator.sample(rows((1, 0.5, v, 0.4)))[0] for v in asked]
    assert all(bool(torch.isfinite(head).all()) for head in heads)
    found = [float(VENTRICULAR_VOLUME.normalise(measure(as_stored(h)).ventricular_volume))
             for h in heads[1:]]  # fmt: skip
    assert np.allclose(found, asked[1:], atol=0.04)
    assert int((heads[0][0] > 0.4).sum()) > 0


def test_brain_volume_saturates_instead_of_breaking(generator):
    small, large = generator.sample(rows((0, 0.5, 0.2, -1.0), (0, 0.5, 0.2, 2.5)))
    volumes = [measure(as_stored(head)).brain_volume for head in (small, large)]
    assert 0.7e6 < volumes[0] < 1.0e6
    assert 1.75e6 < volumes[1] < 2.05e6


def test_another_process_gives_the_same_bytes(generator, atlas_cache, python):
    here = generator.sample(rows((1, 0.4, 0.2, 0.6), seed=11)).numpy()
    there = python(f"""
        import hashlib, sys
        import pandas as pd, torch
        from pathlib import Path
        from generation.phantom import PhantomGenerator

        torch.set_num_threads(1)
        row = dict(sex=1.0, age=0.4, ventricular_volume=0.2, brain_volume=0.6, seed=11)
        volume = PhantomGenerator(cache=Path({str(atlas_cache)!r})).sample(pd.DataFrame([row]))
        stored = (volume.numpy() * 255).round().astype("u1")
        print(hashlib.sha256(stored.tobytes()).hexdigest())
    """)
    stored = (here * 255).round().astype("u1")
    assert there.strip() == hashlib.sha256(stored.tobytes()).hexdigest()


def test_batches_do_not_matter(generator):
    table = rows((0, 0.1, 0.1, 0.5), (1, 0.9, 0.4, 0.4))
    together = PhantomGenerator(cache=generator.cache)
    together.batch_size = 2
    apart = generator.sample(table)
    assert (together.sample(table) - apart).abs().max() <= 1e-4


def test_no_rows_give_no_volumes(generator):
    assert generator.sample(rows((0, 0, 0, 0)).iloc[:0]).shape == (0, 1, 160, 224, 160)


def test_a_pickled_generator_carries_no_fields(generator):
    generator.sample(rows((0, 0.5, 0.2, 0.5)))
    packed = pickle.dumps(generator)
    assert len(packed) < 10_000
    assert pickle.loads(packed).digest == generator.digest


def test_its_identity_is_cheap_and_changes_with_the_version(monkeypatch, python):
    loaded = python("""
        import sys
        from generation.phantom import PhantomGenerator
        PhantomGenerator().digest
        print([m for m in ("nilearn", "monai", "scipy", "nibabel") if m in sys.modules])
    """)
    assert loaded.strip() == "[]"
    before = PhantomGenerator().digest
    monkeypatch.setattr(atlas, "VERSION", 10**6)
    changed = PhantomGenerator().digest
    monkeypatch.setattr(phantom, "VERSION", 10**6)
    assert len({before, changed, PhantomGenerator().digest}) == 3


def test_rows_must_be_whole(generator):
    whole = rows((0, 0.5, 0.2, 0.5))
    for table in (whole.drop(columns="age"), whole.assign(age=np.nan)):
        with pytest.raises(CovariateError, match="age"):
            generator.sample(table)


def test_without_nilearn_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install nilearn"):
        PhantomGenerator().digest  # noqa: B018
