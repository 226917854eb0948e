"""Published checkpoints, and fetching their files from the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from generation.checkpoints import some
from generation.errors import WeightsError


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


def fetch(entry: Published, remote: RemoteFile, *, force: bool) -> Path:
    """A file of the Hub, from its cache or the network.

    Parameters
    ----------
    entry, remote
        Which.
    force
        Download it even if the cache holds it.

    Raises
    ------
    WeightsError
        It cannot be had; the message is one line and says what to do.
    """
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
            f"one; found {some(checkpoints)}: download the right one and use `weights add`"
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


def commit_of(path: Path) -> str:
    """The commit in a path of the Hub's cache, ``snapshots/<commit>/…``."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else ""
