"""A loader's own sampler: every process finds the same batches, and uses each sample as often as the sampler says."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from math import inf
from typing import Any

import numpy as np
import pytest
import torch
from loops import adopt, alone, assert_same, make_data, make_net, make_plain_sgd, usual_step
from torch.nn.functional import mse_loss
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from danaz.server.settings import ServerSettings
from danaz.torch.data import Batching, OrderError, Samples, Share
from danaz.torch.samplers import order_of
from danaz.torch.session import Session
from danaz.worker.conversation import RefusedError
from scripts import Counted, ScriptCluster, make_optimizer, run_world

SAMPLES = 11
DATA = TensorDataset(torch.arange(float(SAMPLES)).unsqueeze(1), torch.ones(SAMPLES, 1))
WEIGHTS = [1.0, 5.0] * 5 + [1.0]


class Own(Sampler[int]):
    """A sampler as people write them, with random numbers from wherever ``draw`` takes them."""

    def __init__(self, draw: Callable[[], float]):
        self.draw = draw

    def __iter__(self) -> Iterator[int]:
        keys = [self.draw() for _ in range(SAMPLES)]
        return iter(sorted(range(SAMPLES), key=keys.__getitem__))

    def __len__(self) -> int:
        return SAMPLES


class WithGenerators(Own):
    """Draws from generators of its own, which nobody has seeded."""

    def __init__(self) -> None:
        self.numpy, self.legacy, self.python = np.random.default_rng(), np.random.RandomState(), random.Random()
        super().__init__(lambda: self.numpy.random() + self.legacy.random_sample() + self.python.random())


class Buckets(Sampler[list[int]]):
    """Batches of samples of the same length, in random order; a batch has at most 5 samples, and three have fewer."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def __iter__(self) -> Iterator[list[int]]:
        batches = [[0, 1, 2, 3], [4, 5, 6, 7, 8], [9], [10]]
        random.shuffle(batches)
        return iter(batches)

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "weighted": lambda: DataLoader(DATA, 3, sampler=WeightedRandomSampler(WEIGHTS, 20)),
    "generator": lambda: DataLoader(DATA, 3, sampler=WeightedRandomSampler(WEIGHTS, 20, generator=torch.Generator())),
    "replacement": lambda: DataLoader(DATA, 3, sampler=RandomSampler(DATA, replacement=True)),
    "fewer": lambda: DataLoader(DATA, 3, sampler=RandomSampler(DATA, num_samples=7)),
    "subset": lambda: DataLoader(DATA, 2, sampler=SubsetRandomSampler([1, 3, 5, 7, 9, 10, 0]), drop_last=True),
    "random": lambda: DataLoader(DATA, 3, sampler=Own(random.random)),
    "numpy": lambda: DataLoader(DATA, 3, sampler=Own(np.random.random)),
    "torch": lambda: DataLoader(DATA, 3, sampler=Own(lambda: float(torch.rand(())))),
    "own generators": lambda: DataLoader(DATA, 3, sampler=WithGenerators()),
    "buckets": lambda: DataLoader(DATA, batch_sampler=Buckets()),
    "batch sampler": lambda: DataLoader(DATA, batch_sampler=BatchSampler(WithGenerators(), 4, drop_last=True)),
    "whole batches": lambda: DataLoader(DATA, None, sampler=BatchSampler(RandomSampler(DATA), 4, drop_last=False)),
    "a list": lambda: DataLoader(DATA, batch_sampler=[[0, 1], [2], [3, 3]]),
}


def epoch_of(loader: DataLoader[Any], epoch: int, machines: int = 1, seed: int = 5) -> list[list[Samples]]:
    order = order_of(loader, machines, seed)
    return [order.batch(epoch, number) for number in range(order.count(epoch))]


def flat(nested: Any) -> list[int]:
    return list(chain.from_iterable(chain.from_iterable(nested)))


