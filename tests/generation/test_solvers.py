"""Solvers against independent implementations and against the exact answer."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from generation.diffusion import TARGETS, Schedule
from generation.solvers import SOLVERS, ddim, euler, integrate, timesteps

LDM = Schedule.from_betas("scaled_linear", 0.0015, 0.0205, 1000)
MEDFORJ = Schedule.from_betas("linear", 1e-4, 2e-2, 1000)
SIZE = (2, 3, 4, 5, 4)


def noise(seed=0, size=SIZE):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def curved(x, t):
    """Some smooth stand-in for a network's output, different at every timestep."""
    return torch.tanh(0.7 * x + 0.3 * math.sin(t / 150)) + 0.1 * x.roll(1, -1)


def solve(solution, target="epsilon", schedule=LDM, clip=None, network=curved, start=None):
    def predict(x, i):
        alpha, sigma = float(solution.alpha[i]), float(solution.sigma[i])
        a, b = TARGETS[target](alpha, sigma).clean(alpha, sigma)
        return a * x + b * network(x, int(solution.timesteps[i]))

    return integrate(solution, predict, noise() if start is None else start, clip=clip)


def monai_chain(prediction, steps, schedule, clip):
    """MONAI's DDIM scheduler, driven as the published samplers do, in float64."""
    from monai.networks.schedulers import DDIMScheduler

    kind, start, end = schedule
    scheduler = DDIMScheduler(
        1000, kind, clip_sample=clip, prediction_type=prediction, beta_start=start, beta_end=end
    )
    scheduler.set_timesteps(steps)
    power = 2 if kind == "scaled_linear_beta" else 1
    betas = torch.linspace(start ** (1 / power), end ** (1 / power), 1000, dtype=torch.float64)
    scheduler.alphas_cumprod = torch.cumprod(1 - betas**power, 0)
    x = noise()
    for t in range((steps - 1) * (1000 // steps), -1, -(1000 // steps)):
        x, _ = scheduler.step(curved(x, t), t, x)
    return x


class TestPublishedSamplers:
    def test_ldm_chain_equals_monai(self):
        ours = solve(ddim(LDM, 50, "leading"))
        theirs = monai_chain("epsilon", 50, ("scaled_linear_beta", 0.0015, 0.0205), clip=False)
        assert (ours - theirs).abs().max() < 1e-12 * theirs.abs().max()

    @pytest.mark.parametrize(
        ("target", "prediction"),
        [("epsilon", "epsilon"), ("sample", "sample"), ("velocity", "v_prediction")],
    )
    def test_medforj_chain_equals_monai_with_clipping(self, target, prediction):
        ours = solve(ddim(MEDFORJ, 64, "leading"), target, clip=(-1, 1))
        theirs = monai_chain(prediction, 64, ("linear_beta", 1e-4, 2e-2), clip=True)
        assert (ours - theirs).abs().max() < 1e-12 * theirs.abs().max()

    def test_medforj_flow_equals_its_formulas(self):
        """x0 = (x - sqrt(1-a) u) / (sqrt(a) + sqrt(1-a)), eps likewise, clipped, then DDIM."""
        x, betas = noise(), np.linspace(1e-4, 2e-2, 1000)
        signal = np.cumprod(1 - betas)
        for t in range(945, -1, -15):
            a, before = signal[t], signal[t - 15] if t >= 15 else 1.0
            root, rest = math.sqrt(a), math.sqrt(1 - a)
            u = curved(x, t)
            x0, eps = (x - rest * u) / (root + rest), (x + root * u) / (root + rest)
            x = math.sqrt(before) * x0.clamp(-1, 1) + math.sqrt(1 - before) * eps
        ours = solve(ddim(MEDFORJ, 64, "leading"), "flow", clip=(-1, 1))
        assert (ours - x).abs().max() < 1e-12

    def test_leading_timesteps_are_the_published_ones(self):
        assert timesteps(LDM, 50, "leading").tolist() == list(range(980, -1, -20))
        assert timesteps(MEDFORJ, 64, "leading").tolist() == list(range(945, -1, -15))


def diffusers_chain(name, steps, spacing):
    import diffusers

    scheduler = getattr(diffusers, name)(
        num_train_timesteps=1000,
        trained_betas=(np.linspace(0.0015**0.5, 0.0205**0.5, 1000) ** 2).tolist(),
        timestep_spacing=spacing,
        final_sigmas_type="zero",
        solver_order=2,
        **({"solver_type": "midpoint"} if name.startswith("DPM") else {"solver_type": "bh2"}),
    )
    scheduler.set_timesteps(steps)
    x = noise()
    for t in scheduler.timesteps:
        x = scheduler.step(curved(x, int(t)), t, x).prev_sample
    return x, scheduler.timesteps.tolist()


@pytest.mark.parametrize("steps", [1, 2, 4, 10, 20, 50])
@pytest.mark.parametrize(
    ("solver", "peer"),
    [("dpm++", "DPMSolverMultistepScheduler"), ("unipc", "UniPCMultistepScheduler")],
)
def test_multistep_solvers_equal_diffusers(solver, peer, steps):
    theirs, times = diffusers_chain(peer, steps, "trailing")
    solution = SOLVERS[solver](LDM, steps, "trailing")
    assert solution.timesteps.tolist() == times
    ours = solve(solution)
    # the peer keeps its noise levels in float32
    assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max()


def test_euler_is_ddim():
    one, other = euler(LDM, 12, "trailing"), ddim(LDM, 12, "trailing")
    assert np.allclose(one.keep, other.keep)
    assert np.allclose(one.carry, other.carry)


class TestOrder:
    """On a distribution whose denoiser is known, errors fall as the solver's order says."""

    @staticmethod
    def gaussian_error(solver, steps, spread=0.5):
        """Volumes are N(0, spread²): the exact flow only scales the noise."""
        solution = SOLVERS[solver](LDM, steps, "logsnr")

        def predict(x, i):
            a, s = float(solution.alpha[i]), float(solution.sigma[i])
            return x * a * spread**2 / (a**2 * spread**2 + s**2)

        start = noise()
        a, s = float(solution.alpha[0]), float(solution.sigma[0])
        exact = start * spread / math.sqrt(a**2 * spread**2 + s**2)
        return float((integrate(solution, predict, start) - exact).abs().max())

    @pytest.mark.parametrize("solver", ["dpm++", "unipc", "heun"])
    def test_second_order_solvers_beat_ddim(self, solver):
        assert self.gaussian_error(solver, 20) < 0.4 * self.gaussian_error("ddim", 20)

    @pytest.mark.parametrize("solver", ["ddim", "dpm++", "unipc", "heun"])
    def test_errors_fall_with_steps(self, solver):
        assert self.gaussian_error(solver, 32) < self.gaussian_error(solver, 4) / 5

    @pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "ddpm"])
    @pytest.mark.parametrize("spacing", ["leading", "trailing", "logsnr"])
    def test_a_known_volume_is_found(self, solver, spacing):
        """If the network always predicts the same volume, that volume comes out."""
        solution = SOLVERS[solver](LDM, 7, spacing)
        volume = noise(5)
        found = integrate(solution, lambda x, i: volume, noise())
        assert (found - volume).abs().max() < 1e-12


