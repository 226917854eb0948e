"""The loop all trainers share: batches, gradients, averages, checkpoints, log.

What is trained is a :class:`Task`. A run is a folder: ``settings.json``, ``log.jsonl`` and the
last checkpoints; running it again goes on, bit for bit on a CPU, at any number of processes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from generation.engine import peak_bytes
from generation.errors import TrainingError
from generation.train import checkpoints
from generation.train.networks import seeded
from generation.train.settings import Settings
from generation.train.sheets import Picture, draw_sheet
from generation.train.world import World, checks, draws, pass_seed, row_of

SHEETS = "sheets"
"""Where in a run's folder sample sheets are."""

_VALIDATED, _SHOWN = 16, 3

Sample = Mapping[str, Tensor]

IMAGE, MEAN, SPREAD, CONDITION = "image", "mean", "sigma", "condition"
"""Names of what samples hold: a volume ``(1, x, y, z)`` in [0, 1], or the mean and standard
deviation of its latent ``(c, x, y, z)``; and the covariates ``(4,)``."""


class Data(Protocol):
    """What is trained on: samples by number, each a dict of tensors."""

    def __len__(self) -> int:
        """How many."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """One of them."""
        ...


@dataclass(frozen=True)
class Batch:
    """Samples a process takes through the network at once.

    Parameters
    ----------
    samples
        Stacked tensors by name, on the device.
    draws
        For each sample, what is random about it.
    seed
        What the networks' own randomness begins with.
    """

    samples: Sample
    draws: Sequence[torch.Generator]
    seed: int = 0

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal values for each sample, ``(n, *shape)``, on the device."""
        values = torch.stack([torch.randn(tuple(shape), generator=draw) for draw in self.draws])
        return values.to(self._device)

    def uniform(self) -> Tensor:
        """A number in [0, 1) for each sample, ``(n,)`` float64, on the device."""
        values = [torch.rand((), generator=draw, dtype=torch.float64) for draw in self.draws]
        return torch.stack(values).to(self._device, torch.float64)

    @property
    def _device(self) -> torch.device:
        return next(iter(self.samples.values())).device


