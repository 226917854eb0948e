"""One published-size volume on a CPU: the published path against ours, side by side in one run.

    python benchmarks/generation_cpu.py --out benchmarks/generation_cpu.md

Networks have the full published width and random weights, which cost what the trained ones cost.
Each case runs in a process of its own, all cases in turn, ``--repeats`` times; the table shows
medians. Steps are timed one by one: a chain of N takes N times the step, plus one decode.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

CASES = {
    "published step": {"kind": "step", "dtype": "float32", "rewrite": False},
    "rewritten step, float32": {"kind": "step", "dtype": "float32", "rewrite": True},
    "rewritten step, bfloat16": {"kind": "step", "dtype": "bfloat16", "rewrite": True},
    "published decode": {"kind": "decode", "dtype": "float32", "rewrite": False},
    "whole decode, float32": {"kind": "decode", "dtype": "float32", "mode": "whole"},
    "slab decode, float32": {"kind": "decode", "dtype": "float32", "mode": "slabs"},
    "whole decode, bfloat16": {"kind": "decode", "dtype": "bfloat16", "mode": "whole"},
    "slab decode, bfloat16": {"kind": "decode", "dtype": "bfloat16", "mode": "slabs"},
}


def measure(kind: str, dtype: str, rewrite: bool = True, mode: str = "whole", calls: int = 3):
    """Seconds of each call after a first one, and the process's peak of memory in GB."""
    import torch

    from generation.engine import peak_bytes, prepare
    from generation.latent import LatentDiffusion
    from generation.options import Options
    from generation.presets import load_preset
    from generation.testing import RandomWeights

    preset = load_preset("ukb-ldm")
    weights = RandomWeights(preset)
    options = Options("ddim", 50, "leading", dtype=dtype, rewrite=rewrite, device="cpu")
    latent = torch.randn((1, *preset.latent_shape), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        if kind == "step":
            unet = weights.network("unet")
            denoiser = prepare(unet, preset, "epsilon", options, constants=4)
            conditions = denoiser.network.condition(torch.full((1, 4), 0.5), latent.shape[2:])
            call = lambda: denoiser(latent, 0, conditions)  # noqa: E731
        else:
            ldm = LatentDiffusion(weights, options, decode=mode)
            call = lambda: ldm.decode(latent)  # noqa: E731
            calls = 1
        call()
        seconds = []
        for _ in range(calls):
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
    return {"seconds": statistics.median(seconds), "gb": peak_bytes(torch.device("cpu")) / 1e9}


def precision():
    """What bfloat16 costs, in one step and in the decoded volume, for the same weights."""
    import math

    import torch

    from generation.engine import prepare
    from generation.latent import LatentDiffusion
    from generation.options import Options
    from generation.presets import load_preset
    from generation.testing import RandomWeights

    preset = load_preset("ukb-ldm")
    weights = RandomWeights(preset)
    latent = torch.randn((1, *preset.latent_shape), generator=torch.Generator().manual_seed(0))
    outputs, volumes = {}, {}
    unet = weights.network("unet")
    with torch.inference_mode():
        for dtype, rewrite in (("float32", False), ("float32", True), ("bfloat16", True)):
            options = Options("ddim", 50, "leading", dtype=dtype, rewrite=rewrite, device="cpu")
            network = prepare(unet, preset, "epsilon", options, constants=4).network
            conditions = network.condition(torch.full((1, 4), 0.5), latent.shape[2:])
            outputs[dtype, rewrite] = network(latent, 0, conditions).float()
            del network
        del unet
        for dtype, mode in (("float32", "whole"), ("float32", "slabs"), ("bfloat16", "whole")):
            options = Options(dtype=dtype, device="cpu")
            decoder = LatentDiffusion(weights, options)._decoder
            raw = decoder(latent) if mode == "whole" else decoder.in_slabs(latent)
            volumes[dtype, mode] = raw.float()
        halves = LatentDiffusion(weights, Options(dtype="float32", device="cpu"))._decoder(
            latent.half()
        )
    plain, exact = outputs["float32", False], volumes["float32", "whole"]

    def decibels(found, expected):
        error = float((found - expected).square().mean())
        span = float(expected.max() - expected.min())
        return 10 * math.log10(span**2 / error)

    def relative(found, expected):
        return float((found - expected).abs().max() / expected.abs().max())

    return {
        "step, float32 rewritten, largest error": relative(outputs["float32", True], plain),
        "step, bfloat16, largest error": relative(outputs["bfloat16", True], plain),
        "step, bfloat16, PSNR dB": decibels(outputs["bfloat16", True], plain),
        "slabs, float32, largest error": relative(volumes["float32", "slabs"], exact),
        "latent rounded to float16, decoded in float32, PSNR dB": decibels(halves, exact),
        "decode, bfloat16, PSNR dB": decibels(volumes["bfloat16", "whole"], exact),
    }


def run(*arguments: str):
    """This script in a process of its own."""
    environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, env=environment
    )
    return json.loads(done.stdout.splitlines()[-1])


def table(found, errors) -> str:
    """The page."""
    import monai
    import numpy
    import torch

    def seconds(name):
        return statistics.median(entry["seconds"] for entry in found[name])

    def memory(name):
        return max(entry["gb"] for entry in found[name])

    published = 50 * seconds("published step") + seconds("published decode")
    lines = [
        "# Generation on a CPU",
        "",
        "Made by `benchmarks/generation_cpu.py`. Full published width, random weights, batch 1, "
        f"{os.cpu_count()} cores ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
        f"{', AMX' if 'amx_bf16' in Path('/proc/cpuinfo').read_text() else ''}), torch "
        f"{torch.__version__}, MONAI {monai.__version__}, NumPy {numpy.__version__}, Python "
        f"{platform.python_version()}. Machines are shared: read the ratios.",
        "",
        "| what | seconds | × published | peak memory, GB |",
        "|---|---|---|---|",
    ]
    for name in CASES:
        base = "published " + CASES[name]["kind"]
        ratio = seconds(base) / seconds(name)
        lines.append(f"| {name} | {seconds(name):.2f} | {ratio:.1f} | {memory(name):.1f} |")
    lines += [
        "",
        "Peak memory is the whole process with its weights; the U-Net's 2.2 GB of float32 weights "
        "are in memory while it is prepared.",
        "",
        "| one volume | seconds | × published |",
        "|---|---|---|",
        f"| published: 50 DDIM steps, float32 | {published:.0f} | 1.0 |",
    ]
    for dtype in ("float32", "bfloat16"):
        for steps in (50, 20, 10):
            step, decode = f"rewritten step, {dtype}", f"whole decode, {dtype}"
            total = steps * seconds(step) + seconds(decode)
            lines.append(
                f"| rewritten, {steps} steps, {dtype} | {total:.0f} | {published / total:.1f} |"
            )
    slabs = [
        f"{seconds(f'slab decode, {d}') / seconds(f'whole decode, {d}'):.2f} in {d}"
        for d in ("float32", "bfloat16")
    ]
    lines += ["", f"Slabs take {' and '.join(slabs)} of the time of decoding whole.", ""]
    lines += ["| precision | |", "|---|---|"]
    lines += [f"| {name} | {value:.3g} |" for name, value in errors.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        given = json.loads(options.case)
        print(json.dumps(precision() if given is None else measure(**given)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CASES}
    for _ in range(options.repeats):
        for name, case in CASES.items():
            found[name].append(run("--case", json.dumps(case)))
            print(name, found[name][-1], file=sys.stderr, flush=True)
    page = table(found, run("--case", "null"))
    print(page)
    if options.out:
        options.out.write_text(page)


if __name__ == "__main__":
    main()
