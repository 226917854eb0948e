"""Smoke runs of the generation benchmarks on narrow networks."""

from functools import partial
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def narrowest(name):
    """Convolutions in bfloat16 take a CPU seconds even on a narrow decoder."""
    from generation.testing import narrow

    preset = narrow(name)
    decoder = {**preset.networks["autoencoder"], "channels": [4] * 4, "norm_num_groups": 4}
    networks = {**preset.networks, "autoencoder": decoder}
    small = {"shape": (32, 32, 32), "latent_shape": (3, 4, 4, 4)}
    return preset.model_copy(update={"networks": networks, **small})


@torch.inference_mode()
def test_the_gpu_page_renders_from_a_run_on_a_cpu(monkeypatch):
    import generation_gpu as gpu

    eager = {name: how for name, how in gpu.LEVERS.items() if not how.get("compile")}
    monkeypatch.setattr(gpu, "LEVERS", eager)
    monkeypatch.setattr(gpu, "narrow", narrowest)
    monkeypatch.setattr(gpu, "timed", partial(gpu.timed, calls=1))
    bench = gpu.Bench(torch.device("cpu"), small=True)
    found = gpu.measure(bench, [1, 2])
    page = gpu.page(bench, found)
    assert page.count("| 50 steps |") == 1
    # a lever this machine lacks has a row that says so
    assert ("not implemented" in page) == any("error" in e for e in found["levers"].values())
    assert found["levers"]["rewritten, float32"]["flop"] > 0
    assert (
        found["levers"]["rewritten, float32"]["flop"]
        < (found["levers"]["published: MONAI's modules, float32"]["flop"])
    )


def test_the_cpu_page_renders(monkeypatch):
    import generation_cpu as cpu

    monkeypatch.setattr("generation.presets.load_preset", narrowest)
    found = {name: [cpu.measure(**case)] for name, case in cpu.CASES.items()}
    errors = cpu.precision()
    page = cpu.table(found, errors)
    assert page.count("| rewritten,") == 6
    assert errors["step, float32 rewritten, largest error"] < 1e-4
    assert errors["slabs, float32, largest error"] < 1e-4
    assert errors["latent rounded to float16, decoded in float32, PSNR dB"] > 40


@torch.no_grad()
def test_few_steps(monkeypatch):
    import solvers

    monkeypatch.setattr(solvers, "EVALUATIONS", (6, 20))
    found = solvers.measure(solvers.gaussian())
    assert found["unipc", "logsnr"][1] < found["ddim", "trailing"][1] / 5
    assert len(solvers.table("Gaussian", found)) == 5 + len(solvers.METHODS)
