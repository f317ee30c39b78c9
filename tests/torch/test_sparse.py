"""Sparse gradients of embeddings: danaz makes them dense, says so once, and gets what torch gets."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from loops import alone
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from danaz.torch.data import Batching
from danaz.torch.optimizer import DistributedOptimizer, UnsupportedOptimizerError

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


def test_sparse_adam_is_refused_by_name() -> None:
    model = words(sparse=True)
    with (
        alone("ssgd") as session,
        pytest.raises(UnsupportedOptimizerError, match=r"SparseAdam .* Use torch\.optim\.Adam"),
    ):
        DistributedOptimizer(torch.optim.SparseAdam([model.table.weight]), model, session.group)
