"""Volumes of the published size on a GPU: the published path, ours, and each lever on its own.

    python benchmarks/generation_gpu.py --out benchmarks/generation_gpu.md --json gpu.json

Full published width, random weights; plain PyTorch and MONAI. A chain takes its steps' time plus
one decode; both are timed after warming up, with the device synchronised. ``--narrow --device cpu``
runs everything in seconds, to see that the script works.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from generation.engine import peak_bytes, prepare, synchronise
from generation.fast_unet import FastUNet
from generation.latent import LatentDiffusion
from generation.options import Options
from generation.presets import load_preset
from generation.testing import RandomWeights, narrow

STEPS = (50, 20, 10, 4)
LEVERS: dict[str, dict[str, Any]] = {
    "published: MONAI's modules, float32": {"dtype": "float32", "rewrite": False, "graphs": False},
    "MONAI's modules, bfloat16": {"dtype": "bfloat16", "rewrite": False, "graphs": False},
    "rewritten, float32": {"dtype": "float32", "graphs": False},
    "rewritten, bfloat16": {"dtype": "bfloat16", "graphs": False},
    "+ CUDA graphs": {"dtype": "bfloat16", "graphs": True},
    "+ compiled": {"dtype": "bfloat16", "graphs": False, "compile": True},
    "+ both": {"dtype": "bfloat16", "graphs": True, "compile": True},
}


def timed(call: Callable[[], Any], device: torch.device, calls: int = 5) -> float:
    """Median seconds of a call, after two to warm up."""
    seconds = []
    for number in range(calls + 2):
        synchronise(device)
        began = time.perf_counter()
        call()
        synchronise(device)
        if number >= 2:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def matmul_peak(device: torch.device, size: int) -> float:
    """Dense bfloat16 operations a second, measured."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / timed(lambda: a @ b, device)


def launches(call: Callable[[], Any], device: torch.device) -> int:
    """Kernels one call starts (operators on a CPU)."""
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CPU] + ([activity.CUDA] if device.type == "cuda" else [])
    with torch.profiler.profile(activities=kinds) as profile:
        call()
        synchronise(device)
    if device.type == "cuda":
        on_device = torch.autograd.DeviceType.CUDA
        return sum(event.device_type == on_device for event in profile.events())
    return len(profile.events())


class Bench:
    """One system, and the ways to run it."""

    def __init__(self, device: torch.device, small: bool) -> None:
        self.device = device
        self.preset = narrow("ukb-ldm") if small else load_preset("ukb-ldm")
        self.weights = RandomWeights(self.preset)
        self._known = 0
        self.peak = matmul_peak(device, 256 if small else 8192)

    def step(self, batch: int, **how: Any) -> dict[str, float]:
        """One step of a batch: seconds, operations, memory and launches."""
        options = Options("ddim", 50, device=str(self.device), **how)
        unet = self.weights.network("unet")
        denoiser = prepare(unet, self.preset, "epsilon", options, constants=4)
        del unet
        shape = self.preset.latent_shape
        x = torch.randn((batch, *shape), device=self.device)
        values = torch.full((batch, 4), 0.5, device=self.device)
        conditions = denoiser.network.condition(values, shape[1:])
        return self._measured(lambda: denoiser(x, 0, conditions))

    def count(self, batch: int) -> None:
        """Take note of the operations of a batch of the rewritten network."""
        shape = self.preset.latent_shape
        with torch.device("meta"):
            x = torch.empty((batch, *shape))
            fast = FastUNet(self.preset.build("unet"), [500], constants=4, dtype=torch.float32)
            conditions = fast.condition(torch.empty((batch, 4)), shape[1:])
            with FlopCounterMode(display=False) as counter:
                fast(x, fast.table[0], *conditions)
        self._known = counter.get_total_flops()

    def _operations(self, call: Callable[[], Any]) -> float:
        """Of one call; replayed and compiled ones hide theirs, so the last known count stands."""
        with FlopCounterMode(display=False) as counter:
            call()
        self._known = counter.get_total_flops() or self._known
        return self._known

    def decode(self, mode: str, **how: Any) -> dict[str, float]:
        """One decode."""
        how = {key: value for key, value in how.items() if key not in ("graphs", "compile")}
        options = Options(device=str(self.device), **how)
        ldm = LatentDiffusion(self.weights, options, decode=mode)
        latent = torch.randn((1, *self.preset.latent_shape), device=self.device)
        return self._measured(lambda: ldm.decode(latent))

    def _measured(self, call: Callable[[], Any]) -> dict[str, float]:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds = timed(call, self.device)
        return {
            "seconds": seconds,
            "flop": self._operations(call),
            "gb": peak_bytes(self.device) / 1e9,
            "launches": launches(call, self.device),
        }


