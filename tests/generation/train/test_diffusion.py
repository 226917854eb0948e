"""Trainers of denoisers."""

import pytest
import torch
from trainers import tiny, trained


@pytest.mark.parametrize("target", ["epsilon", "sample", "velocity", "flow"])
def test_the_loss_falls(tmp_path, target):
    changes = {"system": tiny(target=target), "steps": 60, "batch": 8, "keep_every": 0}
    _, lines = trained("diffusion", tmp_path, learning_rate=3e-3, drop_conditions=0, **changes)
    losses = [line["unet"] for line in lines if "unet" in line]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_volumes_are_learned_without_an_autoencoder(tmp_path):
    system = tiny("medforj", target="sample")
    changes = {"steps": 40, "learning_rate": 3e-3, "keep_every": 0, "augment": {}}
    _, lines = trained("pixel", tmp_path, system=system, **changes)
    losses = [line["unet"] for line in lines if "unet" in line]
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8])


def test_samples_come_to_follow_their_covariates(tmp_path):
    """The pattern's size in samples, against the covariate they were asked with."""
    system = tiny(target="velocity")
    changes = {"steps": 120, "batch": 8, "learning_rate": 5e-3, "drop_conditions": 0}
    run, _ = trained("diffusion", tmp_path, until=1, system=system, keep_every=0, **changes)

    def asked_and_found():
        pairs = []
        with run._averaged():
            for place in (0, 4, 8, 11):
                batch = run._held_out(place)
                made = run.task._sampled(batch, (3, 4, 4, 4))
                size = float((made[0, :, :, 3] - made[0, :, :, 0]).mean())
                pairs.append((float(batch.samples["condition"][0, 0]), size))
        return torch.tensor(pairs).T

    before = float(torch.corrcoef(asked_and_found())[0, 1])
    list(run.advance())
    assert float(torch.corrcoef(asked_and_found())[0, 1]) > max(0.9, before)
