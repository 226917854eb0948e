"""Solvers of the reverse diffusion as tables of coefficients, and the one loop that runs them.

Every solver here is linear in what it has seen: the current state and the last few predictions of
the clean volume. So each is a table of float64 coefficients, built once on the host from the noise
schedule; the loop only multiplies and adds, and never asks a device for a number.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from generation.diffusion import Schedule, Table

if TYPE_CHECKING:
    import torch

DEPTH = 3
"""Predictions a table looks back on, the newest first."""


@dataclass(frozen=True, eq=False)
class Solution:
    """A solver, made concrete for one schedule and step count.

    With ``x`` the anchor, ``y`` the point where the network is asked and ``m`` its predictions of
    the clean volume, newest first, evaluation ``i`` is followed by::

        x = keep[i] x + sum_j carry[i, j] m[j]
        y = base[i] x + sum_j push[i, j] m[j]

    and, in solvers without a ``push``, both take another
    ``excess[i] (unclipped m - m) + noise[i] N(0, 1)``.

    Parameters
    ----------
    timesteps
        ``(n,)`` int64: where in the schedule each evaluation happens.
    alpha, sigma
        ``(n,)`` signal and noise there.
    keep, carry, base, push, excess, noise
        ``(n,)`` and ``(n, 3)`` coefficients.
    """

    timesteps: NDArray[np.int64]
    alpha: Table
    sigma: Table
    keep: Table
    carry: Table
    base: Table
    push: Table
    excess: Table
    noise: Table

    def __len__(self) -> int:
        """Number of times the network is evaluated."""
        return len(self.timesteps)


class _Builder:
    """Collects a :class:`Solution` one evaluation after the other."""

    def __init__(self) -> None:
        self.points: list[_Point] = []
        self.rows: list[tuple[float, list[float], float, list[float], float, float]] = []

    def add(
        self,
        at: _Point,
        *,
        keep: float,
        carry: tuple[float, ...] = (),
        base: float = 1.0,
        push: tuple[float, ...] = (),
        excess: float = 0.0,
        noise: float = 0.0,
    ) -> None:
        self.points.append(at)
        self.rows.append((keep, _padded(carry), base, _padded(push), excess, noise))

    def build(self) -> Solution:
        keep, carry, base, push, excess, noise = (
            np.array(column, np.float64) for column in zip(*self.rows, strict=True)
        )
        return Solution(
            timesteps=np.array([point.t for point in self.points]),
            alpha=np.array([point.alpha for point in self.points]),
            sigma=np.array([point.sigma for point in self.points]),
            keep=keep,
            carry=carry,
            base=base,
            push=push,
            excess=excess,
            noise=noise,
        )


@dataclass(frozen=True)
class _Point:
    """A place on the path from noise to volume; ``t`` is -1 at the volume itself."""

    t: int
    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        return math.inf if self.sigma == 0 else math.log(self.alpha / self.sigma)


def integrate(
    solution: Solution,
    predict: Callable[[torch.Tensor, int], torch.Tensor],
    start: torch.Tensor,
    *,
    clip: tuple[float, float] | None = None,
    noise: Callable[[], torch.Tensor] | None = None,
    callback: Callable[[int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Run a solver from noise to volumes.

    Parameters
    ----------
    solution
        The solver's coefficients.
    predict
        Given the current point ``(n, ...)`` and the number of the evaluation, the predicted clean
        volumes, of the same shape.
    start
        ``(n, ...)`` standard normal noise.
    clip
        Bounds predictions are clipped to.
    noise
        Fresh standard normal noise, for solvers that add some.
    callback
        Called with the number of each evaluation and its (clipped) prediction.

    Returns
    -------
    torch.Tensor
        ``(n, ...)``, of the type of ``start``.

    Raises
    ------
    ValueError
        The solver adds noise and there is no source of it.
    """
    if noise is None and solution.noise.any():
        raise ValueError("this solver adds noise at every step: pass noise=")
    anchor = point = start
    seen: deque[torch.Tensor] = deque(maxlen=DEPTH)
    for i in range(len(solution)):
        raw = predict(point, i)
        seen.appendleft(raw if clip is None else raw.clamp(*clip))
        if callback is not None:
            callback(i, seen[0])
        anchor = _combined(anchor, solution.keep[i], seen, solution.carry[i])
        point = _combined(anchor, solution.base[i], seen, solution.push[i])
        if clip is not None and solution.excess[i]:
            point = anchor = point + float(solution.excess[i]) * (raw - seen[0])
        if noise is not None and solution.noise[i]:
            point = anchor = point + float(solution.noise[i]) * noise()
    return point


