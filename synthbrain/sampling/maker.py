"""Orders of many clients, made in batches, and a row once however many ask for it."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from generation.covariates import NAMES
from synthbrain.errors import GeneratorError, SynthBrainError
from synthbrain.quantise import Array
from synthbrain.sampling.protocol import Facts, Row
from synthbrain.sampling.spec import Spec

if TYPE_CHECKING:
    import pandas as pd

    from generation.generator import Generator

_GATHER_SECONDS = 0.005
"""How long a batch that is not full waits for more rows."""

Work = Literal["sample", "sample_latents", "decode"]
"""Which of a generator's methods is wanted."""

_Key = tuple[str | float | int, ...]


@dataclass(eq=False)
class Order:
    """One volume or latent that is waited for, and in the end its values or an error.

    Parameters
    ----------
    work
        How it is made.
    of
        The row it is made of, or with ``"decode"`` the latent.
    """

    work: Work
    of: Row | Array
    waiters: int = 1
    values: Array | None = None
    error: Exception | None = None

    @property
    def key(self) -> _Key:
        """What its values depend on; latents are compared with none."""
        return (self.work, id(self)) if self.work == "decode" else (self.work, *self.of[1:])

    @property
    def done(self) -> bool:
        """Whether there is something to collect."""
        return self.values is not None or self.error is not None


class Maker:
    """Holds the generator, and the queue of rows in front of it.

    Parameters
    ----------
    spec
        What to load, in the thread that runs :meth:`run`.
    batch
        Rows to give the generator at once; as many as it likes by default.
    memory
        Share of its GPU's memory that it may use, in (0, 1]; all of it by default.
    """

    def __init__(self, spec: Spec, batch: int | None = None, memory: float | None = None) -> None:
        self.spec, self.batch, self.memory = spec, batch or 0, memory
        self.facts: Facts | None = None
        self.failure: Exception | None = None
        self.made = 0
        self._orders: dict[_Key, Order] = {}
        self._queue: dict[_Key, Order] = {}
        self._changed = threading.Condition()

    @property
    def queued(self) -> int:
        """Rows that nobody is making yet."""
        return len(self._queue)

    def run(self) -> None:
        """Load the generator, then make rows for ever; an end means that it is unfit to go on."""
        try:
            _limit(self.memory, self.spec.device)
            generator = self.spec.load()
            self.batch = self.batch or generator.batch_size
            self.facts = Facts.of(generator, self.batch)
        except Exception as error:
            if not isinstance(error, SynthBrainError):  # those say all there is to say
                traceback.print_exc()
            self.failure = error
            return
        finally:
            with self._changed:
                self._changed.notify_all()
        while True:
            self._make(generator, self._take())

    def loaded(self, seconds: float) -> bool:
        """Wait for the generator; whether it is there, or never will be."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self.facts or self.failure), seconds)

    def submit(self, work: Work, of: Iterable[Row | Array]) -> list[Order]:
        """Order things; to be passed to :meth:`collected`, and to :meth:`forget` in the end."""
        with self._changed:
            orders = [self._joined(Order(work, one)) for one in of]
            self._changed.notify_all()
        return orders

    def _joined(self, order: Order) -> Order:
        if (same := self._orders.get(order.key)) is not None:
            same.waiters += 1
            return same
        self._orders[order.key] = self._queue[order.key] = order
        return order

    def collected(self, orders: Sequence[Order], seconds: float) -> bool:
        """Wait for orders; whether they are all done."""
        with self._changed:
            return self._changed.wait_for(lambda: all(order.done for order in orders), seconds)

    def forget(self, orders: Iterable[Order]) -> None:
        """Stop waiting for orders; those nobody else waits for are not made any more."""
        with self._changed:
            for order in orders:
                order.waiters -= 1
                if not order.waiters and self._orders.get(order.key) is order:
                    self._queue.pop(order.key, None)
                    del self._orders[order.key]

    def _take(self) -> list[Order]:
        """Wait for a batch; a little longer where it is not full."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._queue))
            self._changed.wait_for(lambda: len(self._queue) >= self.batch, _GATHER_SECONDS)
            work = next((order.work for order in self._queue.values()), None)
            keys = [key for key, order in self._queue.items() if order.work == work]
            return [self._queue.pop(key) for key in keys[: self.batch]]

    def _make(self, generator: Generator, orders: list[Order]) -> None:
        """Make orders together; in halves where that fails, down to the row that is to blame."""
        if not orders:
            return
        values, error = self._tried(generator, orders)
        if values is not None:
            self._finish(orders, values)
        elif len(orders) == 1:
            self._fail(orders[0], error)
        else:
            half = len(orders) // 2
            if _is_memory(error):
                self.batch = min(self.batch, half)
                _log(f"out of memory with {len(orders)} rows; from now on {self.batch} at once")
            for start in range(0, len(orders), half):
                self._make(generator, orders[start : start + half])

    def _tried(
        self, generator: Generator, orders: list[Order]
    ) -> tuple[Array | None, Exception | None]:
        try:
            return _called(generator, orders[0].work, [order.of for order in orders]), None
        except Exception as error:
            if "CUDA error" in str(error):
                raise  # the process cannot use the device any more, another one can
            traceback.print_exc()
            # Its frames hold the tensors that there was no room for.
            return None, error.with_traceback(None)

    def _finish(self, orders: list[Order], values: Array) -> None:
        with self._changed:
            self.made += len(orders)
            for order, mine in zip(orders, values, strict=True):
                order.values = mine
                self._settle(order)

    def _fail(self, order: Order, error: Exception | None) -> None:
        with self._changed:
            order.error = error
            self._settle(order)

    def _settle(self, order: Order) -> None:
        """Nobody can join an order any more."""
        if self._orders.get(order.key) is order:
            del self._orders[order.key]
        self._changed.notify_all()


def _called(generator: Any, work: Work, of: list[Any]) -> Array:
    """What a method of the generator gives for some rows or latents, ``(n, ...)`` float32."""
    import torch

    given = torch.from_numpy(np.stack(of)) if work == "decode" else _table(of)
    made = getattr(generator, work)(given)
    one = generator.latent_shape if work == "sample_latents" else (1, *generator.shape)
    expected = (len(of), *one)
    if tuple(made.shape) != expected:
        raise GeneratorError(
            f"generator {generator.name!r} gave an array of shape {tuple(made.shape)}, expected "
            f"{expected}; check it with synthbrain.testing.check_generator"
        )
    return made.detach().float().cpu().numpy()


def _table(rows: list[Row]) -> pd.DataFrame:
    import pandas as pd

    ids, *covariates, seeds = zip(*rows, strict=True)
    columns = dict(zip(NAMES, covariates, strict=True)) | {"seed": seeds}
    return pd.DataFrame(columns, index=pd.Index(ids, name="id"))


def _limit(memory: float | None, device: str | None) -> None:
    """Leave the rest of a GPU's memory to whoever trains on it."""
    import torch

    if memory is None or device == "cpu" or not torch.cuda.is_available():
        return
    torch.cuda.set_per_process_memory_fraction(memory, device)


def _is_memory(error: Exception | None) -> bool:
    """Whether there was no room; gives what the device's cache holds back if so."""
    import torch

    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "can't allocate memory" in str(error)  # PyTorch's words on the CPU
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return True


def _log(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)
