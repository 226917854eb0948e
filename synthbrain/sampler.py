"""The order rows are trained on: a pure permutation of (seed, epoch), split over ranks.

An epoch's order holds every row once. Nothing in it depends on workers or ranks: a *position* in
it means the same rows in a run of one process and in a run of sixty-four, so a run may stop
anywhere and go on with another number of either.

The order sorts the rows by 64-bit numbers of Philox keyed with (seed, epoch). That is as uniform
as the numbers are, for any count of rows, which a Feistel network of few rounds is not for small
ones. It rests on nothing that a release of NumPy may change: the bits of Philox are specified, and
what :meth:`numpy.random.Generator.permutation` makes of them is not. It costs eight bytes a row.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sized
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist
from torch.utils.data import Sampler

from synthbrain.ahead import HasSupply, LookAhead
from synthbrain.epochs import Epoch
from synthbrain.errors import UsageError
from synthbrain.manifest import Manifest

if TYPE_CHECKING:
    from numpy.typing import NDArray

_STATE = ("rows_digest", "seed", "epoch", "position")
_STREAM = int.from_bytes(b"order", "big")
"""High word of Philox's counter: keys are shared with other draws of a seed, numbers are not."""


class SynthBrainSampler(Sampler[int]):
    """Rows in an order that can be stopped and gone on with, exactly, by any number of ranks.

    Parameters
    ----------
    dataset
        The dataset to sample from, or how many rows it has.
    seed
        Another seed gives another order in every epoch. In [0, 2**64).
    shuffle
        With False rows come as they lie in the dataset, every epoch.
    rank, world_size
        This process among those that train together: both, or neither for those of
        :mod:`torch.distributed` where it is initialised, and one process otherwise.
    drop_last
        What becomes of rows that do not go round among the ranks. With False the order goes on
        with its own beginning until they do, so a few rows come twice; with True the last rows
        are left out of this epoch.
    rows_digest
        Identity of the rows, kept in the state and compared when one is loaded. By default that
        of the dataset's manifest, if it has one.
    ahead
        How many rows beyond those already drawn to have fetched, or made by the sampling service,
        where they are missing; 0 for none. Threads of this process see to it while somebody
        iterates.

    Raises
    ------
    UsageError
        An argument makes no sense, or ranks would get no rows.

    Notes
    -----
    A sampler that shuffles sets the epoch of its dataset, which patches are drawn for, when it
    begins one; :meth:`set_epoch` of either chooses it for both.

    From the position it starts at, rank ``r`` of ``w`` takes every ``w``-th row of the order,
    beginning with the ``r``-th. All ranks get as many.

    A loader draws batches ahead of the loop that trains on them. Tell :meth:`state_dict` how many
    samples that loop has had, or use torchdata's ``StatefulDataLoader``, which keeps count itself
    and calls :meth:`state_dict` and :meth:`load_state_dict`. It wants as many workers again.

    One sampler serves one loader at a time.

    Examples
    --------
    Save after every batch, and go on in the middle of an epoch::

        sampler = SynthBrainSampler(ds, seed=7)
        loader = ds.loader(batch_size=8, sampler=sampler, num_workers=4)
        if checkpoint is not None:
            sampler.load_state_dict(checkpoint)
        for epoch in range(sampler.epoch, 100):
            sampler.set_epoch(epoch)
            for step, batch in enumerate(loader, start=1):
                ...
                checkpoint = sampler.state_dict(consumed=8 * step)

    >>> first, second = (SynthBrainSampler(5, rank=rank, world_size=2) for rank in range(2))
    >>> list(first), list(second)
    ([2, 0, 4], [3, 1, 2])
    """

    def __init__(
        self,
        dataset: Sized | int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
        drop_last: bool = False,
        rows_digest: str = "",
        ahead: int = 256,
    ) -> None:
        self._size = _size(dataset)
        self._seed = whole("seed", seed, below=2**64)
        self._rank, self._world_size = _world(rank, world_size)
        if drop_last and self._size < self._world_size:
            raise UsageError(
                f"{self._size} rows do not go round among {self._world_size} ranks; "
                "leave drop_last out, or use fewer ranks"
            )
        self._supply = dataset.supply() if isinstance(dataset, HasSupply) else None
        self._ahead = whole("ahead", ahead)
        self._epochs = _epochs_of(dataset) if shuffle else None
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.rows_digest = rows_digest or _digest_of(dataset)
        self._begin(0, 0)

    def __len__(self) -> int:
        """Samples of a whole epoch on each rank, also while only the rest of one is to come."""
        return self._left(0)

    def __iter__(self) -> Iterator[int]:
        """The rows of this rank in this epoch; drawn to the end, the next epoch is to come."""
        self._begin(self._epoch, self._start)
        return self._draw()

    def __repr__(self) -> str:
        return (
            f"<SynthBrainSampler of {self._size:,} rows: epoch {self._epoch}, position "
            f"{self._position}, rank {self._rank} of {self._world_size}>"
        )

    @property
    def epoch(self) -> int:
        """The epoch rows are drawn from."""
        return self._epoch

    @property
    def position(self) -> int:
        """Samples of this epoch that all ranks have drawn; with workers, ahead of training."""
        return self._position

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, which starts at its beginning unless a loaded state lies in it.

        Without this, the next epoch follows when this one has been drawn to its end. Where loops
        may be left early, call it before each: how far workers draw ahead is not part of the order.

        Parameters
        ----------
        epoch
            In [0, 2**63).

        Raises
        ------
        UsageError
            Not a whole number, or a negative one.
        """
        self._choose(whole("epoch", epoch, below=2**63))
        if self._epochs is not None:
            self._epochs.taken()  # before this, and no longer meant

    def upcoming(self, position: int, count: int) -> NDArray[np.int64]:
        """Rows this rank is asked for next in this epoch, from some position on.

        A pure function of seed, epoch, rank and the arguments: nothing is drawn.

        Parameters
        ----------
        position
            Samples that all ranks have had of this epoch, as :attr:`position`.
        count
            How many rows to look ahead at most.

        Returns
        -------
        ndarray
            ``(m,)`` rows in the order they will be asked for, ``m <= count``; fewer where the
            epoch ends.

        Raises
        ------
        UsageError
            Not a whole number, or a negative one.
        """
        position = whole("position", position)
        count = min(whole("count", count), self._left(position))
        places = (position + self._rank + self._world_size * np.arange(count)) % self._size
        return self._order()[places] if self.shuffle else places

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """Where in the order training is; the same on every rank that has had as many samples.

        Parameters
        ----------
        consumed
            Samples this rank has trained on since it last began to iterate: batches of this loop
            times the batch size, where a smaller last batch may count as a whole one. By default
            all that were drawn, which is right where nothing draws ahead, and after the last batch
            of an epoch.

        Returns
        -------
        dict
            ``rows_digest``, ``seed``, ``epoch`` and ``position``, the samples that all ranks had
            of this epoch. The end of an epoch is the beginning of the next.

        Raises
        ------
        UsageError
            Not a whole number, or a negative one.
        """
        first_epoch, first = self._origin
        epoch, position = self._epoch, self._position
        if consumed is not None:
            epoch, position = first_epoch, first + self._world_size * whole("consumed", consumed)
        if position >= first + self._world_size * self._left(first):
            epoch, position = epoch + 1, 0
        return {
            "rows_digest": self.rows_digest,
            "seed": self._seed,
            "epoch": epoch,
            "position": position,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, of a run with any number of ranks and workers.

        The seed is taken from the state; ``shuffle`` and ``drop_last`` are not part of it.

        Parameters
        ----------
        state
            What :meth:`state_dict` returned.

        Raises
        ------
        UsageError
            A state of other rows, or one that :meth:`state_dict` never returned.
        """
        missing = [name for name in _STATE if name not in state]
        if missing:
            raise UsageError(
                f"a sampler's state has {', '.join(_STATE)}, found one without "
                f"{', '.join(missing)}; load what state_dict() returned"
            )
        if state["rows_digest"] != self.rows_digest:
            raise UsageError(
                f"this state is of rows {_short(state['rows_digest'])}, and the sampler's are "
                f"{_short(self.rows_digest)}; select the rows the state was saved with, or start "
                "without it"
            )
        seed = whole("seed of a state", state["seed"], below=2**64)
        epoch = whole("epoch of a state", state["epoch"], below=2**63)
        position = whole("position of a state", state["position"], below=self._size)
        self._seed = seed
        if self._epochs is not None:
            self._epochs.taken()
        if self._left(position):
            self._begin(epoch, position)
        else:  # fewer rows than there are ranks now, with drop_last
            self._begin(epoch + 1, 0)

    def _order(self) -> NDArray[np.int64]:
        """The rows of this epoch, of all ranks."""
        return epoch_order(self._size, self._seed, self._epoch)

    def _choose(self, epoch: int) -> None:
        self._begin(epoch, self._start if epoch == self._epoch else 0)

    def _begin(self, epoch: int, position: int) -> None:
        """Be about to draw from a position."""
        self._epoch, self._position = epoch, position
        self._start = position  # of the next iteration
        self._origin = epoch, position  # of the latest one

    def _draw(self) -> Iterator[int]:
        # Only now: loaders make iterators that they throw away, and those must not use it up.
        if self._epochs is not None:
            if (chosen := self._epochs.taken()) is not None:
                self._choose(chosen)
            self._epochs.begin(self._epoch)
        self._begin(self._epoch, self._start)
        self._start = 0
        rows = self.upcoming(self._position, self._size)
        with self._looking_ahead(rows) as asked:
            for count, row in enumerate(rows, start=1):
                self._position += self._world_size
                asked(count)
                yield int(row)
        self._epoch, self._position = self._epoch + 1, 0

    @contextlib.contextmanager
    def _looking_ahead(self, rows: NDArray[np.int64]) -> Iterator[Callable[[int], None]]:
        """What to tell how many rows were drawn."""
        if self._supply is None or not self._ahead:
            yield lambda _: None
            return
        look = LookAhead(self._supply, rows, self._ahead)
        try:
            yield look.asked
        except BaseException:  # nobody draws on; at the end, threads have theirs to finish
            look.stop()
            raise

    def _left(self, position: int) -> int:
        """Samples each rank gets of this epoch from a position on."""
        rows = max(0, self._size - position)
        return rows // self._world_size if self.drop_last else -(-rows // self._world_size)


