"""Runs a diffusion U-Net from noise to samples: precision, batches, compilation, CUDA graphs.

:func:`prepare` turns a network into a :class:`Denoiser`, :class:`Sampler` draws with it. State and
solver arithmetic are float32 whatever the network computes in, and a row's noise comes from a
generator of its own, so that what a row gives depends neither on its batch nor on the device
beyond rounding.
"""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from generation.diffusion import TARGETS, Table
from generation.fast_unet import FastUNet
from generation.options import Options
from generation.presets import Preset
from generation.solvers import Solution, integrate

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, how much of it is done, and how much there is."""


class Network(Protocol):
    """A U-Net as samplers call it."""

    dtype: torch.dtype

    def condition(self, values: Tensor, shape: Sequence[int]) -> Any:
        """What depends on a batch's rows but not on the step: ``values`` is ``(n, k)``."""
        ...

    def __call__(self, x: Tensor, i: int, conditions: Any) -> Tensor:
        """The output at evaluation ``i``."""
        ...


class PlainNetwork:
    """MONAI's own module, called as the published samplers call it."""

    def __init__(
        self, unet: nn.Module, times: Sequence[int], *, constants: int, options: Options
    ) -> None:
        self.dtype = options.type
        self.unet = unet.to(options.place, self.dtype)
        self.times, self.constants = times, constants

    def condition(self, values: Tensor, shape: Sequence[int]) -> Any:
        """Constant maps and the context's token."""
        if not self.constants:
            return None, None
        values = values.to(self.dtype)
        return values[:, :, None, None, None].expand(-1, -1, *shape), values[:, None]

    def __call__(self, x: Tensor, i: int, conditions: Any) -> Tensor:
        """Concatenate and call."""
        maps, context = conditions
        x = x.to(self.dtype)
        times = torch.full((len(x),), self.times[i], device=x.device)
        return self.unet(x if maps is None else torch.cat([x, maps], 1), times, context=context)


