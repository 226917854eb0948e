"""Weights of generators: fetched once on request, checked, converted, loaded strictly.

Installed weights are a folder with one safetensors file per network, in the layout of MONAI's
classes, and a ``weights.json`` that says where they came from. Checkpoints of the older
GenerativeModels package are renamed; nothing is ever unpickled beyond plain tensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from generation.checkpoints import fitted, read_state
from generation.errors import WeightsError
from generation.hub import PUBLISHED, commit_of, fetch
from generation.presets import Preset, System, load_preset, read_preset

if TYPE_CHECKING:
    from torch import Tensor, nn

    Given = Path | Mapping[str, Tensor]
    """Where a network's weights are: in a file, or here."""

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}")
"""What weights may be called: it becomes a folder name."""

RECORD = "weights.json"

_SCRATCH = ".partial"


@dataclass(frozen=True)
class Weights:
    """Installed weights.

    Parameters
    ----------
    folder
        Where their files lie.
    name, preset, target, digest
        As recorded; the digest is a hex SHA-256 over the networks' files, and the target of GANs
        is empty.
    files
        Name of each network's file.
    source
        Where they came from, as text.
    """

    folder: Path
    name: str
    preset: System
    target: str
    digest: str
    files: Mapping[str, str]
    source: Mapping[str, str]

    def network(self, name: str) -> nn.Module:
        """A network with its weights, in evaluation mode and frozen.

        Parameters
        ----------
        name
            ``"unet"`` or ``"autoencoder"``; of a GAN ``"generator"``.

        Raises
        ------
        WeightsError
            The file is missing or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.folder / self.files[name]
        try:
            state = load_file(path)
        except (OSError, SafetensorError) as error:
            raise WeightsError(
                f"cannot read {path} ({error}); install {self.name!r} again"
            ) from None
        module = self.preset.build(name)
        state = {key: tensor.float() for key, tensor in state.items()}
        module.load_state_dict(state, strict=True, assign=True)
        return module.requires_grad_(False)


def installed(folder: Path) -> dict[str, Weights]:
    """Weights in a folder, by name; what is no such thing is passed over."""
    found = {}
    for name in sorted(record.parent.name for record in folder.glob(f"*/{RECORD}")):
        with contextlib.suppress(WeightsError):
            found[name] = load(name, folder)
    return found


def load(name: str, folder: Path) -> Weights:
    """Installed weights; their networks are read when asked for.

    Raises
    ------
    WeightsError
        There are none of that name, or their record is damaged.
    """
    _check_name(name)
    record = folder / name / RECORD
    try:
        facts = json.loads(record.read_text())
        preset = read_preset(facts["preset"])
        return Weights(
            folder=record.parent,
            name=name,
            preset=preset,
            target=facts["target"],
            digest=facts["digest"],
            files=facts["files"],
            source=facts["source"],
        )
    except FileNotFoundError:
        hint = f"`synthbrain weights pull {name}`" if name in PUBLISHED else "`weights add`"
        raise WeightsError(f"no weights {name!r} in {folder}; install them with {hint}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{record} is damaged ({error}); install {name!r} again") from None


def pull(name: str, folder: Path, *, force: bool = False) -> Weights:
    """Fetch published weights and install them.

    Parameters
    ----------
    name
        One of :data:`PUBLISHED`.
    folder
        Where to install.
    force
        Download again what the Hub's cache holds, and replace what is installed.

    Returns
    -------
    Weights
        Installed; those already there are kept unless ``force`` or a file of theirs is gone.

    Raises
    ------
    WeightsError
        Unknown name, no network, refused by the Hub, or not what was published. What was
        installed before is untouched.

    Notes
    -----
    ``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HOME`` and ``HF_HUB_OFFLINE`` work as usual.
    """
    entry = PUBLISHED.get(name)
    if entry is None:
        raise WeightsError(f"unknown weights {name!r}; published are {', '.join(PUBLISHED)}")
    if not force and (folder / name / RECORD).is_file():
        here = load(name, folder)
        if all((here.folder / file).is_file() for file in here.files.values()):
            return here
    paths, source = {}, {"repo": entry.repo}
    for network, remote in entry.files.items():
        path = fetch(entry, remote, force=force)
        found = _hash(path, "md5")
        if remote.md5 is not None and found != remote.md5:
            raise WeightsError(
                f"{path.name} of {entry.repo} has MD5 {found}, expected {remote.md5}: damaged or "
                f"replaced; fetch it again with `synthbrain weights pull {name} --force`"
            )
        paths[network] = path
        source |= {f"{network}_file": path.name, f"{network}_md5": found}
    source["commit"] = commit_of(next(iter(paths.values())))
    return add(name, paths, folder, preset=entry.preset, target=entry.target, source=source)


def add(
    name: str,
    files: Mapping[str, Given],
    folder: Path,
    *,
    preset: str | System = "ukb-ldm",
    target: str | None = None,
    source: Mapping[str, str] | None = None,
    half: bool = False,
) -> Weights:
    """Install weights from files; from training runs: :func:`generation.train.release.add`.

    Parameters
    ----------
    name
        What to call them: lower-case letters, digits, ``.``, ``_`` and ``-``.
    files
        By network: ``.pt``/``.pth`` files of tensors or safetensors, in MONAI's layout or that of
        the GenerativeModels package, plain or as the ``model`` entry of a dict. Or the tensors
        themselves.
    folder
        Where to install; weights of that name are replaced.
    preset
        Their system.
    target
        What the U-Net predicts, if not what the preset's does; not for GANs.
    source
        Where they came from; the files' paths by default.
    half
        Keep them as float16: half the size, rounded to 11 bits. They are used as float32.

    Raises
    ------
    WeightsError
        A file is not such a checkpoint. What was installed before is untouched.
    """
    from filelock import FileLock

    _check_name(name)
    system = load_preset(preset) if isinstance(preset, str) else preset
    if set(files) != set(system.sampling):
        raise WeightsError(f"expected files of {_list(system.sampling)}, found {_list(files)}")
    predicted = _target(system, target)
    home = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{name}.lock"):
        home.mkdir(exist_ok=True)
        try:
            told = {n: _convert(given, n, system, home, half) for n, given in files.items()}
            kept = {network: file for network, (file, _) in told.items()}
            layouts = {f"{network}_layout": layout for network, (_, layout) in told.items()}
            facts = {
                "name": name,
                "preset": system.model_dump(mode="json"),
                "target": predicted,
                "digest": hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest(),
                "files": kept,
                "source": {**(source or _places(files)), **layouts},
            }
            scratch = home / _SCRATCH
            scratch.write_text(json.dumps(facts, indent=2))
            os.replace(scratch, home / RECORD)
        finally:
            _tidy(home)
    return load(name, folder)


def remove(name: str, folder: Path) -> None:
    """Delete installed weights; the Hub's cache keeps what it holds.

    Raises
    ------
    WeightsError
        There are none of that name.
    """
    _check_name(name)
    if not (folder / name / RECORD).is_file():
        raise WeightsError(f"no weights {name!r} in {folder}")
    shutil.rmtree(folder / name)


def _places(files: Mapping[str, Given]) -> dict[str, str]:
    return {n: str(given) for n, given in files.items() if not isinstance(given, Mapping)}


def _target(system: System, asked: str | None) -> str:
    if isinstance(system, Preset):
        return asked or system.target
    if asked is not None:
        raise WeightsError(f"a GAN has no target, found {asked!r}; leave it out")
    return ""


def _convert(given: Given, network: str, preset: System, home: Path, half: bool) -> tuple[str, str]:
    """Write a checkpoint's tensors under a name that holds their hash; it and their layout."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    found = given if isinstance(given, Mapping) else read_state(Path(given))
    where = "what was given" if isinstance(given, Mapping) else str(given)
    state, layout = fitted(found, network, preset, where)
    if half:
        state = {key: tensor.half() for key, tensor in state.items()}
    scratch = home / _SCRATCH
    try:
        save_file(state, scratch)
    except (OSError, SafetensorError) as error:
        size = sum(tensor.nbytes for tensor in state.values())
        raise WeightsError(
            f"cannot write {size / 1e6:,.0f} MB to {home} ({error}); make room and run again"
        ) from None
    name = f"{network}-{_hash(scratch, 'sha256')}.safetensors"
    os.replace(scratch, home / name)
    return name, layout


def _tidy(home: Path) -> None:
    """Delete what no record names: leftovers, and the files of a record that was replaced."""
    try:
        record = json.loads((home / RECORD).read_text())
        kept = {RECORD, *record["files"].values()}
    except FileNotFoundError:
        kept = set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    for path in home.iterdir():
        if path.name not in kept:
            path.unlink(missing_ok=True)
    if not kept:
        home.rmdir()


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise WeightsError(f"{name!r} cannot be a name: use a-z, 0-9, '.', '_' and '-'")


def _hash(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def _list(names: Any) -> str:
    return ", ".join(names) or "none"
