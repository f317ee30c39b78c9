"""Read the run's batches by number: when a worker asks for one, or ahead of time in loading processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from danaz.torch.data import Batching
from danaz.workloads import collate


class BatchReader:
    """``take(number)`` returns the inputs and targets of one batch.

    If the data set can fetch a whole batch at once (it has ``__getitems__``, as a data set in memory does), batches are
    fetched when they are asked for. Otherwise ``processes`` loading processes read the batches of all ``epochs`` ahead,
    in the order of their numbers. Each batch is taken once, in nearly that order: batches that were read but not yet
    asked for are kept, and these are never more than the workers have leased together.
    """

    def __init__(self, data: Any, batching: Batching, epochs: int, processes: int):
        self.data = data
        self.batching = batching
        self._fetches_whole_batches = hasattr(data, "__getitems__")
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # read ahead, not yet taken
        self._ahead: Iterator[tuple[int, Any]] | None = None
        if processes and not self._fetches_whole_batches:
            numbers = range(batching.plan(epochs).batches)
            samples = (batching.indices(number).tolist() for number in numbers)
            loader = DataLoader(data, batch_sampler=samples, num_workers=processes, collate_fn=collate)
            self._ahead = iter(zip(numbers, loader, strict=True))

    def take(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets of batch ``number``; the first dimension of each is the number of samples."""
        if self._ahead is None:
            return self._fetch(self.batching.indices(number).tolist())
        while number not in self._kept:
            read, batch = next(self._ahead)
            self._kept[read] = batch
        return self._kept.pop(number)

    def _fetch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        data = self.data
        samples = data.__getitems__(indices) if self._fetches_whole_batches else [data[index] for index in indices]
        x, y = collate(samples)
        return x, y
