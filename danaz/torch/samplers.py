"""The order of a loader with a sampler of its own, which every process of the run finds out by itself.

A sampler may draw random numbers, from torch, numpy, random, or a generator of its own. Each process lets it draw the
batches of a whole epoch with random numbers that follow from the run's seed and the epoch. So all processes hold the
same list, and a leased batch number names one entry of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from math import ceil, inf
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from danaz.files.seeds import derive_seed
from danaz.torch.data import Order, OrderError, Samples, UnsupportedLoaderError, batching_of
from danaz.torch.fingerprint import fingerprint
from danaz.torch.randomness import RandomNumbers, is_source

KEPT_EPOCHS = 2  # an epoch may begin with batches that the one before has left
MOST_SAMPLES = 5_000_000  # a sampler without a length that gives more in an epoch, and ten times all, has no end
MOST_INNER = 1000  # samplers that a list in a sampler may hold
LARGEST_SEED = 1 << 63


def order_of(loader: DataLoader[Any], machines: int, seed: int) -> Order:
    """Return the order of a loader's batches, of which each update joins ``machines``.

    Raises UnsupportedLoaderError with the reason.
    """
    if isinstance(loader.dataset, IterableDataset):
        raise UnsupportedLoaderError(
            "danaz.shard cannot share out an IterableDataset: batches are leased by sample number, and it has none. "
            "Iterate danaz.stream(loader, updates) in place of danaz.epochs and danaz.shard, or give it a map-style "
            "Dataset (with __len__ and __getitem__)."
        )
    if not _is_plain(loader):
        return SampledOrder(loader, machines, seed)
    batching = batching_of(loader, machines, seed)
    if not batching.batches_per_epoch:
        raise UnsupportedLoaderError(
            f"{batching.samples} samples do not fill one batch of {batching.batch_size}, so an epoch would be empty. "
            "Use a smaller batch_size, or drop_last=False."
        )
    return batching


def _is_plain(loader: DataLoader[Any]) -> bool:
    """Return whether the loader was made with shuffle=True or False, and uses each sample once an epoch."""
    sampler = loader.sampler
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        return False
    if type(sampler) not in (RandomSampler, SequentialSampler) or getattr(sampler, "replacement", False):
        return False
    return len(sampler) == len(loader.dataset)  # type: ignore[arg-type]


def has_distributed_sampler(loader: DataLoader[Any]) -> bool:
    """Return whether the loader's sampler would keep a part of the samples from this process."""
    found = [part for sampler in (loader.sampler, loader.batch_sampler) for part in _parts_of(sampler)]
    return any(isinstance(part, DistributedSampler) for part in found)