# ---- the same list in every process ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOADERS)
def test_processes_draw_the_same_batches_whatever_random_numbers_they_had(name: str) -> None:
    lists, digests = [], []
    for seed in (1, 2):
        for module in (torch.manual_seed, np.random.seed, random.seed):
            module(seed)
        lists.append([epoch_of(LOADERS[name](), epoch) for epoch in (0, 1)])
        digests.append(order_of(LOADERS[name](), 1, 5).digest(1))
    assert lists[0] == lists[1]
    assert digests[0] == digests[1] > 0
    is_random = name != "a list"
    assert (lists[0][0] != lists[0][1]) == is_random, "epochs differ"
    assert (lists[0][0] != epoch_of(LOADERS[name](), 0, seed=6)) == is_random, "the run's seed decides"


@pytest.mark.parametrize("name", LOADERS)
def test_the_scripts_own_random_numbers_stay_as_they_were(name: str) -> None:
    loader = LOADERS[name]()
    generator = getattr(loader.sampler, "generator", None)
    before = torch.get_rng_state(), np.random.get_state()[1], random.getstate(), generator and generator.get_state()
    epoch_of(loader, 3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]
    assert generator is None or torch.equal(generator.get_state(), before[3])


def test_an_epoch_drawn_later_is_the_same() -> None:
    order = order_of(LOADERS["own generators"](), 1, 5)
    first = [order.batch(epoch, 0) for epoch in range(5)]
    assert [order.batch(epoch, 0) for epoch in reversed(range(5))] == first[::-1]


def test_set_epoch_gets_the_epoch() -> None:
    loader = LOADERS["buckets"]()
    epoch_of(loader, 7)
    assert loader.batch_sampler.epochs == [7]  # type: ignore[union-attr]


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_plain_loader_keeps_the_order_that_it_had(shuffle: bool) -> None:
    loaders = (
        DataLoader(DATA, 4, shuffle=shuffle),
        DataLoader(DATA, 4, sampler=RandomSampler(DATA, num_samples=SAMPLES)),
    )
    assert isinstance(order_of(loaders[0], 1, 5), Batching)
    assert isinstance(order_of(loaders[1], 1, 5), Batching)


# ---- shared out ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "ranks"), [(1, 1), (1, 3), (2, 2), (3, 1)])
@pytest.mark.parametrize("name", LOADERS)
def test_the_parts_of_all_ranks_are_what_the_sampler_gives(name: str, workers: int, ranks: int) -> None:
    of_torch = epoch_of(LOADERS[name](), 2)
    joined = epoch_of(LOADERS[name](), 2, machines=workers)
    shares = [Share(worker, workers, rank, ranks) for worker in range(workers) for rank in range(ranks)]
    parts = [[share.of_joined(batches) for share in shares] for batches in joined]
    expected = of_torch[: len(joined) * workers] if name == "subset" else of_torch  # which drops what is not whole
    assert flat(parts) == flat(expected)


def test_a_worker_gets_a_batch_of_the_sampler_whole() -> None:
    [first, second] = [[batches[0] for batches in epoch_of(LOADERS["buckets"](), epoch)] for epoch in (0, 1)]
    for epoch, of_torch in enumerate((first, second)):
        [*joined] = epoch_of(LOADERS["buckets"](), epoch, machines=2)
        for worker in range(2):
            own = [Share(worker, 2).of_joined(batches) for batches in joined]
            assert own == of_torch[worker::2]


# ---- DistributedSampler ----------------------------------------------------------------------------------------------


class Reversed(DistributedSampler[Any]):
    """A subclass that has an idea of its own."""

    def __iter__(self) -> Iterator[int]:
        return reversed(list(super().__iter__()))  # type: ignore[return-value]