def _combined(
    state: torch.Tensor, weight: float, seen: deque[torch.Tensor], weights: Table
) -> torch.Tensor:
    """``weight * state + sum(weights * seen)``, skipping what is zero."""
    total = state if weight == 1 else state * float(weight)
    for prediction, factor in zip(seen, weights, strict=False):
        if factor:
            total = total.add(prediction, alpha=float(factor))
    return total


def timesteps(schedule: Schedule, steps: int, spacing: str) -> NDArray[np.int64]:
    """Where in a schedule to evaluate, from noise to volume.

    Parameters
    ----------
    schedule
        Noise schedule of ``T`` timesteps.
    steps
        How many.
    spacing
        ``"leading"``: multiples of ``T // steps``, as the published samplers do; the first lies
        well below ``T``. ``"trailing"``: evenly spaced and ending at ``T - 1`` (Lin et al. 2024).
        ``"logsnr"``: evenly spaced in the logarithm of the signal-to-noise ratio (Lu et al.
        2022), rounded to timesteps the network was trained on.

    Returns
    -------
    numpy.ndarray
        ``(steps,)`` int64, descending and distinct.

    Raises
    ------
    ValueError
        Unknown spacing, or more steps than it has distinct timesteps for.
    """
    total = len(schedule)
    if not 1 <= steps <= total:
        raise ValueError(f"steps must lie between 1 and {total}, found {steps}")
    if spacing == "leading":
        return np.arange(steps)[::-1] * (total // steps)
    if spacing == "trailing":
        return np.round(total - np.arange(steps) * (total / steps)).astype(np.int64) - 1
    if spacing == "logsnr":
        return _even_in_log_snr(schedule, steps)
    raise ValueError(f"spacing must be 'leading', 'trailing' or 'logsnr', found {spacing!r}")


def _even_in_log_snr(schedule: Schedule, steps: int) -> NDArray[np.int64]:
    levels = schedule.log_snr[::-1]
    wanted = np.linspace(levels[0], levels[-1], steps)
    times = np.round(np.interp(wanted, levels, np.arange(len(levels))[::-1])).astype(np.int64)
    # Rounding may merge neighbours: move each to the next timestep that is free.
    for i in range(1, steps):
        times[i] = min(times[i], times[i - 1] - 1)
    for i in range(steps - 1, -1, -1):
        times[i] = max(times[i], steps - 1 - i)
    return times


def ddim(schedule: Schedule, steps: int, spacing: str, *, eta: float = 0.0) -> Solution:
    """DDIM (Song et al. 2021, eq. 12 and 16); ``eta`` 0 is deterministic, 1 as noisy as DDPM.

    Where predictions are clipped, the noise direction keeps the unclipped prediction, as MONAI's
    scheduler does.
    """
    return _ancestral(schedule, steps, spacing, eta, from_clipped=False)


def ddpm(schedule: Schedule, steps: int, spacing: str) -> Solution:
    """Ancestral sampling (Ho et al. 2020, Algorithm 2) with the smaller variance, respaced."""
    return _ancestral(schedule, steps, spacing, 1.0, from_clipped=True)


def _ancestral(
    schedule: Schedule, steps: int, spacing: str, eta: float, *, from_clipped: bool
) -> Solution:
    table = _Builder()
    for at, to in _pairs(schedule, steps, spacing):
        spread = eta * to.sigma / at.sigma * math.sqrt(max(0.0, 1 - (at.alpha / to.alpha) ** 2))
        toward_noise = math.sqrt(max(0.0, to.sigma**2 - spread**2)) / at.sigma
        excess = 0.0 if from_clipped else -toward_noise * at.alpha
        clean = to.alpha - toward_noise * at.alpha
        table.add(at, keep=toward_noise, carry=(clean,), excess=excess, noise=spread)
    return table.build()


def euler(schedule: Schedule, steps: int, spacing: str) -> Solution:
    """Euler steps in the noise-to-signal ratio (Karras et al. 2022); the same table as DDIM's."""
    table = _Builder()
    for at, to in _pairs(schedule, steps, spacing):
        table.add(at, keep=_ratio(at, to), carry=(_gain(at, to),))
    return table.build()


def heun(schedule: Schedule, steps: int, spacing: str) -> Solution:
    """Heun's second-order steps (Karras et al. 2022, Algorithm 1): ``2 steps - 1`` evaluations."""
    table = _Builder()
    for at, to in _pairs(schedule, steps, spacing):
        if to.sigma == 0:
            table.add(at, keep=_ratio(at, to), carry=(_gain(at, to),))
            continue
        table.add(at, keep=1.0, base=_ratio(at, to), push=(_gain(at, to),))
        # In x / alpha, with r the ratio of noise-to-signal: mean of the slopes at both ends.
        r = (to.sigma / to.alpha) / (at.sigma / at.alpha)
        half = (r - 1) / 2
        keep = to.alpha / at.alpha * r
        old, new = to.alpha * (-half + half * (1 - r) / r), -to.alpha * half / r
        table.add(to, keep=keep, carry=(new, old))
    return table.build()


def dpm_solver_pp(schedule: Schedule, steps: int, spacing: str) -> Solution:
    """DPM-Solver++(2M), midpoint (Lu et al. 2022, Algorithm 2); the last step is first order."""
    table, before = _Builder(), None
    for at, to in _pairs(schedule, steps, spacing):
        keep, gain = _ratio(at, to), _gain(at, to)
        if before is None or to.sigma == 0:
            table.add(at, keep=keep, carry=(gain,))
        else:
            r = (at.log_snr - before.log_snr) / (to.log_snr - at.log_snr)
            slope = gain / (2 * r)
            table.add(at, keep=keep, carry=(gain + slope, -slope))
        before = at
    return table.build()


def unipc(schedule: Schedule, steps: int, spacing: str) -> Solution:
    """UniPC of order 2, B2(h), on predictions of the clean volume (Zhao et al. 2023)."""
    table, path = _Builder(), _path(schedule, steps, spacing)
    for i, (at, to) in enumerate(_pairs(schedule, steps, spacing)):
        keep, carry = (1.0, ()) if i == 0 else _unipc_correct(path, i)
        slope = 0.0
        if i > 0 and to.sigma > 0:
            r = (path[i - 1].log_snr - at.log_snr) / (to.log_snr - at.log_snr)
            slope = -_gain(at, to) / (2 * r)
        push = (_gain(at, to) + slope, -slope)
        table.add(at, keep=keep, carry=carry, base=_ratio(at, to), push=push)
    return table.build()


def _unipc_correct(path: list[_Point], i: int) -> tuple[float, tuple[float, ...]]:
    """Coefficients that go from point ``i - 1`` to ``i`` again, now that ``i`` has been seen."""
    at, to = path[i - 1], path[i]
    ratio, gain = _ratio(at, to), _gain(at, to)
    if i == 1:
        return ratio, (gain / 2, gain / 2)
    h = at.log_snr - to.log_snr
    growth = math.expm1(h)
    first = 1 / h - 1 / growth
    second = 2 * (first / h - 1 / (2 * growth))
    r = (at.log_snr - path[i - 2].log_snr) / h
    older, newer = np.linalg.solve([[1.0, 1.0], [r, 1.0]], [first, second])
    new, old = gain * float(newer), gain * float(older) / r
    return ratio, (new, gain - new - old, old)


SOLVERS: dict[str, Callable[[Schedule, int, str], Solution]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "dpm++": dpm_solver_pp,
    "unipc": unipc,
    "euler": euler,
    "heun": heun,
}
"""Solvers by the names users type."""


def _ratio(at: _Point, to: _Point) -> float:
    return to.sigma / at.sigma


def _gain(at: _Point, to: _Point) -> float:
    """Weight of the clean volume in an exact step for a constant prediction."""
    return to.alpha - to.sigma * at.alpha / at.sigma


def _path(schedule: Schedule, steps: int, spacing: str) -> list[_Point]:
    times = timesteps(schedule, steps, spacing).tolist()
    points = [_Point(t, float(schedule.alpha[t]), float(schedule.sigma[t])) for t in times]
    return [*points, _Point(-1, 1.0, 0.0)]


def _pairs(schedule: Schedule, steps: int, spacing: str) -> list[tuple[_Point, _Point]]:
    path = _path(schedule, steps, spacing)
    return list(itertools.pairwise(path))


def _padded(values: tuple[float, ...]) -> list[float]:
    return [*values, *(0.0,) * (DEPTH - len(values))]
