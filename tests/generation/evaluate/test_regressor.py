import numpy as np
import pytest
import torch
import trainers

from generation.covariates import AGE, VENTRICULAR_VOLUME
from generation.errors import EvaluationError
from generation.evaluate.regressor import Targets, load_regressor

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def trained(tmp_path):
    return trainers.trained("regression", tmp_path / "run")[0]


def volumes(count=3):
    return torch.stack([trainers.Grains()[index]["image"] for index in range(count)])


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