class TestNoise:
    def test_ddpm_keeps_the_spread_of_a_gaussian(self):
        solution = SOLVERS["ddpm"](LDM, 1000, "leading")
        source = torch.Generator().manual_seed(3)
        spread = 0.5

        def predict(x, i):
            a, s = float(solution.alpha[i]), float(solution.sigma[i])
            return x * a * spread**2 / (a**2 * spread**2 + s**2)

        start = torch.randn(20_000, generator=source)
        found = integrate(
            solution, predict, start, noise=lambda: torch.randn(20_000, generator=source)
        )
        assert abs(float(found.std()) - spread) < 0.02

    def test_ddpm_equals_monai(self):
        from monai.networks.schedulers import DDPMScheduler

        scheduler = DDPMScheduler(
            1000, "scaled_linear_beta", clip_sample=True, beta_start=0.0015, beta_end=0.0205
        )
        draws = [torch.randn(SIZE, generator=torch.Generator().manual_seed(i)) for i in range(1000)]
        x, source = noise().float(), iter(draws)
        for t in range(999, -1, -1):
            mean, _ = scheduler.step(curved(x, t), t, x, generator=torch.Generator().manual_seed(0))
            again = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
            spread = float(scheduler._get_variance(t)) ** 0.5 if t > 0 else 0.0
            x = mean - spread * again + (spread * next(source) if t > 0 else 0)
        solution, source = SOLVERS["ddpm"](LDM, 1000, "leading"), iter(draws)

        def predict(y, i):
            alpha, sigma = float(solution.alpha[i]), float(solution.sigma[i])
            a, b = TARGETS["epsilon"](alpha, sigma).clean(alpha, sigma)
            return a * y + b * curved(y, int(solution.timesteps[i]))

        ours = integrate(
            solution, predict, noise().float(), clip=(-1, 1), noise=lambda: next(source)
        )
        assert (ours - x).abs().max() < 2e-3

    def test_a_noisy_solver_needs_noise(self):
        with pytest.raises(ValueError, match="pass noise="):
            solve(SOLVERS["ddpm"](LDM, 4, "trailing"))


@given(
    steps=st.integers(1, 1000),
    spacing=st.sampled_from(["leading", "trailing", "logsnr"]),
    schedule=st.sampled_from([LDM, MEDFORJ]),
)
def test_timesteps_descend_and_are_distinct(steps, spacing, schedule):
    times = timesteps(schedule, steps, spacing)
    assert len(times) == steps
    assert (np.diff(times) < 0).all()
    assert 0 <= times[-1] <= times[0] < 1000
    if spacing != "leading":
        assert times[0] == 999


@pytest.mark.parametrize(("steps", "spacing"), [(0, "leading"), (1001, "trailing"), (5, "cosine")])
def test_impossible_timesteps_are_refused(steps, spacing):
    with pytest.raises(ValueError, match="must"):
        timesteps(LDM, steps, spacing)


def test_callback_sees_every_evaluation():
    seen = []
    integrate(
        ddim(LDM, 5, "trailing"),
        lambda x, i: 0 * x,
        noise(),
        callback=lambda i, clean: seen.append((i, tuple(clean.shape))),
    )
    assert seen == [(i, SIZE) for i in range(5)]
