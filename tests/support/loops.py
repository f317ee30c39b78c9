"""The user's side of training, for tests: a net, its data, torch's optimizers, and the loop in its many forms."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from danaz.run.settings import RankInfo, Settings
from danaz.torch.data import Batching
from danaz.torch.optimizer import DistributedOptimizer
from danaz.torch.session import Session

SAMPLES, BATCH, EPOCHS = 22, 10, 3  # batches of 10, 10 and 2: three ranks share them as 4/3/3 and 1/1/0
Step = Callable[[nn.Module, torch.optim.Optimizer, Tensor, Tensor], None]
Make = Callable[[nn.Module], torch.optim.Optimizer]


class Net(nn.Module):
    """A small net without batch norm, with a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)
        self.unused = nn.Linear(2, 3)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.convolution(x)).mean((2, 3)))


def make_net() -> Net:
    torch.manual_seed(1)
    return Net()


def make_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    return TensorDataset(
        torch.randn(SAMPLES, 3, 5, 5, generator=generator), torch.randn(SAMPLES, 2, generator=generator)
    )


def make_sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)


def make_plain_sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def make_sgd_of_groups(model: nn.Module) -> torch.optim.SGD:
    """Make an SGD with groups in another order than the model's, each with its own rate and weight decay."""
    groups = [
        {"params": list(model.last.parameters()), "lr": 0.2, "weight_decay": 0.1},
        {"params": [*model.convolution.parameters()], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=0.05, momentum=0.8, nesterov=True)


def make_adamw_of_groups(model: nn.Module) -> torch.optim.AdamW:
    """Make an AdamW with groups, each with its own rate, betas and decay. Nothing but ``unused`` is without a decay."""
    groups = [
        {"params": list(model.last.parameters()), "lr": 0.02, "betas": (0.8, 0.9)},
        {"params": [*model.convolution.parameters()]},
        {"params": [*model.unused.parameters()], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)


@contextmanager
def alone(algorithm: str = "dana", **settings: Any) -> Iterator[Session]:
    """Open a session of a lone process, and leave no trace of it at the end."""
    session = Session(Settings(algorithm=algorithm, **settings), RankInfo())
    try:
        yield session
    finally:
        atexit.unregister(session.close)
        session.close()


def adopt(session: Session, model: nn.Module, sgd: torch.optim.Optimizer, passes: int = 1) -> DistributedOptimizer:
    optimizer = DistributedOptimizer(sgd, model, session.group, passes)
    session.adopt(optimizer)
    return optimizer


def usual_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    mse_loss(model(x), y).backward()
    optimizer.step()


def train(model: nn.Module, make: Make = make_sgd, step: Step = usual_step, **options: Any) -> DistributedOptimizer:
    """Train with danaz in a lone process."""
    passes = options.pop("passes", 1)
    with alone(**options) as session:
        optimizer = adopt(session, model, make(model), passes)
        session.epochs = EPOCHS
        loader = DataLoader(make_data(), batch_size=BATCH, shuffle=True)
        for epoch in range(EPOCHS):
            for x, y in session.shard(loader, epoch):
                step(model, optimizer, x, y)
        session.finish()
        return optimizer


def train_with_torch(
    model: nn.Module, make: Make = make_sgd, step: Step = usual_step, drop_last: bool = False
) -> torch.optim.Optimizer:
    """Train the same with torch alone, and then go from torch's variable, which looks ahead, to θ."""
    optimizer, data = make(model), make_data()
    batching = Batching(SAMPLES, BATCH, drop_last=drop_last)
    for batch in range(batching.plan(EPOCHS).batches):
        step(model, optimizer, *data[batching.indices(batch)])
    for group in optimizer.param_groups:
        for p in group["params"]:
            if "momentum_buffer" in optimizer.state[p]:
                p.data.add_(optimizer.state[p]["momentum_buffer"], alpha=group["lr"] * group["momentum"])
    return optimizer


def assert_same(model: nn.Module, other: nn.Module, tolerance: float = 1e-5, name: str = "") -> None:
    for (key, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=tolerance, atol=tolerance), f"{name} {key}: off by {(p - q).abs().max():.3g}"


# ---- the user's loop, in its many forms -----------------------------------------------------------------------------


def zero_by_optimizer_in_place(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad(set_to_none=False)
    mse_loss(model(x), y).backward()
    optimizer.step()


def zero_by_model(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    mse_loss(model(x), y).backward()
    optimizer.step()
    model.zero_grad()


def zero_by_model_in_place(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    mse_loss(model(x), y).backward()
    optimizer.step()
    model.zero_grad(set_to_none=False)


def never_zero(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    mse_loss(model(x), y).backward()
    optimizer.step()


def scale_by_replacing(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    mse_loss(model(x), y).backward()
    for p in model.parameters():
        if p.grad is not None:
            p.grad = p.grad * 0.5
    optimizer.step()


def by_closure(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0


def in_two_passes(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    for part in (slice(0, 1), slice(1, None)):
        if len(x[part]):
            (mse_loss(model(x[part]), y[part]) * (len(x[part]) / len(x))).backward()
    optimizer.step()


def clip(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    mse_loss(model(x), y).backward()
    assert nn.utils.clip_grad_norm_(model.parameters(), 0.05) > 0.05  # so that it does clip
    optimizer.step()


def use_a_parameter_now_and_then(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """Some samples do use ``unused``. A rank whose part has none of them has no gradient for it."""
    optimizer.zero_grad()
    loss = mse_loss(model(x), y)
    chosen = x[:, 0, 0, 0] > 0
    if chosen.any():
        loss = loss + model.unused(x[chosen, 0, 0, :2]).square().sum() / len(x)
    loss.backward()
    optimizer.step()


def schedule_each_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    usual_step(model, optimizer, x, y)
    optimizer.param_groups[0]["lr"] *= 0.9


STEPS = [
    usual_step,
    zero_by_optimizer_in_place,
    zero_by_model,
    zero_by_model_in_place,
    never_zero,
    scale_by_replacing,
    by_closure,
    in_two_passes,
    clip,
]


def variations() -> dict[str, dict[str, object]]:
    """Return name -> how to train this variation."""
    every_step = {
        step.__name__: {"make": make_sgd_of_groups, "step": step, "passes": 1 + (step.__name__ == "in_two_passes")}
        for step in STEPS
    }
    usual = {"make": make_sgd, "step": usual_step}
    return {
        **every_step,
        "now and then": {"make": make_sgd, "step": use_a_parameter_now_and_then},
        # There is no momentum here: with it, θ − ηγv of ssgd and torch's own variable would differ when η changes.
        "schedule": {"make": make_plain_sgd, "step": schedule_each_step},
        "adamw": {"make": make_adamw_of_groups, "step": usual_step},
        "adamw, clipped": {"make": make_adamw_of_groups, "step": clip},
        "adamw, now and then": {"make": make_adamw_of_groups, "step": use_a_parameter_now_and_then},
        "adamw, schedule": {"make": make_adamw_of_groups, "step": schedule_each_step},
        "channels last": {**usual, "channels_last": True},
        "loading processes": {**usual, "num_workers": 2},
        "whole batches": {**usual, "drop_last": True},
        "whole batches, loading processes": {**usual, "drop_last": True, "num_workers": 2},
    }
