"""Training from cohorts: what ``synthbrain train`` does.

Data are cohorts and folders; the trainers themselves are in :mod:`generation.train`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from generation.covariates import NAMES
from generation.train.latents import Latents, encode, fingerprint
from generation.train.loop import CONDITION, IMAGE, SHEETS, Data, Run
from generation.train.settings import DiffusionSettings, RegressionSettings, Settings
from generation.train.world import World
from synthbrain.dataset import SynthBrainDataset
from synthbrain.errors import TrainingError, UsageError
from synthbrain.generators import find_weights
from synthbrain.keys import volume_keys
from synthbrain.named import opener
from synthbrain.progress import track

if TYPE_CHECKING:
    from generation.presets import System

_HELD_OUT = 64


class Volumes:
    """Volumes of a cohort as trainers take them.

    Parameters
    ----------
    dataset
        Where from.
    shape
        Volumes of another shape are cut or filled with zeros about their middle.
    """

    def __init__(self, dataset: SynthBrainDataset, shape: tuple[int, int, int]) -> None:
        self.dataset, self.shape = dataset, shape
        table = dataset.table
        self._conditions = torch.tensor(table[list(NAMES)].to_numpy(dtype="float32"))
        self._conditional = dataset.manifest.header.conditional

    def __len__(self) -> int:
        return len(self.dataset)

    @functools.cached_property
    def names(self) -> list[str]:
        """What volumes are called where something of them is kept: ids, and what tells contents."""
        ids, keys = self.dataset.table.index, volume_keys(self.dataset)
        told = (f"{key} {self.shape}".encode() for key in keys)
        return [
            f"{id}-{hashlib.sha256(facts).hexdigest()[:16]}"
            for id, facts in zip(ids, told, strict=True)
        ]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``image`` ``(1, x, y, z)`` in [0, 1]; ``condition`` ``(4,)``, of a conditional cohort."""
        sample = {IMAGE: fitted(self.dataset[index]["image"], self.shape)}
        return sample | ({CONDITION: self._conditions[index]} if self._conditional else {})

    @property
    def conditional(self) -> bool:
        """Whether samples have covariates."""
        return self._conditional


