"""The autoencoder's trainer."""

import pytest
import trainers
from trainers import trained

from generation.errors import TrainingError
from generation.train.perceptual import PerceptualUnavailableWarning


def test_the_loss_falls_and_reconstructions_get_better(tmp_path):
    changes = {"steps": 80, "learning_rate": 1e-2, "keep_every": 0, "augment": {}, "crop": None}
    run, lines = trained("autoencoder", tmp_path, until=1, adversarial_from=60, **changes)
    before = run.validate()
    lines += list(run.advance())
    losses = [line["l1"] for line in lines if "l1" in line]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    after = run.validate()
    assert after["validation/psnr"] > before["validation/psnr"] + 3
    assert after["validation/l1"] < before["validation/l1"]


def test_the_discriminator_starts_when_asked(tmp_path):
    _, lines = trained("autoencoder", tmp_path)
    judged = [line["step"] for line in lines if "discriminator" in line]
    assert judged == [3, 4, 5, 6]
    assert {"l1", "kl", "perceptual", "fooling"} <= set(lines[-1] | lines[-2])


def test_without_weights_of_a_network_another_loss_is_used_and_said(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.warns(PerceptualUnavailableWarning, match="pyramid loss"):
        run = trainers.start("autoencoder", tmp_path / "run", perceptual_network="squeeze")
    assert run.task.state() == {"perceptual": "pyramid"}


def test_another_perceptual_loss_does_not_go_on_with_a_run(tmp_path):
    run, _ = trained("autoencoder", tmp_path, until=1)
    with pytest.raises(TrainingError, match="began with the perceptual loss 'squeeze'"):
        run.task.restore({"perceptual": "squeeze"})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"crop": [12, 16, 16]}, "crop must be multiples of 8"),
        ({"crop": [16, 16, 40]}, "crop must fit into volumes of"),
        ({"discriminator": {"chanels": 4}}, "setting discriminator: .*chanels"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, changes, says):
    with pytest.raises(TrainingError, match=says):
        trainers.start("autoencoder", tmp_path, **changes)
