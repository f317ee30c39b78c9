"""A model that torch.compile has wrapped trains as the model itself does, whichever of the two danaz is given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from loops import BATCH, EPOCHS, adopt, alone, make_data, make_sgd
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from danaz.torch.session import Session


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.convolution(x))).mean((2, 3)))


def normed() -> Normed:
    torch.manual_seed(5)
    return Normed()


@contextmanager
def trained(called: nn.Module, given: nn.Module) -> Iterator[Session]:
    """Train by calling one module, with another one given to danaz."""
    with alone("dana") as session:
        optimizer = adopt(session, given, make_sgd(given))
        session.epochs = EPOCHS
        for epoch in range(EPOCHS):
            for x, y in session.shard(DataLoader(make_data(), batch_size=BATCH, shuffle=True), epoch):
                optimizer.zero_grad()
                mse_loss(called(x), y).backward()
                optimizer.step()
        session.finish()
        yield session


@pytest.fixture(scope="module")
def expected() -> nn.Module:
    model = normed()
    with trained(model, model):
        return model


@pytest.mark.parametrize(("backend", "is_wrapped_given"), [("eager", True), ("aot_eager", False)])
def test_a_compiled_model(backend: str, is_wrapped_given: bool, expected: nn.Module) -> None:
    torch.compiler.reset()
    model = normed()
    compiled = torch.compile(model, backend=backend)
    with trained(compiled, compiled if is_wrapped_given else model) as session:
        layout = session.optimizer.flat.layout
    assert [entry.name for entry in layout.parameters] == [name for name, _ in model.named_parameters()]
    assert [entry.name for entry in layout.buffers] == ["norm.running_mean", "norm.running_var"]
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-5)


def test_a_compiled_part_of_a_model(expected: nn.Module) -> None:
    torch.compiler.reset()
    model = normed()
    model.convolution = torch.compile(model.convolution, backend="eager")
    with trained(model, model) as session:
        layout = session.optimizer.flat.layout
    assert [entry.name for entry in layout.parameters] == [name for name, _ in expected.named_parameters()]
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def test_a_loop_that_was_left_ends_the_run_when_the_compiled_model_is_used() -> None:
    torch.compiler.reset()
    model = normed()
    compiled = torch.compile(model, backend="eager")
    with alone("dana") as session:
        optimizer = adopt(session, model, make_sgd(model))
        for epoch in session.run_epochs(2):
            for x, y in session.run_batches(DataLoader(make_data(), batch_size=BATCH), epoch):
                optimizer.zero_grad()
                mse_loss(compiled(x), y).backward()
                optimizer.step()
            break
        assert not session.finished
        compiled(x)
        assert session.finished
