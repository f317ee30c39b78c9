"""A script's loader, and its double: the one that delivers this rank's part of each batch that the worker is leased."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import DataLoader

from danaz.files.seeds import derive_seed
from danaz.protocol.messages import Plan
from danaz.torch.data import Batching, LeaseSampler, Order, Share, rebuild
from danaz.torch.samplers import has_distributed_sampler, order_of

BESIDE = 0xBE51DE  # keeps the order of a loader beside another apart from the other one's, if the sizes are the same

Loader = DataLoader[Any]


class LeasedLoader:
    """The loader of the leased batches, and the loaders beside it, of which each batch gets one more."""

    def __init__(self, loader: Loader, beside: Sequence[Loader], machines: int, seed: int):
        """Raises UnsupportedLoaderError with the reason. An update joins ``machines`` batches."""
        self.loader = loader
        self.beside = tuple(beside)
        self.seed = seed
        self.order = order_of(loader, machines, seed)
        seeds = (derive_seed(seed, BESIDE, number) for number in range(len(beside)))
        self._orders_beside = [order_of(each, machines, of_it) for each, of_it in zip(beside, seeds, strict=True)]
        self._double: tuple[LeaseSampler, Loader] | None = None

    def is_made_of(self, loader: Loader, beside: Sequence[Loader], seed: int) -> bool:
        mine, theirs = (self.loader, *self.beside), (loader, *beside)
        return seed == self.seed and len(mine) == len(theirs) and all(a is b for a, b in zip(mine, theirs, strict=True))

    def samples_of_first_batch(self, epoch: int) -> int:
        return sum(map(len, self.order.batch(epoch, 0)))

    def double(self, plan: Plan, share: Share, take: Callable[[], int | None]) -> tuple[LeaseSampler, Loader]:
        """Return the double, and its sampler. It keeps its processes if the loader keeps its own."""
        if self._double is None:
            sampler = LeaseSampler(self.order, plan, share, take, self._orders_beside)
            self._double = (sampler, rebuild(self.loader, sampler, self.beside))
        return self._double

    def check(self, first: Order) -> None:
        """Raise ValueError if a plain loader differs from that which the run began with, whose order is ``first``."""
        if isinstance(first, Batching) and isinstance(self.order, Batching) and first != self.order:
            raise ValueError(
                "danaz.shard was given a loader of another size, batch size or order than the run began with. Give it "
                "the training data alone; to evaluate, iterate the loader itself"
            )

    def warn_of_distributed_sampler(self) -> None:
        """Warn if a sampler would share the data out, which danaz does."""
        if any(map(has_distributed_sampler, (self.loader, *self.beside))):
            warnings.warn(
                "the loader has a DistributedSampler, whose part of the samples danaz does not use: it shares out all "
                "of them, in the order that this sampler has for a single replica (its shuffle and seed count, and "
                "nothing is padded or dropped). To say the same, make the loader with shuffle=True or False and no "
                "sampler.",
                stacklevel=2,
            )
