"""Which samples a batch number stands for, and how a rank's DataLoader reads only its own part of each batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from itertools import chain
from math import ceil
from typing import Any, Protocol, TypeVar

import numpy as np
from torch.utils.data import DataLoader, RandomSampler

from danaz.protocol.messages import Plan
from danaz.torch.beside import Together, first_of
from danaz.torch.fingerprint import fingerprint

Indices = np.ndarray[Any, np.dtype[np.int64]]  # i64[samples]
Samples = list[Any]  # what a sampler names each sample by: its number, or another key of the data set
Some = TypeVar("Some", Indices, Samples)

SEED_MIX = 0x9E3779B9  # keeps the stream of permutations apart from others that use the run's seed


class UnsupportedLoaderError(TypeError):
    """A DataLoader that cannot be shared out by batch numbers."""


class OrderError(RuntimeError):
    """The processes of the run do not hold the same list of batches, or it does not fit the run's plan."""


class Order(Protocol):
    """Which samples each batch of each epoch has. A batch is one update: under ``ssgd``, that of all workers."""

    def count(self, epoch: int) -> int:
        """Return the number of batches in an epoch."""

    def batch(self, epoch: int, number: int) -> list[Samples]:
        """Return the samples of a batch: in one list, or in a list for each worker that takes part in the update."""

    def digest(self, epoch: int) -> int:
        """Return a number from 1 below 2^32, which differs if the epoch has other batches."""


@dataclass(frozen=True)
class Batching:
    """The order of a loader with shuffle=True or False. Processes with equal values make equal batches."""

    samples: int
    batch_size: int  # samples in one update, which all ranks of one worker share
    shuffle: bool = True
    drop_last: bool = False
    seed: int = 0

    @property
    def batches_per_epoch(self) -> int:
        whole = self.samples / self.batch_size
        return int(whole) if self.drop_last else ceil(whole)

    def plan(self, epochs: int) -> Plan:
        return Plan(self.batches_per_epoch, epochs)

    def epoch_of(self, batch: int) -> int:
        return batch // self.batches_per_epoch

    def indices(self, batch: int) -> Indices:
        """Return the sample numbers of a batch of the run, i64[up to batch_size]."""
        return self._indices(*divmod(batch, self.batches_per_epoch))

    def _indices(self, epoch: int, number: int) -> Indices:
        return _order(self, epoch)[number * self.batch_size : (number + 1) * self.batch_size]

    def count(self, epoch: int) -> int:
        """See Order."""
        return self.batches_per_epoch

    def batch(self, epoch: int, number: int) -> list[Samples]:
        """See Order."""
        return [self._indices(epoch, number).tolist()]

    def digest(self, epoch: int) -> int:
        """See Order."""
        return _digest(self)


@lru_cache(maxsize=4)
def _digest(batching: Batching) -> int:
    return fingerprint(astuple(batching))


@lru_cache(maxsize=4)
def _order(batching: Batching, epoch: int) -> Indices:
    if not batching.shuffle:
        return np.arange(batching.samples)
    return np.random.default_rng((SEED_MIX, batching.seed, epoch)).permutation(batching.samples)


def batching_of(loader: DataLoader[Any], workers: int, seed: int) -> Batching:
    """Return the order of a loader that was made with shuffle=True or False, for updates of ``workers`` batches."""
    assert loader.batch_size is not None
    return Batching(
        samples=len(loader.dataset),  # type: ignore[arg-type]
        batch_size=loader.batch_size * workers,
        shuffle=isinstance(loader.sampler, RandomSampler),
        drop_last=loader.drop_last,
        seed=seed,
    )


