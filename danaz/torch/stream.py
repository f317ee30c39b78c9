"""Streams: data without sample numbers, of which each rank reads a part of its own.

A stream is read in passes. The items of all passes are numbered on and on, and a part is every R-th of them. For that,
each process must read the same items in the same order. So torch's, numpy's and Python's random numbers follow from the
run's seed and the pass while a data set is read, and the ranks compare a fingerprint of the very first item. A data set
that asks for its part by ``stream_part`` reads that part alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data._utils import worker as loading_process

from danaz.files.seeds import derive_seed
from danaz.torch.beside import Collate
from danaz.torch.data import Share, UnsupportedLoaderError, remade
from danaz.torch.ending import say
from danaz.torch.fingerprint import fingerprint
from danaz.torch.randomness import RandomNumbers

SPLITS_ITSELF = 1  # stands for the fingerprint of a first item, if each part begins with another


class StreamError(RuntimeError):
    """A stream gives nothing, or cannot be divided."""


@dataclass(frozen=True)
class Part:
    """The items number index, index + count, index + 2 count and so on of a stream."""

    index: int = 0
    count: int = 1

    def split(self, number: int, parts: int) -> Part:
        """Return one of the ``parts`` that together are this one."""
        return Part(self.index + self.count * number, self.count * parts)


# ---- reading a part --------------------------------------------------------------------------------------------------


class Reader:
    """Reads a part of what ``source`` gives, pass after pass. It ends only if ``source`` cannot begin again."""

    current: Reader | None = None  # the one that reads from its source at this moment, in this process

    def __init__(self, source: Iterable[Any], part: Part, seed: int):
        self.part = part
        self.splits_itself = False  # whether the source has asked for its part
        self.first = 0  # what the readers of all parts must have in common; known with the first item
        self._source = source
        self._seed = seed
        self._read = 0  # number of items read, in all passes

    def __iter__(self) -> Iterator[Any]:
        """Yield the items of the part. Raises StreamError for a pass without items."""
        for number in count():
            before = self._read
            yield from self._pass(number)
            if self._read == before:
                if number and hasattr(self._source, "__next__"):
                    return  # an iterator that is used up
                whose = f"part {self.part.index} of {self.part.count} of the stream" if self.splits_itself else "it"
                raise StreamError(f"the stream has nothing to train on: {whose} has no items in pass {number}")
            if number == 0 and self.part.index == 0 and not hasattr(self._source, "__next__"):
                say(f"the stream came to its end after {self._read} items, and starts over whenever that happens")

    def _pass(self, number: int) -> Iterator[Any]:
        random_numbers = RandomNumbers(derive_seed(self._seed, number))
        with random_numbers, self._alone():
            if hasattr(self._source, "set_epoch"):
                self._source.set_epoch(number)
            items = iter(self._source)
        while True:
            with random_numbers, self._alone():
                own = self._next_of_part(items)
            if not own:
                return
            yield own[0]

    def _next_of_part(self, items: Iterator[Any]) -> Sequence[Any]:
        """Return the next item of the part, alone in a list that is empty at the end of the pass."""
        for item in items:
            self._note(item)
            if self.splits_itself or (self._read - 1) % self.part.count == self.part.index:
                return [item]
        return []

    def _note(self, item: Any) -> None:
        if not self._read:
            self.first = SPLITS_ITSELF if self.splits_itself else fingerprint(item)
        elif self.splits_itself and self.first != SPLITS_ITSELF:
            raise StreamError(
                "the data set has called danaz.stream_part() after it had given items, which may have been those of "
                "other parts; it must call it before its first item"
            )
        self._read += 1

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let the source believe that nobody else reads it, not even another loading process of torch's."""
        info = loading_process._worker_info
        loading_process._worker_info, Reader.current = None, self
        try:
            yield
        finally:
            loading_process._worker_info, Reader.current = info, None


