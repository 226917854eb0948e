"""Noise schedules and prediction targets of discrete-time diffusion models.

A volume ``x0`` and noise ``eps`` mix into ``x = alpha_t x0 + sigma_t eps``. Networks predict some
combination ``y = p x0 + q eps`` of the two; one 2×2 solve turns ``x`` and ``y`` back into them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Schedule:
    """How much signal and noise there is at each training timestep.

    Parameters
    ----------
    alpha, sigma
        ``(T,)`` float64, ``alpha² + sigma² = 1``: square roots of the cumulated products of
        ``1 - beta`` and of what is left (Ho et al. 2020, eq. 4).

    Examples
    --------
    >>> schedule = Schedule.from_betas("scaled_linear", 0.0015, 0.0205, 1000)
    >>> round(float(schedule.alpha[999] ** 2), 6)
    9.7e-05
    """

    alpha: Table
    sigma: Table

    @classmethod
    def from_betas(cls, kind: str, start: float, end: float, steps: int) -> Schedule:
        """A schedule whose betas run from ``start`` to ``end``.

        Parameters
        ----------
        kind
            ``"linear"``, or ``"scaled_linear"`` where their square roots are evenly spaced.
        start, end
            First and last beta.
        steps
            Number of training timesteps ``T``.

        Raises
        ------
        ValueError
            ``kind`` is neither.
        """
        if kind not in ("linear", "scaled_linear"):
            raise ValueError(f"schedule must be 'linear' or 'scaled_linear', found {kind!r}")
        power = 2 if kind == "scaled_linear" else 1
        betas = np.linspace(start ** (1 / power), end ** (1 / power), steps) ** power
        log_signal = np.cumsum(np.log1p(-betas))
        return cls(np.exp(log_signal / 2), np.sqrt(-np.expm1(log_signal)))

    def __len__(self) -> int:
        return len(self.alpha)

    @property
    def log_snr(self) -> Table:
        """Half the logarithm of the signal-to-noise ratio, ``log(alpha / sigma)``."""
        return np.log(self.alpha / self.sigma)


class Target(NamedTuple):
    """What a network predicts, ``y = p x0 + q eps``, at one noise level.

    ``Estimate`` coefficients follow from it: see :meth:`clean` and :meth:`noise`.
    """

    p: Any
    q: Any

    def clean(self, alpha: Any, sigma: Any) -> tuple[Any, Any]:
        """Coefficients ``(a, b)`` of ``x0 = a x + b y``."""
        det = alpha * self.q - sigma * self.p
        return self.q / det, -sigma / det

    def noise(self, alpha: Any, sigma: Any) -> tuple[Any, Any]:
        """Coefficients ``(a, b)`` of ``eps = a x + b y``."""
        det = alpha * self.q - sigma * self.p
        return -self.p / det, alpha / det


TARGETS: dict[str, Callable[[Any, Any], Target]] = {
    "epsilon": lambda alpha, sigma: Target(0 * alpha, 1 + 0 * sigma),
    "sample": lambda alpha, sigma: Target(1 + 0 * alpha, 0 * sigma),
    "velocity": lambda alpha, sigma: Target(-sigma, alpha),
    "flow": lambda alpha, sigma: Target(-1 + 0 * alpha, 1 + 0 * sigma),
}
"""Targets by name, as functions of ``alpha`` and ``sigma``.

``epsilon`` (Ho et al. 2020), ``sample``, ``velocity`` (Salimans & Ho 2022), and ``flow``
(``eps - x0`` along the variance-preserving path, Remedios et al. 2025).
"""
