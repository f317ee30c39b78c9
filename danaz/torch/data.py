"""Which samples a batch number stands for, and how a rank's DataLoader reads only its own part of each batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from danaz.protocol.messages import Plan

Indices = np.ndarray[Any, np.dtype[np.int64]]  # i64[samples]

SEED_MIX = 0x9E3779B9  # keeps the stream of permutations apart from others that use the run's seed


class UnsupportedLoaderError(TypeError):
    """A DataLoader that cannot be shared out by batch numbers."""


@dataclass(frozen=True)
class Batching:
    """How the epochs of a data set are divided into batches. Processes with equal values make equal batches."""

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
        """Return the sample numbers of a batch, i64[up to batch_size]."""
        start = batch % self.batches_per_epoch * self.batch_size
        return _order(self, self.epoch_of(batch))[start : start + self.batch_size]


@lru_cache(maxsize=4)
def _order(batching: Batching, epoch: int) -> Indices:
    if not batching.shuffle:
        return np.arange(batching.samples)
    return np.random.default_rng((SEED_MIX, batching.seed, epoch)).permutation(batching.samples)


@dataclass(frozen=True)
class Share:
    """A rank's part of every batch. The batch is split evenly over ``workers``, and then over the worker's ranks."""

    worker: int = 0
    workers: int = 1
    rank: int = 0
    ranks: int = 1
    least: int = 1  # samples that a part must have unless it is empty; a batch with fewer goes to one rank

    def of(self, indices: Indices) -> Indices:
        return self._part(self._part(indices, self.workers, self.worker), self.ranks, self.rank)

    def ranks_at_work(self, samples: int) -> int:
        """Return how many of this worker's ranks get samples of a batch of ``samples``."""
        batch = np.arange(samples)
        return sum(bool(len(replace(self, rank=rank).of(batch))) for rank in range(self.ranks))

    def _part(self, indices: Indices, parts: int, number: int) -> Indices:
        parts = max(1, min(parts, len(indices) // self.least))
        if parts == 1:
            return indices if number == 0 else indices[:0]
        return np.array_split(indices, parts)[number] if number < parts else indices[:0]


@dataclass(frozen=True)
class Portion:
    """The part of one leased batch that this rank is given."""

    batch: int
    samples: int  # number of samples in the whole batch
    here: int  # number of samples in this rank's part; 0: the rank computes on others' samples, which do not count

    @property
    def weight(self) -> float:
        """The weight of this rank's mean gradient in the batch's mean gradient."""
        return self.here / self.samples


class LeaseSampler:
    """A DataLoader's batch sampler that gives this rank's part of each batch, until ``take`` gives no batch number.

    It notes what it hands out in ``portions``, in the order in which the loader will deliver. If a short batch has no
    sample for a rank, the rank gets the batch's first samples, with weight zero. Its loop then runs like every other
    rank's, so that schedulers, gradient scalers, random numbers and the script's own collectives stay in step.
    """

    def __init__(self, batching: Batching, share: Share, take: Callable[[], int | None]):
        self.batching = batching
        self.share = share
        self.portions: deque[Portion] = deque()
        self._take = take

    def __iter__(self) -> Iterator[list[int]]:
        while (batch := self._take()) is not None:
            indices = self.batching.indices(batch)
            part = self.share.of(indices)
            self.portions.append(Portion(batch, len(indices), len(part)))
            yield (part if len(part) else indices[: self.share.least]).tolist()


def batching_of(loader: DataLoader[Any], workers: int, seed: int) -> Batching:
    """Return the batching that replaces a loader's sampler. Raises UnsupportedLoaderError with the reason."""
    if isinstance(loader.dataset, IterableDataset):
        raise UnsupportedLoaderError(
            "danaz.shard cannot share out an IterableDataset: batches are leased by sample number, and it has none. "
            "Give it a map-style Dataset (with __len__ and __getitem__)."
        )
    if loader.batch_size is None or type(loader.sampler) not in (RandomSampler, SequentialSampler):
        raise UnsupportedLoaderError(
            "danaz.shard needs a DataLoader with batch_size=… and shuffle=True or False; this one has a sampler of its "
            f"own ({type(loader.batch_sampler if loader.batch_size is None else loader.sampler).__name__}), which "
            "danaz would have to replace. Make the loader without it."
        )
    if isinstance(loader.sampler, RandomSampler) and loader.sampler.replacement:
        raise UnsupportedLoaderError(
            "danaz.shard uses each sample once an epoch; this loader draws with replacement. Make it with shuffle=True "
            "and no sampler."
        )
    samples: int = len(loader.dataset)  # type: ignore[arg-type]
    drawn = len(loader.sampler)  # type: ignore[arg-type]
    if drawn != samples:
        raise UnsupportedLoaderError(
            f"danaz.shard uses each sample once an epoch; this loader draws {drawn} of {samples} samples. To train on "
            "fewer, make the loader of a torch.utils.data.Subset."
        )
    batching = Batching(
        samples=samples,
        batch_size=loader.batch_size * workers,
        shuffle=isinstance(loader.sampler, RandomSampler),
        drop_last=loader.drop_last,
        seed=seed,
    )
    if not batching.batches_per_epoch:
        raise UnsupportedLoaderError(
            f"{samples} samples do not fill one batch of {batching.batch_size}, so an epoch would be empty. Use a "
            "smaller batch_size, or drop_last=False."
        )
    return batching


def read_ahead(loader: DataLoader[Any]) -> int:
    """Return the number of batches that a worker must hold to keep the loader's processes busy."""
    return 1 + loader.num_workers * (loader.prefetch_factor or 0)


def rebuild(loader: DataLoader[Any], sampler: LeaseSampler) -> DataLoader[Any]:
    """Return the same loader with another batch sampler."""
    processes = {}
    if loader.num_workers:
        processes = {
            "prefetch_factor": loader.prefetch_factor,
            "multiprocessing_context": loader.multiprocessing_context,
            "worker_init_fn": loader.worker_init_fn,
            "persistent_workers": loader.persistent_workers,
        }
    return DataLoader(
        loader.dataset,
        batch_sampler=sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        generator=loader.generator,
        **processes,
    )