def stream_part() -> tuple[int, int]:
    """See danaz.torch.stream_part."""
    reader, info = Reader.current, get_worker_info()
    if reader is None:
        return (0, 1) if info is None else (info.id, info.num_workers)
    reader.splits_itself = True
    return reader.part.index, reader.part.count


# ---- a rank's stream of batches --------------------------------------------------------------------------------------


class Delivery(NamedTuple):
    """A batch, or an item of one, as a loading process delivers it."""

    first: int  # see Reader.first
    content: Any


@dataclass(frozen=True)
class Stream:
    """A rank's own batches, and what they count beside those of the other ranks."""

    batches: Iterator[Delivery]
    here: int  # samples in a batch of this rank
    samples: int  # samples in the batches of all ranks that make one update


def open_stream(source: Iterable[Any], part: Part, share: Share, seed: int, done: int, samples: int) -> Stream:
    """Return a rank's ``part`` of a stream, without its first ``done`` batches.

    ``share`` is the rank's share of a loader's batch. Without one, an item of the stream is a rank's batch, and counts
    as ``samples``. Raises UnsupportedLoaderError with the reason.
    """
    ranks = share.workers * share.ranks
    if not isinstance(source, DataLoader):
        reader = Reader(source, part, seed)
        items = (Delivery(reader.first, item) for item in islice(reader, done, None))
        return Stream(items, samples, samples * ranks)
    if not isinstance(source.dataset, IterableDataset):
        raise UnsupportedLoaderError(
            f"danaz.stream reads an IterableDataset or another iterable, and the data set of this DataLoader "
            f"({type(source.dataset).__name__}) has sample numbers. Iterate danaz.shard(loader, epoch) within "
            "danaz.epochs, which uses each sample once an epoch."
        )
    is_batched = source.batch_size is not None
    here, total = _shares(source.batch_size, share) if source.batch_size is not None else (samples, samples * ranks)
    items_done = done * (here if is_batched else 1) // max(1, source.num_workers)
    loader = remade(
        source,
        PartOfDataset(source.dataset, part, seed, items_done),
        batch_size=here if is_batched else None,
        collate_fn=CollateDeliveries(source.collate_fn, is_batched),
    )
    return Stream(iter(loader), here, total)


def _shares(batch_size: int, share: Share) -> tuple[int, int]:
    """Return the samples of this rank, and of all ranks, in an update. Raises UnsupportedLoaderError."""
    total = batch_size * share.workers
    if share.ranks_at_work(total) < share.ranks:
        raise UnsupportedLoaderError(
            f"the loader's batch_size of {batch_size} is shared by the {share.ranks} ranks of a worker, each of which "
            f"needs at least {share.least}: raise it to {share.least * share.ranks} or more"
        )
    return len(share.of(np.arange(total))), total


class PartOfDataset(IterableDataset[Delivery]):
    """A part of an iterable data set, without its first ``skipped`` items in each loading process."""

    def __init__(self, dataset: Iterable[Any], part: Part, seed: int, skipped: int):
        self._dataset, self._part, self._seed, self._skipped = dataset, part, seed, skipped

    def __iter__(self) -> Iterator[Delivery]:
        info = get_worker_info()
        part = self._part if info is None else self._part.split(info.id, info.num_workers)
        reader = Reader(self._dataset, part, self._seed)
        return (Delivery(reader.first, item) for item in islice(reader, self._skipped, None))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"danaz.stream divides the data set itself, so a worker_init_fn finds no {name!r} in it. Leave "
            "worker_init_fn out, or let the data set call danaz.stream_part() at the beginning of its __iter__."
        )


@dataclass(frozen=True)
class CollateDeliveries:
    """A loader's collate_fn, for a data set whose items are Deliveries."""

    collate: Collate
    is_batched: bool

    def __call__(self, delivered: Any) -> Delivery:
        if not self.is_batched:
            return Delivery(delivered.first, self.collate(delivered.content))
        return Delivery(delivered[0].first, self.collate([each.content for each in delivered]))
