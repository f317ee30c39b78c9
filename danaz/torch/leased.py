"""A script's loader, and its double: the one that delivers this rank's part of each batch that the worker is leased."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

from torch.utils.data import DataLoader

from danaz.files.seeds import derive_seed
from danaz.protocol.messages import Plan
from danaz.torch.data import Batching, LeaseSampler, Order, Share, UnsupportedLoaderError, rebuild
from danaz.torch.samplers import has_distributed_sampler, order_of

KEPT_LOADERS = 2  # epochs before the one under way whose loaders are kept, if the epochs differ
BESIDE = 0xBE51DE  # keeps the order of a loader beside another apart from the other one's, if the sizes are the same

Loader = DataLoader[Any]


def lengths_of(epochs: int, batches: Sequence[int] | Callable[[int], int]) -> tuple[int, ...]:
    """Return the number of batches in each epoch, as a script has said. Raises ValueError."""
    lengths = tuple(batches(epoch) for epoch in range(epochs)) if callable(batches) else tuple(batches)
    wrong = [each for each in lengths if isinstance(each, bool) or not isinstance(each, int) or each < 1]
    if wrong or len(lengths) != epochs:
        found = f"{wrong[0]!r} is among them" if wrong else f"there are {len(lengths)}"
        raise ValueError(
            f"danaz.epochs({epochs}, batches=…) takes {epochs} whole numbers from 1 up, one for each epoch; {found}"
        )
    return lengths


class LeasedLoader:
    """The loader of the leased batches, and the loaders beside it, of which each batch gets one more."""

    def __init__(self, loader: Loader, beside: Sequence[Loader], machines: int, seed: int):
        """Raises UnsupportedLoaderError with the reason. An update joins ``machines`` batches."""
        self.loader = loader
        self.beside = tuple(beside)
        self.seed = seed
        self._machines = machines
        self.order = order_of(loader, machines, seed)
        seeds = (derive_seed(seed, BESIDE, number) for number in range(len(beside)))
        self._orders_beside = [order_of(each, machines, of_it) for each, of_it in zip(beside, seeds, strict=True)]
        self._double: tuple[LeaseSampler, Loader] | None = None

    def is_made_of(self, loader: Loader, beside: Sequence[Loader], seed: int) -> bool:
        """Return whether it was made of these loaders, and of what is in them now."""
        mine, theirs = (self.loader, *self.beside), (loader, *beside)
        if seed != self.seed or len(mine) != len(theirs) or any(a is not b for a, b in zip(mine, theirs, strict=True)):
            return False
        return not isinstance(self.order, Batching) or order_of(loader, self._machines, seed) == self.order

    def length(self, epoch: int) -> int:
        """Return the number of batches in an epoch as the script counts them, or as they are if the loader has none."""
        try:
            return len(self.loader)
        except (TypeError, NotImplementedError):
            return self.order.count(epoch)

    def plan(self, epochs: int, lengths: Sequence[int], epoch: int) -> Plan:
        """Return the plan of a run whose epochs have ``lengths`` batches of a loader, or are all like ``epoch``."""
        if not lengths:
            return Plan(self.order.count(epoch), epochs)
        joined = [length / self._machines for length in lengths]
        plan = Plan.of([int(each) if self.loader.drop_last else ceil(each) for each in joined])
        if not min(plan.count(each) for each in range(epochs)):
            raise UnsupportedLoaderError(
                f"an update needs {self._machines} batches, and danaz.epochs was told of an epoch that has fewer"
            )
        return plan

    def samples_of_first_batch(self, epoch: int) -> int:
        return sum(map(len, self.order.batch(epoch, 0)))

    def double(self, plan: Plan, share: Share, take: Callable[[], int | None]) -> tuple[LeaseSampler, Loader]:
        """Return the double, and its sampler. It keeps its processes if the loader keeps its own."""
        if self._double is None:
            sampler = LeaseSampler(self.order, plan, share, take, self._orders_beside)
            self._double = (sampler, rebuild(self.loader, sampler, self.beside))
        return self._double

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


class EpochLoaders:
    """The loaders that a script gives danaz.shard in each epoch, and which of them reads the batch that is next.

    If all epochs are alike, the loader of the epoch under way also reads what is left of the epochs before. If the
    script has said how many batches each epoch has, each batch is read by the loader that its own epoch was given.
    """

    def __init__(self, machines: int):
        self._machines = machines
        self._newest: LeasedLoader | None = None
        self._first: Order | None = None  # the order of the loader that the run began with
        self._of_epoch: dict[int, LeasedLoader] = {}
        self._reads = 0  # the newest epoch whose batches are read at this moment
        self._reads_earlier = True  # whether batches of the epochs before are read, too

    def made_of(self, loader: Loader, beside: Sequence[Loader], seed: int) -> LeasedLoader:
        """Return what is known of these loaders, which a script may make anew for each epoch."""
        if self._newest is None or not self._newest.is_made_of(loader, beside, seed):
            self._newest = LeasedLoader(loader, beside, self._machines, seed)
        return self._newest

    def begin(self, epoch: int, leased: LeasedLoader, may_differ: bool) -> None:
        """Take a loader for an epoch. Raises ValueError if it differs from the run's first although it may not."""
        self._first = self._first or leased.order
        self._reads_earlier = not may_differ
        are_plain = isinstance(self._first, Batching) and isinstance(leased.order, Batching)
        if self._reads_earlier and are_plain and self._first != leased.order:
            raise ValueError(
                "danaz.shard was given a loader of another size, batch size or order than the run began with. Give it "
                "the training data alone; to evaluate, iterate the loader itself. If the epochs are to differ, say how "
                "many batches each has: danaz.epochs(N, batches=[…])."
            )
        kept = range(epoch if self._reads_earlier else epoch - KEPT_LOADERS, epoch)
        self._of_epoch = {each: self._of_epoch[each] for each in kept if each in self._of_epoch}
        self._of_epoch[epoch] = leased

    def choose(self, epoch: int, next_epoch: int) -> LeasedLoader | None:
        """Return the loader, in ``epoch``, of a batch of ``next_epoch``; None if this process does not have it."""
        self._reads = epoch if self._reads_earlier else next_epoch
        return self._of_epoch.get(self._reads)

    def reads(self, epoch: float) -> bool:
        """Return whether the chosen loader reads batches of ``epoch``."""
        return epoch <= self._reads if self._reads_earlier else epoch == self._reads
