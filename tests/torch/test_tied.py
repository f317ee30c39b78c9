"""A model with tied weights, as language models have, through the loops in which they matter, on one and two ranks."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import product

import pytest
import torch
from ranks import ThreadGroup, on_each_rank
from sockets import serving
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from danaz.run.settings import RankInfo, Settings
from danaz.server.core import ServerCore
from danaz.server.settings import ServerSettings
from danaz.torch.data import Batching
from danaz.torch.optimizer import DistributedOptimizer
from danaz.torch.session import Session

SAMPLES, BATCH, EPOCHS, WORDS = 14, 4, 3, 6  # two ranks share the last batch of 2 as 1/1

Batches = Iterator[tuple[int, Tensor, Tensor]]
Loop = Callable[[nn.Module, torch.optim.Optimizer, Batches], None]


class Tied(nn.Module):
    """The table of words is also the last layer's weight: its gradient has two parts, which come at different times."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, 4)
        self.middle = nn.Linear(4, 4)
        self.last = nn.Linear(4, WORDS)
        self.last.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(self.table(x).mean(1))))


def usual(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches) -> None:
    for _, x, y in batches:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


def clip_by_norm(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches) -> None:
    """The norm counts a tied weight once, and is that of the mean gradient."""
    for _, x, y in batches:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), 0.1) > 0.1
        optimizer.step()


def accumulate(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches) -> None:
    for _, x, y in batches:
        optimizer.zero_grad()
        for words, target in zip(x.split(1), y.split(1), strict=True):
            (cross_entropy(model(words), target) / len(x)).backward()
        optimizer.step()


def freeze_and_unfreeze(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches) -> None:
    for epoch, x, y in batches:
        model.table.weight.requires_grad_(epoch != 1)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


def make(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.01)
    return torch.optim.AdamW(model.parameters(), 0.01, betas=(0.0, 0.9), weight_decay=0.1)


def tied() -> nn.Module:
    torch.manual_seed(1)
    return Tied()


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(0, WORDS, (SAMPLES, 3), generator=generator)
    return TensorDataset(x, torch.randint(0, WORDS, (SAMPLES,), generator=generator))


def train_with_torch(loop: Loop, name: str) -> nn.Module:
    model, batching = tied(), Batching(SAMPLES, BATCH)
    numbers = range(batching.plan(EPOCHS).batches)
    loop(model, make(name, model), ((batching.epoch_of(b), *data()[batching.indices(b)]) for b in numbers))
    return model


def train_with_danaz(loop: Loop, name: str, model: nn.Module, session: Session) -> nn.Module:
    atexit.unregister(session.close)
    replicated = session.place.server is None
    optimizer = DistributedOptimizer(make(name, model), model, session.group, replicated=replicated)
    session.adopt(optimizer)
    session.epochs = EPOCHS
    loader = DataLoader(data(), batch_size=BATCH, shuffle=True)
    loop(model, optimizer, ((e, x, y) for e in range(EPOCHS) for x, y in session.shard(loader, e)))
    session.finish()
    session.close()
    return model


def assert_alike(ours: nn.Module, theirs: nn.Module) -> None:
    assert ours.last.weight is ours.table.weight
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


CASES = list(product([usual, clip_by_norm, accumulate, freeze_and_unfreeze], ["sgd", "adamw"]))


@pytest.mark.parametrize("algorithm", ["baseline", "dana"])
@pytest.mark.parametrize(("loop", "name"), CASES)
def test_one_rank_equals_torch(loop: Loop, name: str, algorithm: str) -> None:
    session = Session(Settings(algorithm=algorithm), RankInfo())
    assert_alike(train_with_danaz(loop, name, tied(), session), train_with_torch(loop, name))


@pytest.mark.parametrize("algorithm", ["ssgd", "dana"])
@pytest.mark.parametrize(("loop", "name"), CASES)
def test_two_ranks_equal_torch(loop: Loop, name: str, algorithm: str) -> None:
    models = [tied(), tied()]
    with ExitStack() as stack:
        place = RankInfo()
        if algorithm == "dana":
            address, _ = stack.enter_context(serving(ServerCore(ServerSettings(algorithm, 1, ""))))
            place = RankInfo(worker=0, server=address)

        def work(group: ThreadGroup) -> nn.Module:
            session = Session(Settings(algorithm=algorithm), place, group)
            return train_with_danaz(loop, name, models[group.rank], session)

        results = on_each_rank(2, work)
    for result in results:
        if isinstance(result, BaseException):
            raise result
        assert_alike(result, train_with_torch(loop, name))
