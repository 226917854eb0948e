"""What evaluation costs: seconds a volume or a pair for each part, and memory as sets grow.

``python benchmarks/evaluation.py --out benchmarks/evaluation.md``; MS-SSIM is timed beside MONAI's
and pytorch-msssim's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from about import setting

from generation.evaluate.gradient_ssim import GradientSsim
from generation.evaluate.med3d import random_med3d
from generation.evaluate.multiscale import WEIGHTS
from generation.evaluate.segmentations import PhantomMeasurer
from generation.evaluate.ssim import ms_ssim
from synthbrain.evaluation.sets import VolumeSet
from synthbrain.named import opener

_EVALUATE = """
import json, resource, sys
from synthbrain.cli import app
try:
    app(sys.argv[1:], standalone_mode=False)
finally:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"peak": peak * 1024}))
"""


def main() -> None:
    """Time, weigh, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, help="where phantoms are stored")
    parser.add_argument("--rounds", type=int, default=3, help="the best of so many is told (3)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 40], help="of sets weighed")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    volumes = VolumeSet("phantoms", opener("phantoms:1200", store=options.store)(limit=2))
    lines = [*times(volumes, options.rounds), "", *memory(options)]
    report = "\n".join([*heading(), *lines, ""])
    print(report)
    if options.out:
        options.out.write_text(report, encoding="utf-8")


def times(volumes: VolumeSet, rounds: int) -> list[str]:
    """A row for each thing that is done to every volume or pair."""
    from monai.metrics import MultiScaleSSIMMetric
    from pytorch_msssim import ms_ssim as other

    first, second = volumes[0][None], volumes[1][None]
    gradient, network, measurer = GradientSsim(), random_med3d(), PhantomMeasurer()
    prepared = gradient.prepare(first), gradient.prepare(second)
    monai = MultiScaleSSIMMetric(3, kernel_size=7, kernel_sigma=1.5)
    image = first[0, 0].numpy()
    rows: list[tuple[str, Callable[[], object]]] = [
        ("MS-SSIM of a pair, ours", lambda: ms_ssim(first, second)),
        ("MS-SSIM of a pair, MONAI", lambda: monai(first, second)),
        ("MS-SSIM of a pair, pytorch-msssim", lambda: other(
            first, second, data_range=1.0, win_size=7, weights=list(WEIGHTS))),
        ("4-G-R-SSIM of a pair, six variants, volumes prepared",
         lambda: gradient.compare(*prepared)),
        ("4-G-R-SSIM, preparing a volume", lambda: gradient.prepare(first)),
        ("features of a volume, random network", lambda: network.features(first)),
        ("built-in measurer, a volume", lambda: measurer.measure(image, volumes.affine)),
    ]  # fmt: skip
    found = [(name, best(work, rounds)) for name, work in rows]
    ours = found[0][1]
    table = [
        f"| {name} | {seconds:.2f} | {f'{seconds / ours:.1f} ×' if 'MS-SSIM of' in name else ''} |"
        for name, seconds in found
    ]
    return ["| what | seconds | of ours |", "|---|---|---|", *table]


def best(work: Callable[[], object], rounds: int) -> float:
    """Seconds of the quickest of some rounds, after one that does not count."""
    work()
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


def memory(options: argparse.Namespace) -> list[str]:
    """Peak memory of whole evaluations, for sets of several sizes."""
    lines = ["| volumes of each set | peak memory | seconds |", "|---|---|---|"]
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            command = [
                "evaluate", "phantoms:1200", "--real", "phantoms:1200", "--training",
                "phantoms:1200", "--limit", str(size), "--pairs", str(size), "--out", folder,
            ]  # fmt: skip
            if options.store:
                command += ["--store", str(options.store)]
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", _EVALUATE, *command],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            peak = json.loads(done.stdout.strip().splitlines()[-1])["peak"]
            lines.append(f"| {size} | {peak / 1e9:.2f} GB | {time.perf_counter() - began:.0f} |")
    return lines


def heading() -> list[str]:
    """What was run on what."""
    return [
        "# What evaluation costs",
        "",
        f"`python benchmarks/evaluation.py`; {setting(('torch', 'monai', 'pytorch-msssim'))}; "
        f"{torch.get_num_threads()} threads.",
        "",
        "Volumes of 160 × 224 × 160 voxels, all in one run. What grows with their number are the "
        "vectors that copies are looked for in: 0.36 MB a volume and set.",
        "",
    ]


if __name__ == "__main__":
    main()
