"""Installed weights as a MONAI bundle, which runs with MONAI alone.

The bundle samples as the published code does: DDIM in float32 with MONAI's own modules, like
:meth:`generation.options.Options.published`. A row's noise is a plain ``torch.randn`` from a
generator seeded by the row, so a line of configuration gives the same.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from generation.covariates import COVARIATES
from generation.errors import WeightsError
from generation.options import Options
from generation.presets import Preset
from generation.system import Checkpoint

SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
    "meta_schema_20240725.json"
)
"""What ``python -m monai.bundle verify_metadata`` checks the metadata against."""

ARGUMENTS = {"sex": "gender", "age": "age", "ventricular_volume": "ventricular_vol",
             "brain_volume": "brain_vol"}  # fmt: skip
"""What the published bundle calls the covariates."""

_PREDICTIONS = {"epsilon": "epsilon", "sample": "sample", "velocity": "v_prediction"}
_FILES = {"autoencoder": "autoencoder.pt", "unet": "model.pt"}


def export(weights: Checkpoint, out: Path) -> Path:
    """Write a MONAI bundle.

    Parameters
    ----------
    weights
        What to export.
    out
        Folder to write; all of it appears at once.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    WeightsError
        MONAI's sampler cannot do what the system needs, or the folder holds something.
    """
    preset = _diffusion(weights)
    texts = {
        "configs/inference.json": json.dumps(inference(weights), indent=4),
        "configs/metadata.json": json.dumps(metadata(weights), indent=4),
        "configs/logging.conf": _LOGGING,
        "docs/README.md": _readme(weights),
        "LICENSE": _LICENSE,
    }
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WeightsError(f"{out} is there already; choose another folder, or delete it")
    scratch = out.absolute().with_name(f".{out.absolute().name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        for name, text in texts.items():
            path = scratch / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        (scratch / "models").mkdir()
        for network in preset.networks:
            state = weights.network(network).state_dict()
            torch.save(state, scratch / "models" / _FILES[network])
        os.replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out


def inference(weights: Checkpoint) -> dict[str, Any]:
    """What ``python -m monai.bundle run`` does.

    Raises
    ------
    WeightsError
        MONAI's sampler cannot do it.
    """
    preset = _diffusion(weights)
    return {
        "imports": [
            "$import torch",
            "$from pathlib import Path",
            "$from monai.data import MetaTensor",
        ],
        "bundle_root": ".",
        # Names MONAI expects of every bundle.
        **dict.fromkeys(("dataset_dir", "dataset", "evaluator"), ""),
        "model_dir": "$@bundle_root + '/models'",
        "output_dir": "$@bundle_root + '/output'",
        "seed": 0,
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        **_sampler(weights),
        "diffusion_def": _network("DiffusionModelUNet", preset.networks["unet"]),
        "network_def": "@diffusion_def",
        "diffusion": "$@diffusion_def.to(@device).eval()",
        **(_latent(preset) if preset.system == "latent" else _pixel(preset)),
        **_saving(preset),
        "initialize": [
            "$Path(@output_dir).mkdir(parents=True, exist_ok=True)",
            *(_loading(network) for network in preset.networks),
            "$@scheduler.set_timesteps(@num_inference_steps)",
            "$setattr(@scheduler, 'timesteps', @timesteps)",
        ],
        "run": "$@saver(@image, filename=@output_dir + '/' + @out_file)",
    }


def metadata(weights: Checkpoint) -> dict[str, Any]:
    """What MONAI wants to know of a bundle."""
    preset = _diffusion(weights)
    packages = ("einops", "fire", "nibabel")
    return {
        "schema": SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": "exported by synthbrain"},
        "monai_version": version("monai"),
        "pytorch_version": torch.__version__.split("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {name: _version(name) for name in packages},
        "task": "Brain image synthesis",
        "description": f"Synthetic T1-weighted brain MRI: a {preset.system} diffusion model. "
        f"System: {preset.reference}",
        "authors": "unknown: whoever trained these weights",
        "copyright": "unknown: see LICENSE",
        "data_type": "nibabel",
        "intended_use": "Research on synthetic brain MRI; not for clinical use",
        "references": [preset.reference],
        "weights_digest": weights.digest,
        "network_data_format": _formats(preset),
    }


def _diffusion(weights: Checkpoint) -> Preset:
    preset = weights.preset
    if not isinstance(preset, Preset):
        raise WeightsError(
            f"{weights.name} is a {preset.system} system, expected a latent or pixel one: bundles "
            "are of diffusion models; sample it with `synthbrain generate`"
        )
    return preset


def _formats(preset: Preset) -> dict[str, Any]:
    """What goes into a bundle and what comes out."""
    channels, *shape = preset.latent_shape or (1, *preset.shape)
    inputs = {"noise": _tensor("image", channels, shape, {"0": "standard normal noise"})}
    inputs["noise"]["value_range"] = []
    if preset.system == "latent":
        meaning = {str(i): covariate.name for i, covariate in enumerate(COVARIATES)}
        inputs["covariates"] = _tensor("tabular", len(COVARIATES), [1], meaning)
    image = _tensor("image", 1, preset.shape, {"0": "T1w"})
    return {"inputs": inputs, "outputs": {"pred": image}}


def _sampler(weights: Checkpoint) -> dict[str, Any]:
    """MONAI's DDIM at the published timesteps.

    They are set by hand: what ``set_timesteps`` makes of a number changed between MONAI's versions.
    """
    preset, target = _diffusion(weights), weights.target
    spec, schedule = preset.sampler, preset.schedule
    if (spec.solver, spec.spacing) != ("ddim", "leading") or target not in _PREDICTIONS:
        raise WeightsError(
            f"{weights.name} samples with {spec.solver}, {spec.spacing} steps and target "
            f"{target!r}; MONAI's sampler does ddim, leading, and {', '.join(_PREDICTIONS)}: "
            "this system cannot be a bundle"
        )
    low, high = preset.clip or (-1.0, 1.0)
    stride = f"({schedule.steps} // @num_inference_steps)"
    return {
        "scheduler": {
            "_target_": "monai.networks.schedulers.DDIMScheduler",
            "num_train_timesteps": schedule.steps,
            "schedule": f"{schedule.kind}_beta",
            "beta_start": schedule.start,
            "beta_end": schedule.end,
            "prediction_type": _PREDICTIONS[target],
            "clip_sample": preset.clip is not None,
            "clip_sample_min": low,
            "clip_sample_max": high,
        },
        "num_inference_steps": spec.steps,
        "timesteps": f"$torch.arange(@num_inference_steps).flip(0) * {stride}",
    }


def _latent(preset: Preset) -> dict[str, Any]:
    names = [ARGUMENTS[covariate.name] for covariate in COVARIATES]
    values = ", ".join(f"@{name}" for name in names)
    return {
        **dict(zip(names, (0.0, 0.1, 0.2, 0.4), strict=True)),
        "out_file": f"$'_'.join(map(str, ['sample', @seed, {values}]))",
        "conditioning": f"$torch.tensor([[[{values}]]], dtype=torch.float32).to(@device)",
        "autoencoder_def": _network("AutoencoderKL", preset.networks["autoencoder"]),
        "autoencoder": "$@autoencoder_def.to(@device).eval()",
        # The covariates are attended to and concatenated; MONAI's inferer does one of them.
        "denoiser": "$lambda x, timesteps, context: @diffusion(torch.cat([x, "
        "context[:, 0, :, None, None, None].expand(-1, -1, *x.shape[2:])], 1), "
        "timesteps=timesteps, context=context)",
        "noise": _noise(preset.latent_shape),
        "inferer": {
            "_target_": "LatentDiffusionInferer",
            "scheduler": "@scheduler",
            "scale_factor": 1.0,
        },
        "sample": "$@inferer.sample(input_noise=@noise, autoencoder_model=@autoencoder, "
        "diffusion_model=@denoiser, conditioning=@conditioning)",
        "volume": "$@sample.clamp(0, 1)",
    }


def _pixel(preset: Preset) -> dict[str, Any]:
    low, high = preset.value_range
    return {
        "out_file": "$'sample_' + str(@seed)",
        "noise": _noise((1, *preset.shape)),
        "inferer": {"_target_": "DiffusionInferer", "scheduler": "@scheduler"},
        "sample": "$@inferer.sample(input_noise=@noise, diffusion_model=@diffusion)",
        "volume": f"$((@sample - ({low})) / {high - low}).clamp(0, 1)",
    }


def _saving(preset: Preset) -> dict[str, Any]:
    return {
        "affine": [list(row) for row in preset.affine],
        "image": "$MetaTensor(@volume[0].cpu(), affine=torch.tensor(@affine, dtype=torch.float64))",
        "saver": {
            "_target_": "SaveImage",
            "output_dir": "@output_dir",
            "output_ext": ".nii.gz",
            "resample": False,
        },
    }


def _noise(shape: Any) -> str:
    drawn = f"torch.randn({tuple(shape)}, generator=torch.Generator().manual_seed(@seed))"
    return f"${drawn}[None].to(@device)"


def _network(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {"_target_": f"monai.networks.nets.{name}", **arguments}


def _loading(network: str) -> str:
    module = "autoencoder" if network == "autoencoder" else "diffusion"
    path = f"@model_dir + '/{_FILES[network]}'"
    return f"$@{module}.load_state_dict(torch.load({path}, map_location='cpu', weights_only=True))"


def _tensor(kind: str, channels: int, shape: Any, meaning: dict[str, str]) -> dict[str, Any]:
    return {
        "type": kind,
        "format": kind,
        "num_channels": channels,
        "spatial_shape": list(shape),
        "dtype": "float32",
        "value_range": [0, 1],
        "is_patch_data": False,
        "channel_def": meaning,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "any"


def _readme(weights: Checkpoint) -> str:
    preset = _diffusion(weights)
    options = Options.published(preset)
    given, table = "", ""
    if preset.system == "latent":
        values = ("1.0", "0.7", "0.3", "0.5")
        pairs = list(zip(ARGUMENTS.values(), values, strict=True))
        given = "".join(f" --{name} {value}" for name, value in pairs)
        rows = (f"| `--{ARGUMENTS[c.name]}` | {c.low:,.10g} to {c.high:,.10g} | {c.unit} |"
                for c in COVARIATES)  # fmt: skip
        table = "\n".join(["| argument | 0 to 1 stands for | unit |", "|---|---|---|", *rows, ""])
    source = getattr(weights, "source", {})
    told = {k: v for k, v in source.items() if k.endswith(("_step", "_kind", "_recipe", "repo"))}
    return _README.format(
        name=weights.name,
        system=preset.system,
        reference=preset.reference,
        given=given,
        table=table,
        solver=options.solver,
        steps=options.steps,
        spacing=options.spacing,
        shape=" × ".join(map(str, preset.shape)),
        digest=weights.digest,
        source="".join(f"- {key.replace('_', ' ')}: {value}\n" for key, value in told.items()),
    )


_LOGGING = """[loggers]
keys=root

