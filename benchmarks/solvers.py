"""How far few steps are from the exact solution, by solver and spacing of the steps.

    python benchmarks/solvers.py --out benchmarks/solvers.md --plot docs/images/solvers.png

Two denoisers on the published noise schedule and latent shape:

- *Gaussian*: the optimal denoiser of latents whose variances fall off as a power of their
  frequency, as those of natural images do. Its exact solution is known in closed form.
- *random network*: the published U-Net at reduced width with random weights, made to predict noise
  of unit size. It is rougher than a trained one. Reference: 1000 steps of Heun's method.

A distance is the root mean square difference from the exact solution from the same noise, over the
root mean square of the solution.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from generation.diffusion import TARGETS, Schedule
from generation.fast_unet import FastUNet
from generation.presets import load_preset
from generation.solvers import SOLVERS, Solution, integrate
from generation.testing import narrow, random_network

EVALUATIONS = (4, 6, 8, 10, 15, 20, 30, 50, 100)
METHODS = (
    ("ddim", "leading"),
    ("ddim", "trailing"),
    ("dpm++", "trailing"),
    ("dpm++", "logsnr"),
    ("unipc", "trailing"),
    ("unipc", "logsnr"),
    ("heun", "logsnr"),
)
SPEC = load_preset("ukb-ldm").schedule
SCHEDULE = Schedule.from_betas(SPEC.kind, SPEC.start, SPEC.end, SPEC.steps)

Predict = Callable[[torch.Tensor, int], torch.Tensor]


def solution_of(solver: str, spacing: str, evaluations: int) -> Solution:
    """The solver's table for a number of network evaluations: Heun needs two a step."""
    steps = (evaluations + 1) // 2 if solver == "heun" else evaluations
    return SOLVERS[solver](SCHEDULE, steps, spacing)


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def gaussian() -> tuple[
    Callable[[Solution], Predict], Callable[[Solution], torch.Tensor], torch.Tensor
]:
    """Denoiser, exact solution and starting noise of latents with a power-law spectrum."""
    start = torch.randn(3 * 20 * 28 * 20, generator=torch.Generator().manual_seed(0)).double()
    variance = torch.arange(1, len(start) + 1).double() ** -1.0
    variance /= variance.mean()

    def denoiser(solution: Solution) -> Predict:
        def predict(x: torch.Tensor, i: int) -> torch.Tensor:
            a, s = float(solution.alpha[i]), float(solution.sigma[i])
            return x * (a * variance / (a**2 * variance + s**2))

        return predict

    def exact(solution: Solution) -> torch.Tensor:
        # From the schedule's noisiest level, wherever the solver itself begins.
        a, s = float(SCHEDULE.alpha[-1]), float(SCHEDULE.sigma[-1])
        return start * (variance / (a**2 * variance + s**2)).sqrt()

    return denoiser, exact, start


def network() -> tuple[
    Callable[[Solution], Predict], Callable[[Solution], torch.Tensor], torch.Tensor
]:
    """The same for the random network, whose exact solution is approached by many steps."""
    preset = narrow("ukb-ldm")
    unet = random_network(preset, "unet")
    start = torch.randn((4, 3, 4, 8, 4), generator=torch.Generator().manual_seed(0))
    times = torch.full((4,), 500)
    maps = torch.full((4, 4, *start.shape[2:]), 0.5)
    context = torch.full((4, 1, 4), 0.5)
    size = unet(torch.cat([start, maps], 1), times, context=context).std()
    unet.out[2].conv.weight /= size
    unet.out[2].conv.bias /= size

    def denoiser(solution: Solution) -> Predict:
        times = solution.timesteps.tolist()
        fast = FastUNet(unet, times, constants=4, dtype=torch.float32)
        conditions = fast.condition(torch.full((4, 4), 0.5), start.shape[2:])
        clean = TARGETS["epsilon"](solution.alpha, solution.sigma)
        state, output = clean.clean(solution.alpha, solution.sigma)
        return lambda x, i: state[i] * x + output[i] * fast(x, fast.table[i], *conditions)

    reference = SOLVERS["heun"](SCHEDULE, 500, "logsnr")
    found = integrate(reference, denoiser(reference), start)
    return denoiser, lambda solution: found, start


def measure(problem) -> dict[tuple[str, str], list[float]]:
    denoiser, exact, start = problem
    found = {}
    for solver, spacing in METHODS:
        row = []
        for evaluations in EVALUATIONS:
            solution = solution_of(solver, spacing, evaluations)
            row.append(distance(integrate(solution, denoiser(solution), start), exact(solution)))
        found[solver, spacing] = row
    return found


def table(name: str, found: dict[tuple[str, str], list[float]]) -> list[str]:
    head = " | ".join(map(str, EVALUATIONS))
    lines = ["", f"## {name}", "", f"| solver, spacing | {head} |", "|---" * 10 + "|"]
    best = np.min(list(found.values()), axis=0)
    for (solver, spacing), row in found.items():
        cells = [f"**{v:.3f}**" if v == b else f"{v:.3f}" for v, b in zip(row, best, strict=True)]
        lines.append(f"| {solver}, {spacing} | {' | '.join(cells)} |")
    return lines


def plot(results: dict[str, dict[tuple[str, str], list[float]]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(10, 4), sharey=True, dpi=120)
    for axis, (name, found) in zip(axes, results.items(), strict=True):
        for (solver, spacing), row in found.items():
            axis.loglog(EVALUATIONS, row, marker="o", markersize=3, label=f"{solver}, {spacing}")
        axis.set(title=name, xlabel="network evaluations")
        axis.set_xticks(EVALUATIONS, map(str, EVALUATIONS))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("distance from the exact solution")
    axes[-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    problems = {"Gaussian": gaussian(), "random network": network()}
    results = {name: measure(problem) for name, problem in problems.items()}
    lines = [
        "# Few steps, honestly",
        "",
        "Made by `benchmarks/solvers.py`, whose first lines say what is measured. "
        f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores.",
        "Columns: network evaluations. Distances are relative; the best of a column is bold.",
    ]
    for name, found in results.items():
        lines += table(name, found)
    page = "\n".join(lines) + "\n"
    print(page)
    if options.out:
        options.out.write_text(page)
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