def of_one_replica(kind: type[DistributedSampler[Any]], epoch: int, **options: Any) -> list[int]:
    sampler = kind(DATA, num_replicas=1, rank=0, **options)
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("kind", [DistributedSampler, Reversed])
@pytest.mark.parametrize("options", [{"seed": 3}, {"shuffle": False}, {"drop_last": True}])
def test_a_distributed_sampler_becomes_one_for_a_single_replica(
    kind: type[DistributedSampler[Any]], options: dict[str, Any], wrap: bool
) -> None:
    sampler = kind(DATA, num_replicas=4, rank=2, **options)
    loader = DataLoader(DATA, 3, sampler=sampler)
    if wrap:
        loader = DataLoader(DATA, batch_sampler=BatchSampler(sampler, 3, drop_last=False))
    before = dict(vars(sampler))
    sampler.set_epoch(99)
    assert flat(epoch_of(loader, 2, seed=0)) == of_one_replica(kind, 2, **options)
    assert {**vars(sampler), "epoch": before["epoch"]} == before, "the script's own object stays as it is"


def test_the_runs_seed_decides_the_order_of_a_distributed_sampler_too() -> None:
    loader = DataLoader(DATA, 3, sampler=DistributedSampler(DATA, 2, 0, seed=3))
    assert flat(epoch_of(loader, 0, seed=4)) == of_one_replica(DistributedSampler, 0, seed=7)


def test_one_warning_says_that_it_is_replaced() -> None:
    seen: list[float] = []
    with alone() as session, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sampler = DistributedSampler(DATA, 2, 1)
        model, optimizer = make_optimizer(session)
        for epoch in session.run_epochs(3):
            sampler.set_epoch(epoch)
            for x, y in session.run_batches(DataLoader(DATA, 4, sampler=sampler), epoch):
                mse_loss(model(x), y).backward()
                optimizer.step()
                seen += x.flatten().tolist()
    said = [str(each.message) for each in caught if "DistributedSampler" in str(each.message)]
    assert len(said) == 1
    assert "danaz does not use: it shares out all of them" in said[0]
    assert seen == [float(index) for epoch in range(3) for index in of_one_replica(DistributedSampler, epoch)]


# ---- trained ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["baseline", "ssgd", "dana"])
def test_one_worker_equals_torch_with_the_same_batches(algorithm: str) -> None:
    data, ours, theirs = make_data(), make_net(), make_net()
    sampler = WeightedRandomSampler([1.0, 3.0] * 11, 30)
    loader = DataLoader(data, 7, sampler=sampler)
    with alone(algorithm) as session:
        session.choose_seed(8)
        optimizer = adopt(session, ours, make_plain_sgd(ours))
        for epoch in session.run_epochs(3):
            batches = session.run_batches(loader, epoch)
            assert len(batches) == len(loader) == 5
            for x, y in batches:
                usual_step(ours, optimizer, x, y)
    sgd = make_plain_sgd(theirs)
    for epoch in range(3):
        for [batch] in epoch_of(loader, epoch, seed=8):
            usual_step(theirs, sgd, *data[batch])
    assert_same(ours, theirs)


def test_a_data_set_that_is_asked_for_whole_batches() -> None:
    asked: list[list[int]] = []

    class Whole(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            asked.append(index)
            return super().__getitem__(index)

    data = Whole(*DATA.tensors)
    sampler = BatchSampler(RandomSampler(data), 4, drop_last=False)
    with alone() as session:
        train(session, lambda: DataLoader(data, None, sampler=sampler), epochs=2)
    assert [len(index) for index in asked] == [4, 4, 3] * 2
    assert Counter(chain.from_iterable(asked)) == dict.fromkeys(range(SAMPLES), 2)


def train(session: Session, loader: Callable[[], DataLoader[Any]], epochs: int = 3) -> None:
    model, optimizer = make_optimizer(session)
    for epoch in session.run_epochs(epochs):
        for x, y in session.run_batches(loader(), epoch):
            optimizer.zero_grad()
            mse_loss(model(x), y).backward()
            optimizer.step()


class Drawing(Sampler[int]):
    """Draws with replacement. It has a generator of its own, because the workers of these tests share a process."""

    def __init__(self) -> None:
        self.generator = torch.Generator()

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randint(0, SAMPLES, (17,), generator=self.generator).tolist())


def drawing_loader(data: Dataset[Any]) -> DataLoader[Any]:
    return DataLoader(data, 4, sampler=Drawing())