def measure(bench: Bench, batches: list[int]) -> dict[str, Any]:
    """Everything the page shows; a way that fails is recorded with its error."""
    found: dict[str, Any] = {"levers": {}, "batches": {}, "decode": {}}
    for name, how in LEVERS.items():
        found["levers"][name] = attempt(bench.step, 1, **how)
    ours = best_lever(found["levers"])
    found["ours"] = ours
    for batch in batches:
        bench.count(batch)
        found["batches"][batch] = attempt(bench.step, batch, **LEVERS[ours])
    first = next(iter(LEVERS.values()))
    found["decode"]["published"] = attempt(bench.decode, "whole", **first)
    found["decode"]["whole"] = attempt(bench.decode, "whole", dtype="bfloat16")
    found["decode"]["slabs"] = attempt(bench.decode, "slabs", dtype="bfloat16")
    return found


def attempt(call: Callable[..., dict[str, float]], *args: Any, **options: Any) -> dict[str, Any]:
    try:
        return call(*args, **options)
    except Exception as error:  # a lever may not exist on this machine
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:120]}


def best_lever(levers: dict[str, dict[str, Any]]) -> str:
    """The fastest of the rewritten ones."""
    good = {name: v for name, v in levers.items() if "error" not in v and "MONAI" not in name}
    return min(good, key=lambda name: good[name]["seconds"])


def page(bench: Bench, found: dict[str, Any]) -> str:
    """The tables."""
    import monai

    name = (
        torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "CPU, narrow"
    )
    first = found["levers"][next(iter(LEVERS))]
    lines = [
        "# Generation on a GPU",
        "",
        f"Made by `benchmarks/generation_gpu.py` on {name}: torch {torch.__version__}, MONAI "
        f"{monai.__version__}, Python {platform.python_version()}. Measured bf16 matmul peak "
        f"{bench.peak / 1e12:.3g} TFLOP/s.",
        "",
        "| one step, batch 1 | ms | × published | share of peak | peak GB | launches |",
        "|---|---|---|---|---|---|",
    ]
    for lever, entry in found["levers"].items():
        lines.append(f"| {lever} | {cells(bench, entry, first)} |")
    lines += ["", f"| {found['ours']}, batch | ms a volume | × published | share | GB | launches |"]
    lines += ["|---|---|---|---|---|---|"]
    for batch, entry in found["batches"].items():
        lines.append(f"| {batch} | {cells(bench, entry, first, int(batch))} |")
    lines += ["", "| decode | ms | × published | share of peak | peak GB | launches |"]
    lines += ["|---|---|---|---|---|---|"]
    for mode, entry in found["decode"].items():
        lines.append(f"| {mode} | {cells(bench, entry, found['decode']['published'])} |")
    return "\n".join([*lines, "", *volumes(found)]) + "\n"


def cells(bench: Bench, entry: dict[str, Any], first: dict[str, Any], batch: int = 1) -> str:
    if "error" in entry:
        return f"{entry['error']} | | | | "
    seconds = entry["seconds"] / batch
    share = entry["flop"] / entry["seconds"] / bench.peak
    gain = f"{first['seconds'] / seconds:.1f}" if "error" not in first else ""
    numbers = (f"{1e3 * seconds:.2f}", gain, f"{share:.0%}", f"{entry['gb']:.1f}")
    return " | ".join([*numbers, str(entry["launches"])])


def volumes(found: dict[str, Any]) -> list[str]:
    """Milliseconds of whole volumes."""
    good = {int(b): v for b, v in found["batches"].items() if "error" not in v}
    best = min(good, key=lambda b: good[b]["seconds"] / b)
    published = found["levers"][next(iter(LEVERS))], found["decode"]["published"]
    lines = ["| ms a volume | batch 1 | best batch | × published, best |", "|---|---|---|---|"]
    for steps in STEPS:
        decode = found["decode"]["whole"]["seconds"]
        one, many = (steps * good[b]["seconds"] / b + decode for b in (min(good), best))
        base = sum(("error" in part) for part in published)
        ratio = ""
        if not base:
            ratio = f"{(steps * published[0]['seconds'] + published[1]['seconds']) / many:.1f}"
        lines.append(f"| {steps} steps | {1e3 * one:.0f} | {1e3 * many:.0f} ({best}) | {ratio} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--narrow", action="store_true", help="few channels: only to try it")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with torch.inference_mode():
        bench = Bench(torch.device(options.device), options.narrow)
        found = measure(bench, options.batches)
    text = page(bench, found)
    print(text)
    if options.out:
        options.out.write_text(text)
    if options.json:
        options.json.write_text(json.dumps({"peak": bench.peak, **found}, indent=2))


if __name__ == "__main__":
    main()