class Task(Protocol):
    """What is trained, and how its losses come about."""

    modules: dict[str, nn.Module]
    """Networks to train, by player: each has an optimiser of its own."""

    def turns(self, step: int) -> Sequence[str]:
        """The players that move at a step, in this order."""
        ...

    def loss(self, player: str, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of a batch for a player, and what to log."""
        ...

    def validate(self, batch: Batch) -> dict[str, Tensor]:
        """How good the networks are on samples that are not trained on, by name."""
        ...

    def show(self, batch: Batch) -> Sequence[Picture]:
        """What the networks make, of samples that are not trained on or of noise alone."""
        ...

    def state(self) -> dict[str, Any]:
        """What else a checkpoint must hold: tensors, numbers and text."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` gave."""
        ...


@dataclass(eq=False)
class Run:
    """A training run.

    Parameters
    ----------
    task
        What is trained; its modules are moved to the world's device.
    data
        What on.
    settings
        How.
    folder
        Where the run is kept; one that holds a run of the same settings is gone on with.
    world
        The processes that share it.
    held_out
        Samples to validate on and to show; some of ``data`` without.
    workers
        Processes that read samples ahead.
    told
        Called with the number of steps done, after each.

    Raises
    ------
    TrainingError
        The folder holds a run of other settings.
    """

    task: Task
    data: Data
    settings: Settings
    folder: Path
    world: World = field(default_factory=World)
    held_out: Data | None = None
    workers: int = 0
    told: Callable[[int], None] | None = None
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if len(self.data) == 0:
            raise TrainingError("there is nothing to train on")
        unknown = set(self.settings.rates) - set(self.task.modules)
        if unknown:
            raise TrainingError(
                f"rates names {', '.join(sorted(unknown))}; the networks trained are "
                f"{', '.join(self.task.modules)}"
            )
        self.world.places(self.settings.batch)
        for module in self.task.modules.values():
            module.to(self.world.device).train().requires_grad_(True)
        self._optimisers = {
            player: torch.optim.AdamW(
                module.parameters(),
                lr=self.settings.learning_rate,
                betas=self.settings.betas,
                weight_decay=self.settings.weight_decay,
            )
            for player, module in self.task.modules.items()
        }
        self.averages = {
            player: {name: value.detach().clone() for name, value in module.state_dict().items()}
            for player, module in self.task.modules.items()
            if self.settings.average
        }
        self._claim()
        self._resume()

    def advance(self, until: int | None = None) -> Iterator[dict[str, float]]:
        """Train up to a step, the last one by default; yields what is logged, when it is.

        A new run validates and draws a sheet before its first step: what fails, fails early.

        Raises
        ------
        TrainingError
            The loss is not finite any more, or a checkpoint cannot be written.
        """
        end = self.settings.steps if until is None else min(until, self.settings.steps)
        if self.step == 0:
            yield from self._look(due=False)
        began, first = time.perf_counter(), self.step
        for feed in self._feeds(end):
            losses = self._take_step(feed)
            self.step += 1
            if self.told is not None:
                self.told(self.step)
            last = self.step == self.settings.steps
            yield from self._look(due=not last)
            if self._due(self.settings.log_every) or self.step == end:
                rate = (self.step - first) / (time.perf_counter() - began)
                yield self._log(losses | {"samples_per_second": rate * self.settings.batch})
            if last or self._due(self.settings.keep_every):
                self.keep()

    def _look(self, *, due: bool) -> Iterator[dict[str, float]]:
        """Validate and draw a sheet: where due, or at both ends of a run anyway."""
        settings = self.settings
        if settings.sheet_every and (not due or self._due(settings.sheet_every)):
            self.show()
        if settings.validate_every and (not due or self._due(settings.validate_every)):
            yield self._log(self.validate())

    def keep(self) -> None:
        """Write a checkpoint."""
        if self.world.rank == 0:
            checkpoints.write(self.folder, self.step, self._state(), keep=self.settings.keep)
        self.world.barrier()

    def weights(self, player: str) -> dict[str, Tensor]:
        """A network's weights as they are to be used: averaged, where an average is kept."""
        if player in self.averages:
            return self.averages[player]
        return self.task.modules[player].state_dict()

    def validate(self) -> dict[str, float]:
        """How good the averaged networks are; the same draws every time."""
        batches = [self._held_out(place) for place in self._places(_VALIDATED)]
        found: dict[str, float] = {}
        with self._averaged():
            for batch in batches:
                with self._precision():
                    values = self.task.validate(batch)
                for name, value in values.items():
                    found[name] = found.get(name, 0.0) + float(value) / len(batches)
        return {f"validation/{name}": value for name, value in found.items()}

    def show(self) -> None:
        """Draw what the averaged networks make on a sample sheet."""
        path = self.folder / SHEETS / f"step-{self.step:09d}.png"
        if self.world.rank == 0:
            with self._averaged(), self._precision():
                shown = [
                    p
                    for place in self._places(_SHOWN)
                    for p in self.task.show(self._held_out(place))
                ]
            draw_sheet(shown, path, f"step {self.step:,}")
        self.world.barrier()

    def _take_step(self, feed: list[Sample]) -> dict[str, float]:
        told: dict[str, Tensor] = {}
        batches = self._batches(feed)
        shares = [len(batch.draws) / len(feed) for batch in batches]
        for player in self.task.turns(self.step):
            for name, module in self.task.modules.items():
                module.requires_grad_(name == player)
            module, optimiser = self.task.modules[player], self._optimisers[player]
            optimiser.zero_grad(set_to_none=True)
            for batch, share in zip(batches, shares, strict=True):
                with self._precision(), seeded(batch.seed):
                    loss, parts = self.task.loss(player, batch, self.step)
                (loss * share).backward()
                for name, value in {player: loss, **parts}.items():
                    told[name] = told.get(name, 0) + value.detach().float() * share
            self.world.average_gradients(module)
            norm = nn.utils.clip_grad_norm_(module.parameters(), self.settings.clip)
            if not torch.isfinite(norm):
                raise TrainingError(
                    f"the gradient of {player} is not finite at step {self.step}; go on from the "
                    "last checkpoint with a lower learning_rate"
                )
            optimiser.param_groups[0]["lr"] = self._rate(player)
            optimiser.step()
            self._average(player)
        names = sorted(told)
        values = self.world.mean(torch.stack([told[name].reshape(()) for name in names]))
        return dict(zip(names, values.tolist(), strict=True))

    def _feeds(self, end: int) -> Iterator[list[Sample]]:
        """This process's samples of each step that is left, read ahead by the workers."""
        settings, places = self.settings, self.world.places(self.settings.batch)
        rows = (
            [row_of(settings.seed, step, place, settings.batch, len(self.data)) for place in places]
            for step in range(self.step, end)
        )
        loader = DataLoader(
            cast("Dataset[Sample]", self.data),
            batch_sampler=rows,
            num_workers=self.workers,
            collate_fn=list,
        )
        return iter(loader)

    def _batches(self, feed: list[Sample]) -> list[Batch]:
        """This process's share of the step's global batch, in as many parts as asked for."""
        settings, places = self.settings, self.world.places(self.settings.batch)
        size = -(-len(places) // settings.accumulate)
        return [
            self._batch(
                feed[start : start + size],
                [draws(settings.seed, self.step, place) for place in places[start : start + size]],
                pass_seed(settings.seed, self.step, places[start]),
            )
            for start in range(0, len(places), size)
        ]

    def _batch(
        self, samples: Sequence[Sample], randomness: Sequence[torch.Generator], seed: int = 0
    ) -> Batch:
        stacked = {
            name: torch.stack([sample[name] for sample in samples]).to(self.world.device)
            for name in samples[0]
        }
        return Batch(stacked, randomness, seed)

    def _places(self, most: int) -> range:
        return range(min(most, len(self.held_out or self.data)))

    def _held_out(self, place: int) -> Batch:
        data = self.held_out or self.data
        return self._batch([data[place]], [checks(self.settings.seed, place)])

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Networks as they are to be used, in evaluation mode and without gradients."""
        modules = self.task.modules
        kept = {
            player: {name: value.clone() for name, value in modules[player].state_dict().items()}
            for player in self.averages
        }
        try:
            for player, module in modules.items():
                module.eval()
                if player in kept:
                    module.load_state_dict(self.averages[player])
            with torch.no_grad():
                yield
        finally:
            for player, module in modules.items():
                module.train()
                if player in kept:
                    module.load_state_dict(kept[player])

    def _precision(self) -> AbstractContextManager[Any]:
        enabled = self.settings.precision == "bfloat16"
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=enabled)

    def _rate(self, player: str) -> float:
        settings = self.settings
        rate = settings.rates.get(player, settings.learning_rate)
        if settings.half_life:
            rate *= 0.5 ** (self.step / settings.half_life)
        return rate * min(1.0, (self.step + 1) / max(1, settings.warm_up))

    @torch.no_grad()
    def _average(self, player: str) -> None:
        if player not in self.averages:
            return
        share = 1 - min(self.settings.average, (1 + self.step) / (10 + self.step))
        for name, value in self.task.modules[player].state_dict().items():
            kept = self.averages[player][name]
            if value.is_floating_point():
                kept.lerp_(value, share)
            else:
                kept.copy_(value)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _log(self, values: dict[str, float]) -> dict[str, float]:
        line = {**values, "step": self.step}
        line["peak_gb"] = peak_bytes(self.world.device) / 1e9
        if self.world.rank == 0:
            with (self.folder / "log.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        return line

    def _claim(self) -> None:
        """Keep the settings in the folder, or find the same ones there."""
        path, text = self.folder / "settings.json", self.settings.text()
        if path.exists() and path.read_text() != text:
            raise TrainingError(
                f"{self.folder} holds a run of other settings; choose another folder, or change "
                f"them back (they are in {path})"
            )
        if self.world.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            scratch = path.with_suffix(f".{os.getpid()}.partial")  # other ranks are just reading it
            scratch.write_text(text)
            scratch.replace(path)

    def _resume(self) -> None:
        there = checkpoints.steps(self.folder)
        if not there:
            return
        state = checkpoints.read(self.folder / f"step-{there[-1]:09d}.pt")
        for player, module in self.task.modules.items():
            module.load_state_dict(state["modules"][player])
            self._optimisers[player].load_state_dict(state["optimisers"][player])
        for player, average in self.averages.items():
            for name, value in state["averages"][player].items():
                average[name].copy_(value)
        self.task.restore(state["task"])
        self.step = int(state["step"])

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "settings": self.settings.text(),
            "modules": {name: m.state_dict() for name, m in self.task.modules.items()},
            "optimisers": {name: o.state_dict() for name, o in self._optimisers.items()},
            "averages": self.averages,
            "task": self.task.state(),
        }
