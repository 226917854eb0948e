import threading

import numpy as np
import pytest
import torch

from generation.errors import EvaluationError
from generation.evaluate.diversity import PUBLISHED, Compared, between_pairs, summarise
from generation.evaluate.gradient_ssim import GradientSsim
from generation.evaluate.multiscale import Window
from generation.evaluate.pairing import pairs
from generation.evaluate.ssim import Ssim, ms_ssim

SMALL = Ssim(weights=(0.4, 0.6), window=Window(3))


class Counting:
    """Random volumes that count how often each is read."""

    def __init__(self, count, shape=(1, 8, 9, 8)):
        self.volumes = torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))
        self.reads, self.threads = [], set()

    def __len__(self):
        return len(self.volumes)

    def __getitem__(self, index):
        self.reads.append(index)
        self.threads.add(threading.get_ident())
        return self.volumes[index]


def test_streaming_changes_no_value():
    volumes = Counting(9)
    wanted = pairs(9, 20)
    found = dict(between_pairs(volumes, wanted, SMALL, resident=3))
    assert sorted(found) == wanted
    for (first, second), values in found.items():
        alone = ms_ssim(*volumes.volumes[[first, second]][:, None], window=Window(3),
                        weights=(0.4, 0.6))  # fmt: skip
        assert values["ms-ssim"] == alone.item()
    assert len(volumes.threads) == 1


def test_the_lower_index_is_the_reference():
    volumes, measure = Counting(2), GradientSsim([("single", "star")], window=Window(3))
    found = [next(between_pairs(volumes, [pair], measure)) for pair in ((0, 1), (1, 0))]
    first, second = (measure.prepare(volume[None]) for volume in volumes.volumes)
    assert found[0] == found[1]
    assert (
        found[0].values["4-g-r-ssim/single/star"]
        == measure.compare(first, second)["4-g-r-ssim/single/star"].item()
    )


def test_what_was_kept_is_not_computed_again(tmp_path):
    wanted = pairs(9, 20)
    whole = dict(between_pairs(Counting(9), wanted, SMALL))
    stopped = between_pairs(Counting(9), wanted, SMALL, folder=tmp_path, identity="a")
    first = [next(stopped) for _ in range(7)]
    stopped.close()
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text() + '[0, 1, {"ssim": 0.')  # killed while writing
    volumes = Counting(9)
    again = list(between_pairs(volumes, wanted, SMALL, folder=tmp_path, identity="a"))
    assert sorted(again[:7]) == sorted(first)
    assert dict(again) == whole
    volumes = Counting(9)
    assert dict(between_pairs(volumes, wanted, SMALL, folder=tmp_path, identity="a")) == whole
    assert volumes.reads == []


def test_other_settings_or_volumes_are_kept_apart(tmp_path):
    for measure, identity in ((SMALL, "a"), (SMALL, "b"), (Ssim((1.0,), Window(3)), "a")):
        list(between_pairs(Counting(3), [(0, 1)], measure, folder=tmp_path, identity=identity))
    assert len(list(tmp_path.iterdir())) == 3


def test_what_cannot_be_kept_or_compared_is_refused(tmp_path):
    with pytest.raises(EvaluationError, match="need an identity"):
        list(between_pairs(Counting(3), [(0, 1)], SMALL, folder=tmp_path))
    for pair in ((0, 3), (1, 1), (-1, 2)):
        with pytest.raises(EvaluationError, match="is no pair of 3 volumes"):
            list(between_pairs(Counting(3), [pair], SMALL))
    with pytest.raises(EvaluationError, match="allow 2 or more"):
        list(between_pairs(Counting(3), [(0, 1)], SMALL, resident=1))
    with pytest.raises(EvaluationError, match="need 1 pair of 2"):
        pairs(1, 1)
    with pytest.raises(EvaluationError, match="found 1 pairs"):
        summarise([Compared((0, 1), {"m": 1.0})])
    list(between_pairs(Counting(3), [(0, 1)], SMALL, folder=tmp_path, identity="a"))
    (path,) = tmp_path.iterdir()
    path.write_text("{}\n")
    with pytest.raises(EvaluationError, match="holds other results"):
        list(between_pairs(Counting(3), [(0, 1)], SMALL, folder=tmp_path, identity="a"))


def test_pairs_that_share_nothing_have_the_usual_interval():
    """Values 1 2 3 4 5 6: mean 3.5, sum of squares 17.5; 12 volumes: t = 2.201 with 11 degrees."""
    compared = [Compared((2 * i, 2 * i + 1), {"m": i + 1.0}) for i in range(6)]
    found = summarise(compared)["m"]
    half = 2.20099 * np.sqrt(17.5) / 6 * np.sqrt(12 * 11 / 10**2)
    assert (found.mean, found.pairs, found.volumes) == (3.5, 6, 12)
    assert found.deviation == pytest.approx(np.sqrt(17.5 / 5))
    assert found.interval == pytest.approx((3.5 - half, 3.5 + half), rel=1e-4)


@pytest.mark.parametrize(("n", "count"), [(12, 66), (40, 200), (100, 100)])
def test_the_interval_holds_the_mean_as_often_as_it_says(n, count):
    draw, hits = np.random.default_rng(0), 0
    for seed in range(300):
        own = draw.normal(size=n)
        compared = [
            Compared((i, j), {"m": own[i] + own[j] + draw.normal()})
            for i, j in pairs(n, count, seed)
        ]
        low, high = summarise(compared)["m"].interval
        hits += low <= 0 <= high
    assert 0.9 <= hits / 300 <= 0.99


def test_the_papers_values_are_there():
    assert PUBLISHED["real images"] == {"ms-ssim": 0.6536, "4-g-r-ssim": 0.3909}
    assert all(set(row) == {"ms-ssim", "4-g-r-ssim"} for row in PUBLISHED.values())