class SampledOrder:
    """The batches that a loader's own sampler gives.

    Of N batches that an update joins, each worker gets one; the last update of an epoch may join fewer.
    """

    def __init__(self, loader: DataLoader[Any], machines: int, seed: int):
        """``machines`` is the number of batches that an update joins."""
        sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        self.name = type(loader.sampler if type(sampler) is BatchSampler else sampler).__name__
        self._sampler = _undivided(sampler, seed)
        self._parts = _parts_of(self._sampler)
        self._most = _most_samples(self._sampler, loader.dataset)
        self._machines = machines
        self._drops_last = loader.batch_size is not None and loader.drop_last
        self._seed = seed
        self._epochs: dict[int, list[Samples]] = {}  # epoch -> its batches, as the sampler gives them
        self._digests: dict[int, int] = {}

    def count(self, epoch: int) -> int:
        """See Order. Raises UnsupportedLoaderError if there are none."""
        joined = len(self._batches(epoch)) / self._machines
        count = int(joined) if self._drops_last else ceil(joined)
        if not count:
            raise UnsupportedLoaderError(
                f"the loader's {self.name} gives {len(self._batches(epoch))} batches in epoch {epoch}, of which an "
                f"update needs {self._machines}, so the epoch would be empty. A sampler must be iterable again in "
                "each epoch, which a generator is not."
            )
        return count

    def batch(self, epoch: int, number: int) -> list[Samples]:
        """See Order."""
        return self._batches(epoch)[number * self._machines : (number + 1) * self._machines]

    def digest(self, epoch: int) -> int:
        """See Order."""
        if epoch not in self._digests:
            self._digests[epoch] = fingerprint(self._batches(epoch))
        return self._digests[epoch]

    def _batches(self, epoch: int) -> list[Samples]:
        if epoch not in self._epochs:
            while len(self._epochs) >= KEPT_EPOCHS:
                del self._epochs[min(self._epochs)]
            own = [source for part in self._parts for source in _attributes(part) if is_source(source)]
            with RandomNumbers(derive_seed(self._seed, epoch), own):
                self._epochs[epoch] = list(self._drawn(epoch))
        return self._epochs[epoch]

    def _drawn(self, epoch: int) -> Iterator[Samples]:
        """Yield the batches of an epoch as the sampler gives them now. Raises UnsupportedLoaderError."""
        for part in self._parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        drawn = 0
        for batch in self._sampler:
            if not hasattr(batch, "__len__") or isinstance(batch, (str, bytes, Mapping)):
                raise UnsupportedLoaderError(
                    f"the loader has batch_size=None, and its {self.name} gives {batch!r} in place of a list of "
                    "samples, so the data set makes whole batches, which danaz.shard cannot share out over the ranks. "
                    "Let the data set return single samples and give the loader a batch_size, or give it a sampler "
                    "that gives lists."
                )
            drawn += max(1, len(batch))
            if drawn > self._most:
                raise UnsupportedLoaderError(
                    f"the loader's {self.name} has given {self._most:.0f} samples and come to no end, which an epoch "
                    "needs. Let it end, give it a __len__, or draw each batch in a loop over danaz.steps."
                )
            yield list(batch)


def _most_samples(sampler: Any, dataset: Any) -> float:
    """Return how many samples an epoch has at most. If a sampler says how long it is, it has an end."""
    try:
        len(sampler)
    except (TypeError, NotImplementedError):
        return max(MOST_SAMPLES, 10 * len(dataset) if hasattr(dataset, "__len__") else 0)
    return inf


# ---- samplers inside of samplers -------------------------------------------------------------------------------------


def _attributes(sampler: object) -> list[Any]:
    return list(getattr(sampler, "__dict__", {}).values())


def _parts_of(sampler: object) -> list[Any]:
    """Return ``sampler``, and the samplers inside of it, such as the sampler of a batch sampler."""
    found: list[Any] = []
    waiting = [sampler]
    while waiting:
        part = waiting.pop(0)
        if not any(part is each for each in found):
            found.append(part)
            for value in _attributes(part):
                items = value if isinstance(value, (list, tuple)) else [value]
                waiting += [item for item in islice(items, MOST_INNER) if isinstance(item, Sampler)]
    return found


def _undivided(sampler: Any, seed: int) -> Any:
    """Return a sampler over all samples: a DistributedSampler, or one inside of it, becomes one for a single replica.

    It keeps its shuffle, and its seed, to which that of the run is added. The user's own object stays as it is.
    """
    changed: dict[str, Any] = {}
    if isinstance(sampler, DistributedSampler):
        every = len(sampler.dataset)  # type: ignore[arg-type]
        seeds = {"seed": (sampler.seed + seed) % LARGEST_SEED}
        changed = {"num_replicas": 1, "rank": 0, "num_samples": every, "total_size": every, **seeds}
    for name, value in getattr(sampler, "__dict__", {}).items():
        if isinstance(value, Sampler) and (inner := _undivided(value, seed)) is not value:
            changed[name] = inner
    if not changed:
        return sampler
    undivided = copy.copy(sampler)
    undivided.__dict__.update(changed)
    return undivided


def check_alike(digests: Sequence[float], epoch: int) -> None:
    """Raise OrderError if the ranks of a worker do not have the same ``digests`` of an epoch's order."""
    if len(set(digests)) > 1:
        raise OrderError(
            f"the ranks of this worker were given different batches in epoch {epoch}: the loader, its data set or its "
            "sampler depends on something that differs from rank to rank, such as the rank, a clock, or files on the "
            "machine. Give every process the same sampler over all samples; danaz shares out its batches."
        )