# ---- a rank's part of a batch ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """A rank's part of every batch. The batch is split evenly over ``workers``, and then over the worker's ranks."""

    worker: int = 0
    workers: int = 1
    rank: int = 0
    ranks: int = 1
    least: int = 1  # samples that a part must have unless it is empty; a batch with fewer goes to one rank

    def of(self, samples: Some) -> Some:
        return self._part(self._part(samples, self.workers, self.worker), self.ranks, self.rank)

    def of_joined(self, batches: Sequence[Samples]) -> Samples:
        """Return the part of an update that joins ``batches``. If there is one for each worker, each takes its own."""
        if len(batches) == self.workers:
            return self._part(batches[self.worker], self.ranks, self.rank)
        return self.of(list(chain.from_iterable(batches)))

    def ranks_at_work(self, samples: int) -> int:
        """Return how many of this worker's ranks get samples of a batch of ``samples``."""
        batch = np.arange(samples)
        return sum(bool(len(replace(self, rank=rank).of(batch))) for rank in range(self.ranks))

    def _part(self, samples: Some, parts: int, number: int) -> Some:
        parts = max(1, min(parts, len(samples) // self.least))
        if number >= parts:
            return samples[:0]
        size, larger = divmod(len(samples), parts)  # the first ``larger`` parts have one more
        start = number * size + min(number, larger)
        return samples[start : start + size + (number < larger)]


@dataclass(frozen=True)
class Portion:
    """The part of one leased batch that this rank is given."""

    batch: int
    samples: int  # number of samples in the whole batch
    here: int  # number of samples in this rank's part; 0: the rank computes on others' samples, which do not count
    order: int = 0  # the digest of the order of the batch's epoch; 0: none, the script draws the batch itself

    @property
    def weight(self) -> float:
        """The weight of this rank's mean gradient in the batch's mean gradient."""
        return self.here / self.samples


class LeaseSampler:
    """A DataLoader's batch sampler that gives this rank's part of each batch, until ``take`` gives no batch number.

    It notes what it hands out in ``portions``, in the order in which the loader will deliver. If a short batch has no
    sample for a rank, the rank gets the batch's first samples, with weight zero. Its loop then runs like every other
    rank's, so that schedulers, gradient scalers, random numbers and the script's own collectives stay in step.

    With orders of loaders ``beside``, a batch is one element that has this rank's part of a batch of each loader.
    """

    def __init__(
        self, order: Order, plan: Plan, share: Share, take: Callable[[], int | None], beside: Sequence[Order] = ()
    ):
        self.plan = plan
        self.share = share
        self.portions: deque[Portion] = deque()
        self._order = order
        self._beside = beside
        self._take = take

    def __iter__(self) -> Iterator[Samples]:
        while (batch := self._take()) is not None:
            epoch, number = self.plan.place_of(batch)
            self.check_count(epoch)
            batches = self._order.batch(epoch, number)
            part = self.share.of_joined(batches)
            self.portions.append(Portion(batch, sum(map(len, batches)), len(part), self.digest(epoch)))
            part = part or self._first_of(batches)
            yield [(part, *(self._part_beside(order, batch) for order in self._beside))] if self._beside else part

    def check_count(self, epoch: int) -> None:
        """Raise OrderError if the order has more or fewer batches in an epoch than the run's plan."""
        found, planned = self._order.count(epoch), self.plan.count(epoch)
        if found != planned:
            raise OrderError(
                f"the loader has {found} batches in epoch {epoch}, and the run was planned for {planned}. Every "
                "process needs a loader with the same number of batches, and so does every epoch, unless danaz.epochs "
                "was told how many each one has: danaz.epochs(N, batches=[…])."
            )

    def digest(self, epoch: int) -> int:
        """Return a digest of the order of an epoch, and of those beside it."""
        own = self._order.digest(epoch)
        return fingerprint([own, *(order.digest(0) for order in self._beside)]) if self._beside else own

    def _part_beside(self, order: Order, batch: int) -> Samples:
        batches = order.batch(*divmod(batch, order.count(0)))
        return self.share.of_joined(batches) or self._first_of(batches)

    def _first_of(self, batches: Sequence[Samples]) -> Samples:
        return list(chain.from_iterable(batches))[: self.share.least]


# ---- the loader of a rank --------------------------------------------------------------------------------------------


def read_ahead(loader: DataLoader[Any]) -> int:
    """Return the number of batches that a worker must hold to keep the loader's processes busy.

    They are the one that is computed, those that the processes read, and one that they are asked for when the loop goes
    on from a batch without a step: the server hears of that batch later.
    """
    return 2 + loader.num_workers * (loader.prefetch_factor or 0) if loader.num_workers else 1


def rebuild(loader: DataLoader[Any], sampler: LeaseSampler, beside: Sequence[DataLoader[Any]] = ()) -> DataLoader[Any]:
    """Return the same loader with another sampler of batches; with loaders ``beside``, it gives tuples of batches."""
    if beside:
        together = Together([(each.dataset, each.collate_fn) for each in (loader, *beside)])
        return remade(loader, together, batch_sampler=sampler, collate_fn=first_of)
    if loader.batch_sampler is None:  # the data set is asked for whole batches
        return remade(loader, loader.dataset, batch_size=None, sampler=sampler)
    return remade(loader, loader.dataset, batch_sampler=sampler)


def remade(loader: DataLoader[Any], dataset: Any, **options: Any) -> DataLoader[Any]:
    """Return a loader of ``dataset`` that is like ``loader`` in everything but these options."""
    processes = {}
    if loader.num_workers:
        processes = {
            "prefetch_factor": loader.prefetch_factor,
            "multiprocessing_context": loader.multiprocessing_context,
            "worker_init_fn": loader.worker_init_fn,
            "persistent_workers": loader.persistent_workers,
        }
    kept = {
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "generator": loader.generator,
    }
    return DataLoader(dataset, **{**kept, **processes, **options})
