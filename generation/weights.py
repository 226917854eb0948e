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
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from generation.errors import WeightsError
from generation.presets import Preset, load_preset

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}")
"""What weights may be called: it becomes a folder name."""

RECORD = "weights.json"

_SHOWN = 3


class RemoteFile(NamedTuple):
    """A file of a repository: its path, or a word its name must hold, and its MD5 where known."""

    path: str
    md5: str | None = None
    exact: bool = True


@dataclass(frozen=True)
class Published:
    """A published checkpoint on the Hugging Face Hub.

    Parameters
    ----------
    name, preset, target
        What it is called here, its system, and what its U-Net predicts.
    repo, revision
        Where.
    files
        By network.
    use, licence, citation
        What the authors say, in short; shown before fetching.
    """

    name: str
    preset: str
    target: str
    repo: str
    files: Mapping[str, RemoteFile]
    use: str
    licence: str
    citation: str
    revision: str = "main"


_PINAYA = (
    "Pinaya et al. 2022, Brain Imaging Generation with Latent Diffusion Models, arXiv 2209.07162"
)
_REMEDIOS = (
    "Remedios et al. 2025, Diffusion-Driven Generation of Minimally Preprocessed Brain MRI, "
    "arXiv 2510.26834"
)


def _medforj(target: str) -> Published:
    return Published(
        name=f"medforj-{target}",
        preset="medforj",
        target=target,
        repo="piksl-research/medforj-brain-t1w-3d",
        files={"unet": RemoteFile(target, exact=False)},
        use="Research on synthetic brain MRI; not for clinical use. Read the model card.",
        licence="Apache-2.0 (code); see the model card for the weights",
        citation=_REMEDIOS,
    )


PUBLISHED: dict[str, Published] = {
    "ukb-ldm": Published(
        name="ukb-ldm",
        preset="ukb-ldm",
        target="epsilon",
        repo="MONAI/brain_image_synthesis_latent_diffusion_model",
        files={
            "autoencoder": RemoteFile("models/autoencoder.pt", "329e97b3085643ff235f11f049856242"),
            "unet": RemoteFile("models/model.pt", "21c3047556fb671caf0556f1cce6ef22"),
        },
        use="Research on synthetic brain MRI, trained on UK Biobank scans; not for clinical use. "
        "Read the model card.",
        licence="see the model card; synthbrain fetches these weights and never re-hosts them",
        citation=_PINAYA,
    ),
    **{f"medforj-{target}": _medforj(target) for target in ("sample", "velocity", "flow")},
}
"""Published checkpoints by name."""


