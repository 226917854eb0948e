"""DataLoaders that carry stored values from their workers and convert them afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


class ConvertingLoader(DataLoader[Any]):
    """Converts one entry of every batch after it has crossed from the workers.

    Parameters
    ----------
    dataset, options
        As :class:`torch.utils.data.DataLoader` takes them.
    key
        The entry; batches without a tensor there pass as they are.
    convert
        What is done to it, in the process that iterates.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        key: str,
        convert: Callable[[torch.Tensor], torch.Tensor],
        **options: Any,
    ) -> None:
        super().__init__(dataset, **options)
        self._key, self._convert = key, convert

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, Mapping) and torch.is_tensor(batch.get(self._key)):
                yield {**batch, self._key: self._convert(batch[self._key])}
            else:
                yield batch


def has_order(options: Mapping[str, Any]) -> bool:
    """Whether options of a DataLoader say in which order rows come; None says nothing."""
    return any(options.get(name) is not None for name in ("sampler", "batch_sampler"))