def fitted(volume: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """A volume ``(1, x, y, z)`` cut or filled with zeros about its middle.

    Examples
    --------
    >>> fitted(torch.ones(1, 4, 2, 3), (2, 4, 3)).shape
    torch.Size([1, 2, 4, 3])
    """
    room = [there - here for here, there in zip(volume.shape[1:], shape, strict=True)]
    if not any(room):
        return volume
    sides = [side for gap in reversed(room) for side in (gap // 2, gap - gap // 2)]
    return nn.functional.pad(volume, sides)


def open_volumes(
    data: str,
    preset: System,
    *,
    generator: str | None = "auto",
    store: Path | None = None,
    limit: int | None = None,
) -> tuple[Volumes, Volumes | None]:
    """Volumes to train on, and volumes to validate on where there are any.

    Parameters
    ----------
    data
        As in :func:`synthbrain.named.opener`.
    preset
        What is trained: decides the shape.
    generator, store
        As in :class:`synthbrain.SynthBrainDataset`.
    limit
        Train on this many rows at most.

    Returns
    -------
    tuple
        Rows of the split ``train``, and up to 64 of ``validation``; where there is no such split,
        all rows, and None.

    Raises
    ------
    SynthBrainError
        There is no such cohort, or nothing in it.
    """
    make = opener(data, generator=generator, store=store)
    everything = make()
    splits = set(everything.table["split"])
    train = make(split="train" if "train" in splits else None, limit=limit)
    held_out = make(split="validation", limit=_HELD_OUT) if "validation" in splits else None
    return (
        Volumes(train, preset.shape),
        None if held_out is None else Volumes(held_out, preset.shape),
    )


@dataclass(frozen=True)
class Encoder:
    """An autoencoder whose latents a denoiser is trained on.

    Parameters
    ----------
    network
        MONAI's ``AutoencoderKL``.
    spec
        Its arguments.
    """

    network: nn.Module = field(repr=False)
    spec: dict[str, Any]

    @functools.cached_property
    def digest(self) -> str:
        """Hex SHA-256 of its weights."""
        return fingerprint(self.network.state_dict())

    def decode(self, latents: Tensor) -> Tensor:
        """Volumes ``(n, 1, x, y, z)`` of latents."""
        network: Any = self.network
        return network.decode(latents.to(next(self.network.parameters()))).float()


def open_encoder(name: str) -> Encoder:
    """The autoencoder of a training run, or of installed weights.

    Parameters
    ----------
    name
        A run's folder or checkpoint, or a name that `synthbrain weights list` shows.

    Raises
    ------
    WeightsError
        There is none.
    """
    from generation.train import release

    path = Path(name)
    if path.exists():
        found = release.trained(path)
        if found.network != "autoencoder":
            raise TrainingError(
                f"{name} holds a run of kind {found.kind!r}, expected 'autoencoder'; give the run "
                "of the autoencoder"
            )
        network = found.preset.build("autoencoder")
        network.load_state_dict(dict(found.state), assign=True)
        return Encoder(network.requires_grad_(False), found.preset.networks["autoencoder"])
    here = find_weights(name)
    if "autoencoder" not in here.files:
        raise TrainingError(f"{name} has no autoencoder; it is a {here.preset.system} system")
    return Encoder(here.network("autoencoder"), here.preset.networks["autoencoder"])


@dataclass(frozen=True)
class Training:
    """A training run on a cohort.

    Parameters
    ----------
    settings
        How.
    data, generator, store, limit
        What on, as in :func:`open_volumes`.
    out
        Folder of the run; one that holds a run of the same settings is gone on with.
    autoencoder
        Of a denoiser of latents: whose, as in :func:`open_encoder`.
    latents
        Where latents are kept; ``latents/`` in the run's folder by default.
    workers
        Processes that read ahead.
    device
        Where to train; the first GPU by default, else the CPU.
    """

    settings: Settings
    data: str
    out: Path
    generator: str | None = "auto"
    store: Path | None = None
    limit: int | None = None
    autoencoder: str | None = None
    latents: Path | None = None
    workers: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        if (self.settings.kind == "diffusion") != (self.autoencoder is not None):
            raise UsageError(
                "training the diffusion of latents needs --autoencoder: a run's folder or the name "
                "of installed weights"
                if self.autoencoder is None
                else f"--autoencoder is for kind 'diffusion', found {self.settings.kind!r}"
            )

    def start(self, *, progress: bool = True) -> Run:
        """Open the data, encode latents where they are trained on, and take up the run.

        Raises
        ------
        SynthBrainError, TrainingError, WeightsError
            Something is not there, or does not fit.
        """
        world = World.of_environment(self.device)
        train, held_out = open_volumes(
            self.data, self.settings.system, generator=self.generator, store=self.store,
            limit=self.limit,
        )  # fmt: skip
        self._check(train)
        if isinstance(self.settings, RegressionSettings):
            from generation.train.regression import RegressionRun, RegressionTask

            regressor = RegressionTask(self.settings, train)
            return RegressionRun(
                regressor, train, self.settings, self.out, world, held_out, self.workers
            )
        if self.autoencoder is not None:
            return self._denoiser(world, train, held_out, progress=progress)
        task = _task(self.settings)
        return Run(task, train, self.settings, self.out, world, held_out, self.workers)

    def _denoiser(
        self, world: World, train: Volumes, held_out: Volumes | None, *, progress: bool
    ) -> Run:
        assert self.autoencoder is not None
        assert isinstance(self.settings, DiffusionSettings)
        encoder = open_encoder(self.autoencoder)
        folder = self.latents or self.out / "latents"
        kept: list[Data | None] = []
        for volumes in (train, held_out):
            if volumes is None:
                kept.append(None)
                continue
            # Its own share, then what others have not done yet: none waits long for another.
            order = sorted(range(len(volumes)), key=lambda i: (i - world.rank) % world.size > 0)
            names = [volumes.names[index] for index in order]
            share: Data = Subset(volumes, order)  # type: ignore[arg-type, assignment]
            done = encode(share, names, encoder.network, folder, world.device)
            show = progress and world.rank == 0
            for _ in track(done, total=len(volumes), what="encoding", show=show):
                pass
            kept.append(Latents(folder, volumes.names))
        from generation.train.diffusion import DiffusionTask

        data, others = kept
        assert data is not None
        found, expected = tuple(data[0]["mean"].shape), self.settings.system.latent_shape
        if found != expected:
            raise TrainingError(
                f"latents of {self.autoencoder} are {found}, the system's {expected}; give its "
                "autoencoder, or change system.latent_shape"
            )
        encoder.network.to(world.device)
        task = DiffusionTask(self.settings, data, decode=encoder.decode, autoencoder=encoder.digest)
        return Run(task, data, self.settings, self.out, world, others, self.workers)

    def _check(self, train: Volumes) -> None:
        spec = self.settings.system.networks.get("unet", {})
        if spec.get("with_conditioning") and not train.conditional:
            raise TrainingError(
                f"{self.data} has no covariates, and the system is conditional; prepare the scans "
                "with a table of participants, or train kind 'pixel'"
            )


def sizes(settings: Settings) -> dict[str, int]:
    """Parameters of each network that a run trains and that is released."""
    networks = settings.system.networks
    trained = {"autoencoder": ["autoencoder"], "diffusion": ["unet"], "pixel": ["unet"]}
    return {
        name: sum(parameter.numel() for parameter in settings.system.build(name).parameters())
        for name in trained.get(settings.kind, list(networks))
    }


def _task(settings: Settings) -> Any:
    from generation.train.autoencoder import AutoencoderTask
    from generation.train.diffusion import DiffusionTask
    from generation.train.gan import LsganTask, VaeGanTask

    tasks: dict[str, Callable[[Any], Any]] = {
        "autoencoder": AutoencoderTask,
        "pixel": DiffusionTask,
        "vae-gan": VaeGanTask,
        "lsgan": LsganTask,
    }
    return tasks[settings.kind](settings)


def advance(run: Run, *, until: int | None = None) -> Iterator[dict[str, float]]:
    """Train, and write what TensorBoard shows beside the log.

    Parameters
    ----------
    run
        What to advance.
    until
        A step to stop at before the last.

    Yields
    ------
    dict
        The lines of the log.
    """
    from generation.train.board import Board

    if run.world.rank:
        yield from run.advance(until)
        return
    with Board(run.folder / "tensorboard", run.step) as board:
        for line in run.advance(until):
            board.add(line)
            board.add_sheets(run.folder / SHEETS)
            yield line
