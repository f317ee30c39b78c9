"""The run's batches by number: fetched in place, or read ahead by loading processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from danaz.torch.data import Batching
from danaz.workloads import collate


class Batches:
    """``take(number)`` is what the samples of that batch hold.

    A data set that fetches whole batches, from memory, is quickest in place. Of any other, ``processes`` read the
    batches of all ``epochs`` in the order of their numbers. Workers take them in nearly that order, and each once: one
    that comes too early waits here, so no more are kept than the workers hold between them.
    """

    def __init__(self, data: Any, batching: Batching, epochs: int, processes: int):
        self.data = data
        self.batching = batching
        self._waiting: dict[int, tuple[Tensor, Tensor]] = {}
        self._ahead: Iterator[tuple[int, Any]] | None = None
        if processes and not hasattr(data, "__getitems__"):
            numbers = range(batching.plan(epochs).batches)
            samples = (batching.indices(number).tolist() for number in numbers)
            loader = DataLoader(data, batch_sampler=samples, num_workers=processes, collate_fn=collate)
            self._ahead = iter(zip(numbers, loader, strict=True))

    def take(self, number: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of batch ``number``."""
        if self._ahead is None:
            return self._fetch(self.batching.indices(number).tolist())
        while number not in self._waiting:
            read, batch = next(self._ahead)
            self._waiting[read] = batch
        return self._waiting.pop(number)

    def _fetch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        whole = hasattr(self.data, "__getitems__")
        x, y = collate(self.data.__getitems__(indices) if whole else [self.data[i] for i in indices])
        return x, y