def drawn(epochs: int, seed: int) -> Counter[int]:
    orders = (epoch_of(drawing_loader(DATA), epoch, seed=seed) for epoch in range(epochs))
    return Counter(index for order in orders for index in flat(order))


@pytest.mark.parametrize("ranks", [1, 2])
def test_workers_use_each_sample_as_often_as_the_sampler_says(ranks: int) -> None:
    cluster = ScriptCluster(ServerSettings("dana", workers=2))

    def story(session: Session, number: int) -> None:
        session.choose_seed(3)
        train(session, lambda: drawing_loader(Counted(SAMPLES, number, cluster.fetched, lambda: None)))

    for number in range(2):
        cluster.worker(number, story, ranks)
    cluster.run()
    assert len(cluster.updates) == 3 * 5
    # The fifth batch of an epoch has one sample: a second rank computes on it as well, with weight zero.
    last = Counter(i for epoch in range(3) for i in epoch_of(drawing_loader(DATA), epoch, seed=3)[-1][0])
    assert cluster.counts() == drawn(3, 3) + (last if ranks == 2 else Counter())


def test_all_machines_of_ssgd_use_each_sample_as_often_as_the_sampler_says() -> None:
    fetched: list[tuple[int, int]] = []

    def story(session: Session, number: int) -> None:
        session.choose_seed(3)
        train(session, lambda: drawing_loader(Counted(SAMPLES, number, fetched, lambda: None)))

    run_world("ssgd", 2, 1, story)
    last = Counter(i for epoch in range(3) for i in epoch_of(drawing_loader(DATA), epoch, seed=3)[-1][0])
    assert Counter(sample for _, sample in fetched) == drawn(3, 3) + last


# ---- processes that do not agree -------------------------------------------------------------------------------------


def test_ranks_with_different_samplers_are_told() -> None:
    def story(session: Session, number: int) -> None:
        start = session.group.rank
        train(session, lambda: DataLoader(DATA, 2, sampler=range(start, SAMPLES - 1 + start)))  # type: ignore[arg-type]

    with pytest.raises(OrderError, match="ranks of this worker were given different batches in epoch 0"):
        run_world("ssgd", 1, 2, story)


def test_ranks_with_data_sets_of_different_sizes_are_told() -> None:
    def story(session: Session, number: int) -> None:
        train(session, lambda: DataLoader(range(9 + session.group.rank), 2, collate_fn=_pairs))  # type: ignore[arg-type]

    with pytest.raises(OrderError, match="ranks of this worker were given different batches in epoch 0"):
        run_world("ssgd", 1, 2, story)


def _pairs(items: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.tensor(items, dtype=torch.float32).unsqueeze(1)
    return x, x


def test_a_worker_with_another_sampler_than_the_workers_before_is_refused() -> None:
    cluster = ScriptCluster(ServerSettings("dana", workers=2))
    refused: list[str] = []

    def story(session: Session, number: int) -> None:
        start = number
        try:
            train(session, lambda: DataLoader(DATA, 2, sampler=range(start, SAMPLES - 1 + start)))  # type: ignore[arg-type]
        except RefusedError as error:
            refused.append(str(error))
            cluster.core.members[number].heard_at = -inf  # its process ends, and the server notices at once

    for number in range(2):
        cluster.worker(number, story)
    cluster.run()
    [reason] = refused
    assert "its loader has other batches in this epoch than those of the workers before" in reason
    assert len(cluster.updates) == 15, "the other worker trains all"


class Growing(Sampler[int]):
    """Gives another number of samples in each epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(range(4 + 2 * self.epoch))

    def __len__(self) -> int:
        return 4 + 2 * self.epoch


def test_an_epoch_of_another_length_than_planned_is_an_error() -> None:
    with alone() as session, pytest.raises(OrderError, match="has 3 batches in epoch 1, and the run was planned for 2"):
        train(session, lambda: DataLoader(DATA, 2, sampler=Growing()))
