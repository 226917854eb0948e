"""How to sample: solver, steps, precision, device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from generation.diffusion import Schedule
from generation.presets import Preset
from generation.solvers import SOLVERS, Solution

BATCH_ON_GPU = 8
SPACINGS = {"ddim": "trailing", "ddpm": "trailing", "euler": "trailing"}
"""Spacing a solver takes unless told otherwise; the others take ``"logsnr"``."""


DTYPES = ("auto", "float32", "bfloat16", "float64")


@dataclass(frozen=True)
class Options:
    """How to sample.

    Parameters
    ----------
    solver, steps, spacing
        As in :mod:`generation.solvers`; the solver's favourite spacing by default.
    dtype
        ``"float32"``, ``"bfloat16"``, ``"float64"``, or ``"auto"``: bfloat16 where the device
        multiplies it natively.
    device
        Where; the first GPU by default, else the CPU.
    rewrite
        Use the exact rewrites of :mod:`generation.rewrites`; without them MONAI's own modules run.
    compile
        Pass the network through :func:`torch.compile`.
    graphs
        Replay each step as a CUDA graph; ignored without a GPU.
    batch_size
        Rows the network sees at once: 8 on a GPU by default, and 1 on a CPU, where more gain
        little and kernels chosen by batch size would change the last bits.
    """

    solver: str = "unipc"
    steps: int = 20
    spacing: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    device: str | None = None
    rewrite: bool = True
    compile: bool = False
    graphs: bool = True
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}; found {self.solver!r}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, found {self.steps}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; found {self.dtype!r}")
        find_device(self.device)

    @classmethod
    def published(cls, preset: Preset, **others: Any) -> Options:
        """The sampler, precision and modules of the published code."""
        spec = preset.sampler
        given = {"dtype": "float32", "rewrite": False, "graphs": False, **others}
        return cls(solver=spec.solver, steps=spec.steps, spacing=spec.spacing, **given)

    @property
    def place(self) -> torch.device:
        """The device."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def type(self) -> torch.dtype:
        """The type the network computes in."""
        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        return torch.bfloat16 if _has_native_bfloat16(self.place) else torch.float32

    @property
    def rows(self) -> int:
        """Rows the network sees at once."""
        return self.batch_size or (BATCH_ON_GPU if self.place.type == "cuda" else 1)

    def solution(self, preset: Preset) -> Solution:
        """The solver's coefficients for a preset's noise schedule."""
        spec = preset.schedule
        schedule = Schedule.from_betas(spec.kind, spec.start, spec.end, spec.steps)
        spacing = self.spacing or SPACINGS.get(self.solver, "logsnr")
        return SOLVERS[self.solver](schedule, self.steps, spacing)

    def words(self) -> dict[str, str]:
        """What changes the samples, as text."""
        spacing = self.spacing or SPACINGS.get(self.solver, "logsnr")
        return {
            "solver": self.solver,
            "steps": str(self.steps),
            "spacing": spacing,
            "dtype": str(self.type).removeprefix("torch."),
        }


def find_device(name: str | None = None) -> torch.device:
    """A device by its name; the first GPU by default, else the CPU.

    Raises
    ------
    ValueError
        There is none of that name here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; expected cpu, cuda or cuda:1") from None
    there = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= there:
        raise ValueError(f"device {name!r} needs a GPU, and PyTorch sees {there or 'none'} here")
    return device


def _has_native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Emulated on other processors, where float32 is faster.
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
