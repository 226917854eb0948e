"""Checkpoint files: read without running anything in them, renamed, checked key by key."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from generation.errors import WeightsError
from generation.presets import System

if TYPE_CHECKING:
    from torch import Tensor

_SHOWN = 3


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, whatever it is wrapped in.

    Raises
    ------
    WeightsError
        Not a checkpoint, cut short, or a pickle that wants to run code.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        mmap = zipfile.is_zipfile(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0][:160]
        raise WeightsError(
            f"{path} holds more than tensors and is not loaded, because a pickle can run code "
            f"({reason}); ask its author for a plain state dict or safetensors"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise WeightsError(
            f"{path} cannot be read ({reason}); it may be cut short: fetch it again"
        ) from None
    return _unwrapped(found, path)


def fitted(
    state: Mapping[str, Tensor], network: str, preset: System, where: str
) -> tuple[dict[str, Tensor], str]:
    """A checkpoint's tensors under MONAI's names, and the layout they had.

    Raises
    ------
    WeightsError
        Keys are missing, unexpected or of another shape; the message names the layout and them.
    """
    expected = {key: tuple(t.shape) for key, t in preset.build(network).state_dict().items()}
    renamed = {_renamed(key, network): tensor for key, tensor in state.items()}
    layout = _layout(state, network)
    missing = [key for key in expected if key not in renamed]
    unexpected = [key for key in renamed if key not in expected]
    misshaped = [
        f"{key} {tuple(renamed[key].shape)} instead of {shape}"
        for key, shape in expected.items()
        if key in renamed and tuple(renamed[key].shape) != shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    told = [f"{len(keys)} {what} ({some(keys)})" for what, keys in problems.items() if keys]
    if told:
        raise WeightsError(
            f"{where} is no {network} of this system: layout {layout}, of {len(expected)} keys "
            f"{'; '.join(told)}"
        )
    return {key: renamed[key].contiguous() for key in expected}, layout


_OLD = {
    "autoencoder": (re.compile(r"^(decoder\.blocks\.\d+)\.conv\.conv\."), r"\1.postconv.conv."),
    "unet": (re.compile(r"\.(attn[12])\.to_out\.0\."), r".\1.out_proj."),
}
"""How the GenerativeModels package called what MONAI calls otherwise."""

_COMPVIS = ("model.diffusion_model.", "first_stage_model.", "input_blocks.")


def _renamed(key: str, network: str) -> str:
    if network not in _OLD:
        return key
    old, new = _OLD[network]
    return old.sub(new, key)


def _layout(state: Mapping[str, Tensor], network: str) -> str:
    if any(key.startswith(_COMPVIS) for key in state):
        return "CompVis"
    if any(_renamed(key, network) != key for key in state):
        return "GenerativeModels (old MONAI)"
    monai = ("encoder.blocks.", "decoder.blocks.", "down_blocks.", "up_blocks.")
    if any(key.startswith(monai) for key in state):
        return "MONAI"
    return "synthbrain" if any(key.startswith("levels.") for key in state) else "unknown"


def _unwrapped(found: Any, path: Path) -> dict[str, Tensor]:
    import torch

    for _ in range(2):
        if isinstance(found, Mapping) and found and all(map(torch.is_tensor, found.values())):
            return dict(found)
        inner = [found[key] for key in ("model", "state_dict") if _has(found, key)]
        if not inner:
            break
        found = inner[0]
    kind = (
        f"a dict with {some(list(found))}" if isinstance(found, Mapping) else type(found).__name__
    )
    raise WeightsError(f"{path} holds {kind}, expected a state dict or a dict with one in 'model'")


def _has(found: Any, key: str) -> bool:
    return isinstance(found, Mapping) and isinstance(found.get(key), Mapping)


def some(keys: list[str]) -> str:
    """The first few names of a list, and how many more there are."""
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(map(str, keys[:_SHOWN])) + more
