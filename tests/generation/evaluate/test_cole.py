from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional

from generation.errors import EvaluationError
from generation.evaluate.cole import ColeNetwork
from generation.train.networks import seeded

pytestmark = pytest.mark.usefixtures("one_thread")


def test_published_size():
    """Counted by hand: kernels, biases of the first convolutions, norms, and the line."""
    channels = [1, 8, 16, 32, 64, 128]
    expected = 5 * 7 * 5 * 128 + 1
    for before, after in pairwise(channels):
        expected += 27 * after * (before + after) + after + 2 * after
    with torch.device("meta"):
        network = ColeNetwork((160, 224, 160), channels[1:])
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


def test_parity_with_operations_written_out():
    with seeded(0):
        network = ColeNetwork((16, 24, 16), (3, 4), outputs=2).eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        x = given = torch.rand(2, 1, 16, 24, 16)
    state = network.state_dict()
    for block in range(2):
        w = {k.removeprefix(f"blocks.{block}."): v for k, v in state.items()}
        x = functional.conv3d(x, w["0.weight"], w["0.bias"], padding=1).clamp(min=0)
        x = functional.conv3d(x, w["2.weight"], padding=1)
        at = (1, -1, 1, 1, 1)
        x = (x - w["3.running_mean"].view(at)) / (w["3.running_var"].view(at) + 1e-5).sqrt()
        x = (x * w["3.weight"].view(at) + w["3.bias"].view(at)).clamp(min=0)
        n, c, *sides = x.shape
        halves = [n, c] + [part for side in sides for part in (side // 2, 2)]
        x = x.reshape(halves).amax((3, 5, 7))
    expected = x.flatten(1) @ state["end.weight"].T + state["end.bias"]
    torch.testing.assert_close(network(given), expected, rtol=1e-4, atol=1e-5)


def test_downsampling_is_the_mean_of_cubes():
    with seeded(0):
        network = ColeNetwork((16, 16, 16), (2, 2), downsample=2).eval()
        plain = ColeNetwork((8, 8, 8), (2, 2)).eval()
        given = torch.rand(1, 1, 16, 16, 16)
    plain.load_state_dict(network.state_dict())
    small = given.reshape(1, 1, 8, 2, 8, 2, 8, 2).mean((3, 5, 7))
    torch.testing.assert_close(network(given), plain(small))


@pytest.mark.parametrize("downsample", [1, 2, 4])
def test_full_heads_at_every_downsampling(downsample):
    with torch.device("meta"):
        network = ColeNetwork((160, 224, 160), (8, 16, 32, 64, 128), 2, "instance", downsample)
        assert network(torch.zeros(1, 1, 160, 224, 160)).shape == (1, 2)


def test_other_shapes_are_refused():
    with pytest.raises(EvaluationError, match=r"takes volumes of \(1, 16, 16, 16\), found"):
        ColeNetwork((16, 16, 16), (2,))(torch.zeros(1, 1, 16, 16, 8))
