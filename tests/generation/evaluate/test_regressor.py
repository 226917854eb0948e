"""The network of Cole et al. 2017, and trained ones."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import trainers
from torch import nn
from torch.nn import functional

from generation.covariates import AGE, VENTRICULAR_VOLUME
from generation.errors import EvaluationError
from generation.evaluate.regressor import ColeNetwork, Targets, load_regressor
from generation.train.networks import seeded

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def trained(tmp_path):
    return trainers.trained("regression", tmp_path / "run")[0]


def volumes(count=3):
    return torch.stack([trainers.Grains()[index]["image"] for index in range(count)])


class TestNetwork:
    def test_published_size(self):
        """Counted by hand: kernels, biases of the first convolutions, norms, and the line."""
        channels = [1, 8, 16, 32, 64, 128]
        expected = 5 * 7 * 5 * 128 + 1
        for before, after in pairwise(channels):
            expected += 27 * after * (before + after) + after + 2 * after
        with torch.device("meta"):
            network = ColeNetwork((160, 224, 160), channels[1:])
        assert sum(parameter.numel() for parameter in network.parameters()) == expected

    def test_parity_with_operations_written_out(self):
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

    def test_downsampling_is_the_mean_of_cubes(self):
        with seeded(0):
            network = ColeNetwork((16, 16, 16), (2, 2), downsample=2).eval()
            plain = ColeNetwork((8, 8, 8), (2, 2)).eval()
            given = torch.rand(1, 1, 16, 16, 16)
        plain.load_state_dict(network.state_dict())
        small = given.reshape(1, 1, 8, 2, 8, 2, 8, 2).mean((3, 5, 7))
        torch.testing.assert_close(network(given), plain(small))

    @pytest.mark.parametrize("downsample", [1, 2, 4])
    def test_full_heads_at_every_downsampling(self, downsample):
        with torch.device("meta"):
            network = ColeNetwork((160, 224, 160), (8, 16, 32, 64, 128), 2, "instance", downsample)
            assert network(torch.zeros(1, 1, 160, 224, 160)).shape == (1, 2)

    def test_other_shapes_are_refused(self):
        with pytest.raises(EvaluationError, match=r"takes volumes of \(1, 16, 16, 16\), found"):
            ColeNetwork((16, 16, 16), (2,))(torch.zeros(1, 1, 16, 16, 8))


class TestTargets:
    def test_outputs_in_natural_units_and_back(self):
        targets = Targets(("age", "sex", "ventricular_volume"), (0.5, 0.0, 0.2), (0.2, 1.0, 0.1))
        found = targets.natural(torch.tensor([[1.0, 0.0, -1.0]]))
        expected = [AGE.denormalise(0.7), 0.5, VENTRICULAR_VOLUME.denormalise(0.1)]
        assert found[0].tolist() == pytest.approx(expected)
        normalised = torch.tensor([[0.7, 1.0, 0.1]])
        assert targets.standardised(normalised)[0].tolist() == pytest.approx([1, 1, -1])


class TestRegressor:
    def test_what_was_trained_is_loaded_with_its_averages(self, trained):
        found = load_regressor(trained.folder)
        assert (found.names, found.step) == (("age", "ventricular_volume"), 6)
        with trained._averaged():
            outputs = trained.task.modules["regressor"](volumes())
        expected = trained.task.targets.natural(outputs).numpy()
        assert found.predict(volumes()) == pytest.approx(expected, rel=1e-4)
        assert found.predict(volumes().numpy()).dtype == np.float64
        earlier = load_regressor(trained.folder / "step-000000002.pt")
        assert earlier.step == 2
        assert not np.allclose(earlier.predict(volumes()), expected)

    def test_a_prediction_does_not_depend_on_its_batch(self, trained):
        found = load_regressor(trained.folder)
        expected = found.predict(volumes(5))
        for batch in (2, 5, 9):
            assert found.predict(volumes(5), batch=batch) == pytest.approx(expected, rel=1e-5)
        assert found.predict(volumes(1)[:0]).shape == (0, 2)

    def test_what_is_no_regressor_is_told(self, trained, tmp_path):
        (tmp_path / "empty").mkdir()
        other = trainers.trained("diffusion", tmp_path / "ldm", until=2)[0]
        rubbish = tmp_path / "step-000000001.pt"
        rubbish.write_bytes(b"rubbish")
        torch.save({"settings": "{}"}, tmp_path / "step-000000002.pt")
        for path, says in (
            (tmp_path / "empty", "holds no checkpoint"),
            (other.folder, "of a run of kind 'diffusion', expected 'regression'"),
            (rubbish, "cannot read"),
            (tmp_path / "step-000000002.pt", "kind must be one of"),
            (tmp_path / "gone.pt", "there is no"),
        ):
            with pytest.raises(EvaluationError, match=says):
                load_regressor(path)
