"""Models of the package's own trainer: one learned its data by heart, the other did not."""

import pandas as pd
import pytest
import torch
import trainers

from generation.evaluate.memorisation import audit
from generation.latent import LatentDiffusion
from generation.options import Options
from generation.testing import random_network
from generation.train import release
from generation.train.diffusion import DiffusionTask
from generation.train.loop import Run
from generation.train.settings import settings

FACTORS = 6
WIDTH = 16


class Shapes:
    """Latents with a few factors, and a little of their own."""

    def __init__(self, first, count, shape):
        self.first, self.count, self.shape = first, count, shape
        self.basis = torch.randn(FACTORS, *shape, generator=torch.Generator().manual_seed(99))

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        draw = torch.Generator().manual_seed(self.first + index)
        weights = torch.randn(FACTORS, generator=draw) / FACTORS**0.5
        own = 0.1 * torch.randn(*self.shape, generator=draw)
        mean = torch.einsum("k,kcxyz->cxyz", weights, self.basis) + own
        condition = torch.full((4,), 0.5)
        return {"mean": mean, "sigma": torch.full_like(mean, 0.01), "condition": condition}

    def vectors(self):
        return torch.stack([self[index]["mean"].flatten() for index in range(self.count)])


def made(training, folder, steps, count=64):
    """What a model makes that was trained on some latents."""
    preset = trainers.tiny(target="velocity")
    preset["networks"]["unet"] |= {
        "channels": [WIDTH] * 3, "num_res_blocks": 1, "num_head_channels": [0, WIDTH, WIDTH]
    }  # fmt: skip
    how = settings(
        trainers.BASE
        | {
            "kind": "diffusion", "system": preset, "latent_scale": 1.0, "steps": steps,
            "batch": 16, "learning_rate": 3e-3, "half_life": steps / 4, "average": 0.98,
            "keep_every": 0, "log_every": 100,
        }
    )  # fmt: skip
    run = Run(DiffusionTask(how, training), training, how, folder)
    for _ in run.advance():
        pass
    decoder = folder / "autoencoder.pt"
    torch.save(random_network(how.system, "autoencoder").state_dict(), decoder)
    weights = release.add("m", {"unet": folder, "autoencoder": decoder}, folder / "weights")
    rows = pd.DataFrame(dict.fromkeys(("sex", "age", "ventricular_volume", "brain_volume"), 0.5),
                        index=range(count))  # fmt: skip
    generator = LatentDiffusion(weights, Options(solver="ddim", steps=12))
    return generator.sample_latents(rows.assign(seed=range(count))).flatten(1)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_model_of_eight_is_flagged_and_a_healthy_one_is_not(tmp_path):
    shape = tuple(trainers.tiny()["latent_shape"])
    held_out = Shapes(5000, 64, shape).vectors()
    found = {}
    for count in (8, 256):
        training = Shapes(0, count, shape)
        samples = made(training, tmp_path / str(count), steps=300)
        found[count] = audit(training.vectors(), samples, held_out, space="latents")
    assert found[8].verdict == "copies found"
    assert found[8].finding.p < 0.01
    assert found[8].finding.nearer.share > 0.9
    assert found[256].verdict == "no copy found"
    assert found[256].control.p > 0.05
    assert found[256].finding.nearer.share < 0.75
