import numpy as np
import pytest
import torch

from generation.errors import EvaluationError
from generation.evaluate.memorisation import audit
from generation.evaluate.planted import DOSES, Planted
from generation.evaluate.vectors import (
    Match,
    Share,
    coarse_voxels,
    correlations,
    rerank,
    unit,
    vectors,
)


def blobs(count, seed):
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 4, 4, 4, generator=draw)
    return torch.nn.functional.interpolate(coarse, size=(24, 24, 24), mode="trilinear")


def test_correlations_are_those_of_numpy():
    draw = torch.Generator().manual_seed(0)
    first, second = torch.rand(5, 30, generator=draw), torch.rand(7, 30, generator=draw)
    expected = np.corrcoef(first, second)[:5, 5:]
    assert correlations(unit(first, None), unit(second, None)) == pytest.approx(expected, abs=1e-6)


def test_coarse_voxels_are_means_of_cubes():
    volume = blobs(1, 0)
    found = coarse_voxels(8)(volume)
    assert found.shape == (1, 27)
    assert found[0, 0].item() == pytest.approx(volume[0, 0, :8, :8, :8].mean().item(), abs=1e-6)


def test_the_batch_makes_no_difference():
    volumes = blobs(5, 0)
    assert torch.equal(
        vectors(volumes, coarse_voxels()), vectors(volumes, coarse_voxels(), batch=3)
    )


def test_features_of_any_shape_are_flattened_and_wrong_ones_refused():
    assert vectors(blobs(2, 0), lambda v: v[:, :, ::8, ::8, ::8]).shape == (2, 27)
    with pytest.raises(EvaluationError, match="one row for each"):
        vectors(blobs(2, 0), lambda v: v[:0])
    with pytest.raises(EvaluationError, match="no volumes"):
        vectors([], coarse_voxels())


def test_reranking_goes_by_all_voxels():
    volumes = blobs(3, 0)
    noisy = (volumes + 0.05 * torch.randn(volumes.shape)).clamp(0, 1)
    noisy[1] = volumes[1]
    found = rerank([Match(0, 0, 0.99), Match(1, 1, 0.98), Match(2, 0, 0.97)], noisy, volumes)
    assert [match.sample for match in found] == [1, 0, 2]
    assert found[0].similarity == pytest.approx(1, abs=1e-5)
    expected = np.corrcoef(noisy[0].flatten(), volumes[0].flatten())[0, 1]
    assert found[1].similarity == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("count", "interval"), [(0, (0, 0.3085)), (5, (0.1871, 0.8129)), (10, (0.6915, 1))]
)
def test_intervals_of_shares_are_those_of_the_tables(count, interval):
    found = Share.counted(np.arange(10) < count)
    assert found.share == count / 10
    assert found.interval == pytest.approx(interval, abs=1e-4)


def test_an_audit_of_volumes_finds_copies_at_every_small_dose():
    training, held_out = blobs(40, 1), blobs(40, 2)
    made = torch.cat([training[:20], blobs(20, 3)])
    space = coarse_voxels(4)
    planted = {
        str(dose): (vectors(Planted(training, range(10), dose), space), range(10)) for dose in DOSES
    }
    found = audit(
        *(vectors(v, space) for v in (training, made, held_out)), space="voxels", planted=planted
    )
    assert found.verdict == "copies found"
    assert found.finding.above.count >= 20
    assert all(found.power[dose].found.share == 1 for dose in ("noise 0.05", "blur 1", "shift 1"))
    assert rerank(found.worst[:3], made, training)[0].similarity == pytest.approx(1, abs=1e-5)
