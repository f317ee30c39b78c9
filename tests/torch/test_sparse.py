"""Sparse gradients of embeddings: danaz makes them dense, says so once, and gets what torch gets."""

from __future__ import annotations

import atexit
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from loops import alone
from ranks import ThreadGroup, on_each_rank
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from danaz.run.settings import RankInfo, Settings
from danaz.torch.data import Batching
from danaz.torch.optimizer import DistributedOptimizer, UnsupportedOptimizerError
from danaz.torch.session import Session

SAMPLES, BATCH = 10, 4
Make = Callable[[nn.Module], torch.optim.Optimizer]


class Words(nn.Module):
    """An embedding, looked up twice in a sample, and a dense layer."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 3, sparse=sparse)
        self.last = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.table(x).sum(1))


def words(sparse: bool) -> Words:
    torch.manual_seed(3)
    return Words(sparse)


def make_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(4)
    return TensorDataset(
        torch.randint(0, 6, (SAMPLES, 4), generator=generator), torch.randn(SAMPLES, 1, generator=generator)
    )


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
    """Clip, add up two losses, and clear the gradients now to None and now to zero."""
    for number, (x, y) in enumerate(batches):
        optimizer.zero_grad(set_to_none=number % 2 == 0)
        nn.functional.mse_loss(model(x), y).backward()
        (0.5 * nn.functional.mse_loss(model(x), y)).backward()
        optimizer.step()


@pytest.mark.parametrize("algorithm", ["baseline", "dana", "ssgd"])
@pytest.mark.parametrize(
    "make",
    [
        lambda model: torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda model: torch.optim.AdamW(model.parameters(), 0.01, betas=(0.0, 0.99)),
        lambda model: torch.optim.Adagrad(model.parameters(), 0.1),
    ],
    ids=["sgd", "adamw", "adagrad"],
)
def test_the_result_is_that_of_dense_gradients_in_torch(make: Make, algorithm: str) -> None:
    ours, theirs = words(sparse=True), words(sparse=False)
    with alone(algorithm) as session, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer = DistributedOptimizer(make(ours), ours, session.group, replicated=True)
        session.adopt(optimizer)
        session.epochs = 3
        for epoch in range(3):
            loop(ours, optimizer, session.shard(DataLoader(make_data(), batch_size=BATCH, shuffle=True), epoch))
        session.finish()
    assert [str(each.message)[:41] for each in said] == ["the gradient of table.weight is sparse. d"]
    batching, optimizer = Batching(SAMPLES, BATCH), make(theirs)
    loop(theirs, optimizer, (make_data()[batching.indices(b)] for b in range(batching.plan(3).batches)))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        buffer = optimizer.state[q].get("momentum_buffer")
        expected = q if buffer is None else q + 0.02 * 0.9 * buffer  # from torch's variable, which looks ahead, to θ
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dense_rank", [None, 0, 1])
def test_ranks_with_and_without_a_sparse_gradient(dense_rank: int | None) -> None:
    """Only some samples are looked up in the table, and one of the ranks may have it dense."""

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        used = x[:, 0] < 2
        squares = (model.last(torch.ones(len(x), 3)) - y).square().sum()
        if used.any():
            squares = squares + (model(x[used]) - y[used]).square().sum()
        return squares / len(x)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[list[Tensor]]) -> nn.Module:
        for x, y in batches:
            optimizer.zero_grad()
            loss(model, x, y).backward()
            optimizer.step()
        return model

    models = [words(sparse=rank != dense_rank) for rank in range(2)]

    def work(group: ThreadGroup) -> nn.Module:
        session, model = Session(Settings(algorithm="ssgd"), RankInfo(), group), models[group.rank]
        atexit.unregister(session.close)
        sgd = torch.optim.SGD(model.parameters(), 0.05)
        optimizer = DistributedOptimizer(sgd, model, group, replicated=True)
        session.adopt(optimizer)
        train(model, optimizer, session.shard(DataLoader(make_data(), batch_size=3, shuffle=True), 0))
        session.finish()
        session.close()
        return model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = on_each_rank(2, work)
    theirs, batching = words(sparse=False), Batching(SAMPLES, 3)
    batches = ([*make_data()[batching.indices(number)]] for number in range(batching.batches_per_epoch))
    train(theirs, torch.optim.SGD(theirs.parameters(), 0.05), batches)
    for result in results:
        if isinstance(result, BaseException):
            raise result
        for p, q in zip(result.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_sparse_adam_is_refused_by_name() -> None:
    model = words(sparse=True)
    with (
        alone("ssgd") as session,
        pytest.raises(UnsupportedOptimizerError, match=r"SparseAdam .* Use torch\.optim\.Adam"),
    ):
        DistributedOptimizer(torch.optim.SparseAdam([model.table.weight]), model, session.group)