@dataclass(frozen=True)
class Weights:
    """Installed weights.

    Parameters
    ----------
    folder
        Where their files lie.
    name, preset, target, digest
        As recorded; the digest is a hex SHA-256 over the networks' files.
    source
        Where they came from, as text.
    """

    folder: Path
    name: str
    preset: Preset
    target: str
    digest: str
    source: Mapping[str, str]

    def network(self, name: str) -> nn.Module:
        """A network with its weights, in evaluation mode and frozen.

        Parameters
        ----------
        name
            ``"unet"`` or ``"autoencoder"``.

        Raises
        ------
        WeightsError
            The file is missing or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.folder / f"{name}.safetensors"
        try:
            state = load_file(path)
        except (OSError, SafetensorError) as error:
            raise WeightsError(
                f"cannot read {path} ({error}); install {self.name!r} again"
            ) from None
        module = self.preset.build(name)
        module.load_state_dict(state, strict=True, assign=True)
        return module.requires_grad_(False)


def installed(folder: Path) -> dict[str, Weights]:
    """Weights in a folder, by name; what is no such thing is passed over."""
    found = {}
    for record in sorted(folder.glob(f"*/{RECORD}")):
        with contextlib.suppress(WeightsError):
            found[record.parent.name] = load(record.parent.name, folder)
    return found


def load(name: str, folder: Path) -> Weights:
    """Installed weights; their networks are read when asked for.

    Raises
    ------
    WeightsError
        There are none of that name, or their record is damaged.
    """
    record = folder / name / RECORD
    try:
        facts = json.loads(record.read_text())
        preset = Preset.model_validate(facts["preset"])
        return Weights(
            record.parent, name, preset, facts["target"], facts["digest"], facts["source"]
        )
    except FileNotFoundError:
        hint = f"`synthbrain weights pull {name}`" if name in PUBLISHED else "`weights add`"
        raise WeightsError(f"no weights {name!r} in {folder}; install them with {hint}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{record} is damaged ({error}); install {name!r} again") from None


def pull(
    name: str, folder: Path, *, force: bool = False, published: Published | None = None
) -> Weights:
    """Fetch published weights and install them.

    Parameters
    ----------
    name
        One of :data:`PUBLISHED`.
    folder
        Where to install.
    force
        Download again what the Hub's cache holds, and replace what is installed.
    published
        An entry that is not in :data:`PUBLISHED`.

    Returns
    -------
    Weights
        Installed; those already there are kept unless ``force``.

    Raises
    ------
    WeightsError
        Unknown name, no network, refused by the Hub, or not what was published. What was
        installed before is untouched.

    Notes
    -----
    ``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HOME`` and ``HF_HUB_OFFLINE`` work as usual.
    """
    entry = published or PUBLISHED.get(name)
    if entry is None:
        raise WeightsError(f"unknown weights {name!r}; published are {', '.join(PUBLISHED)}")
    if not force and (folder / name / RECORD).is_file():
        return load(name, folder)
    paths, source = {}, {"repo": entry.repo}
    for network, remote in entry.files.items():
        path = _fetched(entry, remote, force=force)
        found = _hash(path, "md5")
        if remote.md5 is not None and found != remote.md5:
            raise WeightsError(
                f"{path.name} of {entry.repo} has MD5 {found}, expected {remote.md5}: damaged or "
                f"replaced; fetch it again with `synthbrain weights pull {name} --force`"
            )
        paths[network] = path
        source |= {f"{network}_file": path.name, f"{network}_md5": found}
    source["commit"] = _commit(next(iter(paths.values())))
    return add(name, paths, folder, preset=entry.preset, target=entry.target, source=source)


def add(
    name: str,
    files: Mapping[str, Path],
    folder: Path,
    *,
    preset: str | Preset = "ukb-ldm",
    target: str | None = None,
    source: Mapping[str, str] | None = None,
) -> Weights:
    """Install weights from files.

    Parameters
    ----------
    name
        What to call them: lower-case letters, digits, ``.``, ``_`` and ``-``.
    files
        By network: ``.pt``/``.pth`` files of tensors or safetensors, in MONAI's layout or that of
        the GenerativeModels package, plain or as the ``model`` entry of a dict.
    folder
        Where to install; weights of that name are replaced.
    preset
        Their system.
    target
        What the U-Net predicts, if not what the preset's does.
    source
        Where they came from; the files' paths by default.

    Raises
    ------
    WeightsError
        A file is not such a checkpoint. What was installed before is untouched.
    """
    from filelock import FileLock

    if not NAME.fullmatch(name):
        raise WeightsError(f"{name!r} cannot be a name: use a-z, 0-9, '.', '_' and '-'")
    system = preset if isinstance(preset, Preset) else load_preset(preset)
    if set(files) != set(system.networks):
        raise WeightsError(f"expected files of {_list(system.networks)}, found {_list(files)}")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{name}.lock"), _replacing(folder / name) as scratch:
        layouts = {}
        for network, path in files.items():
            layouts[f"{network}_layout"] = _convert(path, network, system, scratch)
        facts = {
            "name": name,
            "preset": system.model_dump(mode="json"),
            "target": target or system.target,
            "digest": _digest(scratch, sorted(files)),
            "source": {**(source or {n: str(p) for n, p in files.items()}), **layouts},
        }
        (scratch / RECORD).write_text(json.dumps(facts, indent=2))
    return load(name, folder)


def remove(name: str, folder: Path) -> None:
    """Delete installed weights; the Hub's cache keeps what it holds.

    Raises
    ------
    WeightsError
        There are none of that name.
    """
    if not (folder / name / RECORD).is_file():
        raise WeightsError(f"no weights {name!r} in {folder}")
    shutil.rmtree(folder / name)


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
    state: Mapping[str, Tensor], network: str, preset: Preset, where: str
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
    told = [f"{len(keys)} {what} ({_some(keys)})" for what, keys in problems.items() if keys]
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
    old, new = _OLD[network]
    return old.sub(new, key)


def _layout(state: Mapping[str, Tensor], network: str) -> str:
    if any(key.startswith(_COMPVIS) for key in state):
        return "CompVis"
    if any(_renamed(key, network) != key for key in state):
        return "GenerativeModels (old MONAI)"
    known = ("encoder.blocks.", "decoder.blocks.", "down_blocks.", "up_blocks.")
    return "MONAI" if any(key.startswith(known) for key in state) else "unknown"


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
        f"a dict with {_some(list(found))}" if isinstance(found, Mapping) else type(found).__name__
    )
    raise WeightsError(f"{path} holds {kind}, expected a state dict or a dict with one in 'model'")


def _has(found: Any, key: str) -> bool:
    return isinstance(found, Mapping) and isinstance(found.get(key), Mapping)


def _convert(path: Path, network: str, preset: Preset, out: Path) -> str:
    from safetensors.torch import save_file

    state, layout = fitted(read_state(Path(path)), network, preset, str(path))
    save_file(state, out / f"{network}.safetensors")
    return layout


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A folder to write, that takes the place of ``target`` when all went well."""
    scratch = target.with_name(f".{target.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            os.rename(target, old)
        os.rename(scratch, target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _digest(folder: Path, networks: list[str]) -> str:
    parts = [f"{n} {_hash(folder / f'{n}.safetensors', 'sha256')}" for n in networks]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _hash(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def _fetched(entry: Published, remote: RemoteFile, *, force: bool) -> Path:
    """A file of the Hub, from its cache or the network."""
    import huggingface_hub

    endpoint = os.environ.get("HF_ENDPOINT")
    with _told(entry, remote):
        name = remote.path if remote.exact else _located(entry, remote.path, endpoint)
        found = huggingface_hub.hf_hub_download(
            entry.repo, name, revision=entry.revision, endpoint=endpoint, force_download=force
        )
        return Path(found)


def _located(entry: Published, word: str, endpoint: str | None) -> str:
    import huggingface_hub

    listed = huggingface_hub.HfApi(endpoint=endpoint).list_repo_files(
        entry.repo, revision=entry.revision
    )
    checkpoints = [n for n in listed if n.endswith((".pt", ".pth", ".safetensors"))]
    fitting = [n for n in checkpoints if word in Path(n).name.lower()]
    if len(fitting) != 1:
        raise WeightsError(
            f"{entry.repo} holds {len(fitting)} checkpoints with {word!r} in their name, expected "
            f"one; found {_some(checkpoints)}: download the right one and use `weights add`"
        )
    return fitting[0]


@contextlib.contextmanager
def _told(entry: Published, remote: RemoteFile) -> Iterator[None]:
    """Turn what the Hub's client raises into one line that says what to do."""
    from huggingface_hub import errors

    what = f"{remote.path} of {entry.repo}"
    try:
        yield
    except errors.GatedRepoError:
        raise WeightsError(
            f"{entry.repo} is gated: accept its terms on the Hub, then log in with `hf auth login` "
            "or set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise WeightsError(
            f"{entry.repo} does not exist or is closed to you; if it is private, log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        cause = error.__cause__
        if isinstance(cause, errors.HfHubHTTPError):
            raise WeightsError(f"{what} could not be fetched: {_status(cause)}") from None
        raise WeightsError(
            f"{what} is not in the Hub's cache and the Hub cannot be reached (offline, or "
            "HF_HUB_OFFLINE is set); connect, or copy the files here and use `weights add`"
        ) from None
    except (errors.EntryNotFoundError, errors.RevisionNotFoundError):
        raise WeightsError(f"{what} is not there any more; look at the model's page") from None
    except errors.HfHubHTTPError as error:
        raise WeightsError(f"{what} could not be fetched: {_status(error)}") from None
    except Exception as error:
        # The client's HTTP library differs between its versions.
        transport = type(error).__module__.split(".")[0] in ("httpx", "httpx2", "requests")
        if not (transport or isinstance(error, OSError)):
            raise
        raise WeightsError(
            f"{what} could not be fetched ({type(error).__name__}: {error}); run the same again"
        ) from None


def _status(error: Any) -> str:
    code = error.response.status_code
    advice = {
        404: "it is not there any more: look at the model's page",
        401: "log in with `hf auth login` or set HF_TOKEN",
        403: "you have no access: accept the terms on the model's page, then set HF_TOKEN",
        429: "the Hub asks to slow down: wait some minutes, or log in",
    }.get(code, "try again later")
    return f"the Hub answered {code}; {advice}"


def _commit(path: Path) -> str:
    """The commit in a path of the Hub's cache, ``snapshots/<commit>/…``."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else ""


def _list(names: Any) -> str:
    return ", ".join(names) or "none"


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(map(str, keys[:_SHOWN])) + more