@lru_cache(maxsize=4)
def epoch_order(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The rows of an epoch in the order all ranks together go through them.

    Parameters
    ----------
    size
        How many rows there are.
    seed, epoch
        In [0, 2**64).

    Returns
    -------
    ndarray
        ``(size,)``, a permutation of ``range(size)``; read-only.

    Examples
    --------
    >>> epoch_order(5, seed=0, epoch=0).tolist()
    [2, 3, 0, 1, 4]
    """
    key = np.array([seed, epoch], np.uint64)
    numbers = np.random.Philox(key=key, counter=[0, 0, 0, _STREAM]).random_raw(size)
    order = np.argsort(numbers, kind="stable").astype(np.int64, copy=False)
    order.flags.writeable = False
    return order


def _size(dataset: Sized | int) -> int:
    size = len(dataset) if isinstance(dataset, Sized) else dataset
    return whole("the number of rows", size, 1)


def _world(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """This process's rank, and how many there are."""
    if (rank is None) != (world_size is None):
        raise UsageError(
            f"rank and world_size must come together, found {rank} and {world_size}; give both, "
            "or neither to take them from torch.distributed"
        )
    if rank is None or world_size is None:
        if not (dist.is_available() and dist.is_initialized()):
            return 0, 1
        rank, world_size = dist.get_rank(), dist.get_world_size()
    world_size = whole("world_size", world_size, 1)
    return whole("rank", rank, below=world_size), world_size


def _digest_of(dataset: object) -> str:
    manifest = getattr(dataset, "manifest", None)
    return manifest.header.rows_digest or "" if isinstance(manifest, Manifest) else ""


def _epochs_of(dataset: object) -> Epoch | None:
    epochs = getattr(dataset, "epochs", None)
    return epochs if isinstance(epochs, Epoch) else None


def _short(digest: str) -> str:
    return digest[:12] or "without a digest"


def whole(name: str, value: Any, least: int = 0, *, below: int | None = None) -> int:
    """A number in [least, below).

    Raises
    ------
    UsageError
        It is another, or none.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or (below is not None and number >= below):
        end = "" if below is None else f" to {below - 1}"
        raise UsageError(f"{name} must be a whole number from {least}{end}, found {value!r}")
    return number
