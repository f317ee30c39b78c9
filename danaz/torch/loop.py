"""The two loops of a training script: one over the run's epochs and, in each epoch, one over its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


class LoopError(RuntimeError):
    """danaz cannot train with the script's loops as they are."""


class Counted(Iterator[Item]):
    """An iterator that can say how many items it expects to give, because progress bars ask for that."""

    def __init__(self, items: Iterator[Item], count: Callable[[], int]):
        self._items = items
        self._count = count

    def __iter__(self) -> Counted[Item]:
        return self

    def __next__(self) -> Item:
        return next(self._items)

    def __len__(self) -> int:
        return self._count()


class Loop:
    """Where the script is in its loops, and whether it left them before their end."""

    def __init__(self) -> None:
        self.count: int | None = None  # number of epochs that the script asked for
        self.epoch: int | None = None  # the epoch under way
        self.reached = 0  # the newest epoch that was under way
        self.was_left = False  # whether a break, return, exception or the end of the process left the loop
        self._call = ""  # the call that began the loop over the run
        self._is_open = False  # whether a loop over batches is under way
        self._dataset: object = None  # the data set that the epoch under way is trained on
        self._is_used_up = False  # whether the epoch under way has given all its batches

    def begin(self, count: int, call: str) -> None:
        """Note the number of epochs of the loop that ``call`` begins.

        Raises ValueError if it is none, and LoopError if a loop was begun before.
        """
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"danaz.epochs takes the number of epochs, a whole number from 1 up, not {count!r}")
        if self._call:
            raise LoopError(
                f"{call} is called although {self._call} was called before: a run has one loop over its epochs or its "
                "steps. Give one call the total, and tell phases apart by the number that it gives."
            )
        self.count, self._call = count, call

    def epochs(self, first: int, is_over: Callable[[], bool]) -> Iterator[int]:
        """Yield the epochs from ``first`` on, until the run is over. Raises LoopError if one ends without batches."""
        assert self.count is not None
        try:
            for epoch in range(first, self.count):
                if is_over():
                    break
                self.epoch = self.reached = epoch
                self._dataset, self._is_used_up = None, False
                yield epoch
                if self._dataset is None and not is_over():
                    raise LoopError(
                        f"epoch {epoch} of danaz.epochs({self.count}) ended, and nothing was trained in it: iterate "
                        "danaz.shard(loader, epoch) in place of the loader."
                    )
        except GeneratorExit:
            self.was_left = True
            raise
        finally:
            self.epoch = None

    def batches(self, epoch: int, dataset: object, batches: Iterator[Item]) -> Iterator[Item]:
        """Yield the ``batches`` of ``dataset``. Raises LoopError if it is not their turn."""
        self._check(epoch, dataset)
        self._is_open, self._dataset = True, dataset
        try:
            yield from batches
            self._is_used_up = True
        finally:
            self._is_open = False

    def _check(self, epoch: int, dataset: object) -> None:
        if self.epoch is None:
            raise LoopError(
                f"danaz.shard(loader, {epoch}) was iterated outside of a loop over danaz.epochs, which tells danaz "
                f"how many epochs the run has. Write `for epoch in danaz.epochs({self.count or 'N'}):` in place of a "
                "loop of your own, and iterate danaz.shard(loader, epoch) within it."
            )
        if epoch != self.epoch:
            raise LoopError(
                f"danaz.shard(loader, {epoch}) was iterated in epoch {self.epoch}: give it the number that "
                "danaz.epochs gives. That counts from 0, or from the cluster's epoch in a run that goes on."
            )
        if self._is_open:
            raise LoopError(
                "danaz.shard was iterated while another loop over it is under way: one batch is one update of the "
                "cluster, so there is one such loop at a time. If an update needs batches of two loaders, iterate "
                "danaz.shard(loader, epoch, other), which gives pairs; to evaluate, iterate the loader itself."
            )
        if self._is_used_up:
            raise LoopError(
                f"danaz.shard(loader, {epoch}) was iterated again, but its batches were all trained: each sample is "
                "used once an epoch. For another pass over the data, give danaz.epochs a larger number; to evaluate, "
                "iterate the loader itself."
            )
        if self._dataset is not None and dataset is not self._dataset:
            raise LoopError(
                f"danaz.shard was given another data set than before in epoch {epoch}: an epoch has one. Join data "
                "sets by torch.utils.data.ConcatDataset, or iterate danaz.shard(loader, epoch, other), which gives "
                "pairs; to evaluate, iterate the loader itself."
            )
