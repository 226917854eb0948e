import pytest
import torch
from torch import nn

from generation.errors import WeightsError
from generation.evaluate.networks import digest_of, fill_randomly, load_strictly


class TestRandomWeights:
    def test_are_uniform_with_the_variance_of_he(self):
        net = nn.Conv3d(8, 400, 3)
        fill_randomly(net, 0)
        bound = (6 / 216) ** 0.5
        assert net.weight.abs().max() <= bound
        assert net.weight.abs().max().item() == pytest.approx(bound, rel=1e-4)
        assert net.weight.mean().item() == pytest.approx(0, abs=1e-3)
        assert net.weight.var().item() == pytest.approx(2 / 216, rel=0.01)
        assert (net.bias == 0).all()

    def test_are_known_numbers(self):
        net = nn.Linear(3, 2, bias=False)
        fill_randomly(net, 7)
        assert [value.hex() for value in net.weight.flatten().tolist()] == KNOWN


class TestStrictly:
    def test_what_is_ignored_may_be_missing_or_too_many(self):
        net = nn.BatchNorm1d(2)
        state = {k: torch.ones(2) for k in ("weight", "bias", "running_mean", "running_var")}
        load_strictly(
            net, state | {"extra": torch.ones(1)}, where="x",
            ignored=lambda key: key[:3] in "extnum",
        )  # fmt: skip
        assert (net.running_mean == 1).all()

    def test_all_that_is_wrong_is_named(self):
        net = nn.Linear(2, 2)
        state = {"weight": torch.ones(3), "b": torch.ones(1)}
        with pytest.raises(
            WeightsError,
            match=r"file: of 2 tensors 1 missing \(bias\); 1 unexpected \(b\); "
            r"1 of another shape \(weight \(3,\) instead of \(2, 2\)\)",
        ):
            load_strictly(net, state, where="file", ignored=lambda key: False)


def test_the_digest_is_of_architecture_preprocessing_and_weights():
    state = {"w": torch.ones(2)}
    digests = {
        digest_of("a", "b", state),
        digest_of("ab", "", state),
        digest_of("a", "c", state),
        digest_of("a", "b", {"w": torch.zeros(2)}),
        digest_of("a", "b", {"v": torch.ones(2)}),
    }
    assert len(digests) == 5
    assert all(len(digest) == 64 for digest in digests)


KNOWN = [
    "-0x1.6941ca0000000p-4",
    "-0x1.abcf2c0000000p-3",
    "-0x1.8cd8f20000000p-2",
    "-0x1.7c5a2c0000000p-1",
    "-0x1.0595600000000p+0",
    "0x1.15bb3c0000000p-5",
]
