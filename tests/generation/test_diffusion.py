import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from generation.diffusion import TARGETS, Schedule

LEVELS = st.floats(0.01, 0.99)


@given(
    level=LEVELS,
    name=st.sampled_from(sorted(TARGETS)),
    clean=st.floats(-3, 3),
    eps=st.floats(-3, 3),
)
def test_every_target_can_be_undone(level, name, clean, eps):
    alpha, sigma = level**0.5, (1 - level) ** 0.5
    target = TARGETS[name](alpha, sigma)
    x, y = alpha * clean + sigma * eps, target.p * clean + target.q * eps
    a, b = target.clean(alpha, sigma)
    c, d = target.noise(alpha, sigma)
    assert a * x + b * y == pytest.approx(clean, abs=1e-9)
    assert c * x + d * y == pytest.approx(eps, abs=1e-9)


@pytest.mark.parametrize(
    ("kind", "start", "end"), [("scaled_linear", 0.0015, 0.0205), ("linear", 1e-4, 2e-2)]
)
def test_schedule_equals_monai(kind, start, end):
    from monai.networks.schedulers import DDIMScheduler

    theirs = DDIMScheduler(1000, f"{kind}_beta", beta_start=start, beta_end=end).alphas_cumprod
    ours = Schedule.from_betas(kind, start, end, 1000)
    assert np.allclose(ours.alpha**2, theirs.double().numpy(), rtol=2e-4, atol=0)
    assert np.allclose(ours.alpha**2 + ours.sigma**2, 1, atol=1e-15)


def test_tables_work_for_tensors_too():
    alpha = torch.tensor([0.8, 0.6], dtype=torch.float64)
    a, b = TARGETS["flow"](alpha, (1 - alpha**2).sqrt()).clean(alpha, (1 - alpha**2).sqrt())
    assert a.shape == b.shape == (2,)


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="scaled_linear"):
        Schedule.from_betas("cosine", 0, 1, 10)