class FastNetwork:
    """The rewritten network, compiled and graphed if asked."""

    def __init__(
        self, unet: nn.Module, times: Sequence[int], *, constants: int, options: Options
    ) -> None:
        self.dtype = options.type
        fast = FastUNet(unet, times, constants=constants, dtype=self.dtype).to(options.place)
        self.condition, self._table = fast.condition, fast.table
        self._forward: Callable[..., Tensor] = fast
        if options.compile:
            self._forward = torch.compile(fast, dynamic=False)
        self._graphed = options.graphs and options.place.type == "cuda"
        self._graph: tuple[torch.Size, _Graph] | None = None

    def __call__(self, x: Tensor, i: int, conditions: Any) -> Tensor:
        """Call, or replay the graph of a call of this shape."""
        inputs = (x, self._table[i], *conditions)
        if not self._graphed:
            return self._forward(*inputs)
        if self._graph is None or self._graph[0] != x.shape:
            self._graph = None  # it holds on to its memory
            self._graph = (x.shape, _Graph(self._forward, inputs))
        return self._graph[1](inputs)


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A network that predicts clean volumes at the points of one solution.

    Parameters
    ----------
    network
        The U-Net.
    solution
        Whose evaluations it is asked for.
    state, output
        ``(n,)``: the clean volume is ``state[i] x + output[i] network(x)``.
    """

    network: Network
    solution: Solution
    state: Table
    output: Table

    def __call__(self, x: Tensor, i: int, conditions: Any) -> Tensor:
        """Predicted clean volumes, of the type of ``x``."""
        output = self.network(x, i, conditions).to(x.dtype)
        a, b = float(self.state[i]), float(self.output[i])
        return (x * a).add_(output, alpha=b) if a else output * b


class _Graph:
    """One call, recorded on a GPU and replayed without the host's help."""

    def __init__(self, call: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = call(*self.inputs)

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        for static, tensor in zip(self.inputs, inputs, strict=True):
            static.copy_(tensor)
        self.graph.replay()
        return self.output


def prepare(
    unet: nn.Module, preset: Preset, target: str, options: Options, *, constants: int
) -> Denoiser:
    """Make a U-Net ready to sample.

    Parameters
    ----------
    unet
        MONAI's ``DiffusionModelUNet`` with its weights.
    preset
        Whose noise schedule it was trained with.
    target
        What it predicts: a name of :data:`generation.diffusion.TARGETS`.
    options
        Solver, steps, type, device.
    constants
        How many of its input channels are constant, see :class:`generation.fast_unet.FastUNet`.

    Returns
    -------
    Denoiser
        Frozen, on the device.
    """
    solution = options.solution(preset)
    kind = FastNetwork if options.rewrite else PlainNetwork
    network = kind(unet, solution.timesteps.tolist(), constants=constants, options=options)
    alpha, sigma = solution.alpha, solution.sigma
    return Denoiser(network, solution, *TARGETS[target](alpha, sigma).clean(alpha, sigma))


class RowNoise:
    """Standard normal noise of some rows, each from a generator seeded by the row.

    Parameters
    ----------
    seeds
        One per row, any Python integer below 2**64; PyTorch's generator on the CPU looks at the
        lowest 32 bits alone.
    shape
        Of one row.

    Examples
    --------
    >>> alone = RowNoise([7], (2, 3)).draw()
    >>> bool((RowNoise([3, 7], (2, 3)).draw()[1] == alone[0]).all())
    True
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int]) -> None:
        self.sources = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self.shape = tuple(shape)

    def draw(self) -> Tensor:
        """Fresh noise, ``(n, *shape)`` float32."""
        return torch.stack([torch.randn(self.shape, generator=s) for s in self.sources])


@dataclass
class Timing:
    """What a stage took: all calls together, and how many."""

    seconds: float = 0.0
    calls: int = 0

    @property
    def mean(self) -> float:
        """Seconds of one call; 0 before the first."""
        return self.seconds / max(self.calls, 1)


@dataclass
class Sampler:
    """Draws samples of one shape with a denoiser.

    Parameters
    ----------
    denoiser
        From :func:`prepare`.
    shape
        Of one sample, ``(c, x, y, z)``.
    options
        Those it was prepared with.
    clip
        Bounds of its predictions, or None.
    """

    denoiser: Denoiser
    shape: tuple[int, ...]
    options: Options
    clip: tuple[float, float] | None = None
    step: Timing = field(default_factory=Timing)

    @torch.inference_mode()
    def draw(
        self, seeds: Sequence[int], values: Tensor, progress: Progress | None = None
    ) -> Tensor:
        """One sample per seed.

        Parameters
        ----------
        seeds
            ``n`` integers.
        values
            ``(n, k)`` conditioning values; ``k`` may be 0.
        progress
            Told about every step.

        Returns
        -------
        Tensor
            ``(n, *shape)`` on the device, float32 or the network's type if that is wider.
        """
        total = len(seeds) * len(self.denoiser.solution)
        done = 0
        parts: list[Tensor] = []

        def tell(rows: int) -> Callable[[int, Tensor], None] | None:
            if progress is None:
                return None
            return lambda i, _: progress("sampling", done + rows * (i + 1), total)

        for part in self._batches(len(seeds)):
            size = part.stop - part.start
            parts.append(self._batch(seeds[part], values[part], tell(size)))
            done += size * len(self.denoiser.solution)
        return torch.cat(parts)

    def _batches(self, n: int) -> Iterator[slice]:
        for start in range(0, n, self.options.rows):
            yield slice(start, min(start + self.options.rows, n))

    def _batch(
        self, seeds: Sequence[int], values: Tensor, callback: Callable[[int, Tensor], None] | None
    ) -> Tensor:
        """One batch, in halves where the GPU's memory does not do."""
        try:
            return self._integrate(seeds, values, callback)
        except torch.cuda.OutOfMemoryError:
            if len(seeds) == 1:
                raise
        gc.collect()
        torch.cuda.empty_cache()
        middle = len(seeds) // 2
        halves = (slice(0, middle), slice(middle, None))
        return torch.cat([self._batch(seeds[h], values[h], callback) for h in halves])

    def _integrate(
        self, seeds: Sequence[int], values: Tensor, callback: Callable[[int, Tensor], None] | None
    ) -> Tensor:
        device, denoiser = self.options.place, self.denoiser
        noise = RowNoise(seeds, self.shape)
        state = torch.promote_types(torch.float32, denoiser.network.dtype)
        conditions = denoiser.network.condition(values.to(device), self.shape[1:])
        began = time.perf_counter()
        sample = integrate(
            denoiser.solution,
            lambda x, i: denoiser(x, i, conditions),
            noise.draw().to(device, state),
            clip=self.clip,
            noise=lambda: noise.draw().to(device, state),
            callback=callback,
        )
        synchronise(device)
        self.step.seconds += time.perf_counter() - began
        self.step.calls += len(denoiser.solution) * len(seeds)
        return sample


def synchronise(device: torch.device) -> None:
    """Wait for a GPU to finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device) -> int:
    """Most memory held so far: allocated on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_bytes(device: torch.device) -> int:
    """Memory that could be allocated now."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    import psutil

    return int(psutil.virtual_memory().available)


def as_seeds(column: Any) -> list[int]:
    """A table's seed column as Python integers."""
    return [int(seed) for seed in np.asarray(column)]