[handlers]
keys=consoleHandler

[formatters]
keys=fullFormatter

[logger_root]
level=INFO
handlers=consoleHandler

[handler_consoleHandler]
class=StreamHandler
level=INFO
formatter=fullFormatter
args=(sys.stdout,)

[formatter_fullFormatter]
format=%(asctime)s - %(name)s - %(levelname)s - %(message)s"""

_LICENSE = """The files under configs/ and docs/ are licensed under the Apache License, Version 2.0:
https://www.apache.org/licenses/LICENSE-2.0

The licence of the files under models/ is for those who trained them to give, and may be bound by
the terms of the scans they were trained on. Write it here before you pass this bundle on."""

_README = """# {name}

Synthetic T1-weighted brain MRI from a {system} diffusion model: {shape} voxels as NIfTI, values
from 0 to 1. The system is that of {reference}. For research; not for clinical use.

## Run

```
pip install monai einops fire nibabel
python -m monai.bundle run --config_file configs/inference.json --bundle_root .{given} --seed 3
```

The volume lies in `output/`. The same seed gives the same volume; `--device "$torch.device('cpu')"`
and `--num_inference_steps 20` change the place and the steps.

{table}
## The same from synthbrain

The bundle samples as `generation.options.Options.published` does: {solver} with {steps} {spacing}
steps, float32, one generator a volume, seeded by its seed.

```
synthbrain generate --generator {name} --solver {solver} --steps {steps} --spacing {spacing} \\
    --precision float32{given} --dtype float32 --out brains
```

gives this volume too, for the seed it notes in `brains/cohort`.

## Where the weights come from

- digest: {digest}
{source}
Before you pass this bundle on: fill in `LICENSE`, and authors, copyright and data source in
`configs/metadata.json`."""
