"""The ways in which people write training loops, each as a function that torch alone and danaz both run.

A loop gets a `Run`: the model, the optimizer and the batches. It does what a script would do, and does not mention
danaz. `train_with_torch` and `train_with_danaz` run it, and the parameters must come out the same.
"""

from __future__ import annotations

import atexit
import copy
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from live import until
from sockets import PATIENCE_S, serving
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import danaz.torch.session
from danaz.run.settings import RankInfo, Settings
from danaz.server.core import ServerCore
from danaz.torch.data import Batching
from danaz.torch.optimizer import DistributedOptimizer
from danaz.torch.session import Session
from danaz.worker.group import make_group
from danaz.worker.link import EditedError

SAMPLES, BATCH, EPOCHS, FEATURES = 22, 10, 4, 5  # batches of 10, 10 and 2: three ranks share them as 4/3/3 and 1/1/0
BATCHES_PER_EPOCH = 3


class Net(nn.Module):
    """Three layers, one of which a loop may freeze, and one more that the loss does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 6)
        self.second = nn.Linear(6, 4)
        self.last = nn.Linear(4, 1)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Flat(nn.Module):
    """A model whose gradient does not depend on its parameters, so that any order of updates gives the same result."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 1)
        self.second = nn.Linear(FEATURES, 1)
        self.last = nn.Linear(FEATURES, 1)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(2 * x) + self.last(x * x)


@dataclass(frozen=True)
class Problem:
    """The model to train, its data and its loss."""

    make_model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]  # a mean over samples
    momentum: float
    weight_decay: float
    adamw: bool = False  # instead of SGD; β₁ is the momentum

    def model(self) -> nn.Module:
        torch.manual_seed(1)
        return self.make_model()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.adamw:
            betas = (self.momentum, 0.99)
            return torch.optim.AdamW(model.parameters(), lr=0.01, betas=betas, weight_decay=self.weight_decay)
        options = {"momentum": self.momentum, "nesterov": self.momentum > 0, "weight_decay": self.weight_decay}
        return torch.optim.SGD(model.parameters(), lr=0.1, **options)


CURVED = Problem(Net, nn.functional.mse_loss, momentum=0.9, weight_decay=0.01)
CURVED_ADAMW = Problem(Net, nn.functional.mse_loss, momentum=0.9, weight_decay=0.1, adamw=True)
# Without momentum and decay, and with constant gradients, the updates of several workers commute.
FLAT = Problem(Flat, lambda output, y: (output * y).mean(), momentum=0.0, weight_decay=0.0)


@dataclass
class Run:
    """Everything that a loop gets."""

    problem: Problem
    model: nn.Module
    optimizer: Any
    batches: Callable[[], Iterator[tuple[int, Tensor, Tensor]]]  # (epoch, x, y)
    seen: list[float] = field(default_factory=list)  # the values that the loop has looked at

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self.problem.loss(self.model(x), y)

    @property
    def layer(self) -> nn.Module:
        layer = self.model.second
        assert isinstance(layer, nn.Module)
        return layer


Loop = Callable[[Run], None]


def make_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    return TensorDataset(
        torch.randn(SAMPLES, FEATURES, generator=generator), torch.randn(SAMPLES, 1, generator=generator)
    )


# ---- clearing gradients ---------------------------------------------------------------------------------------------


def usual(run: Run) -> None:
    for _, x, y in run.batches():
        run.optimizer.zero_grad()
        run.loss(x, y).backward()
        run.optimizer.step()


def zero_in_place(run: Run) -> None:
    for _, x, y in run.batches():
        run.optimizer.zero_grad(set_to_none=False)
        run.loss(x, y).backward()
        run.optimizer.step()


def zero_by_model(run: Run) -> None:
    for _, x, y in run.batches():
        run.loss(x, y).backward()
        run.optimizer.step()
        run.model.zero_grad()


def never_zero(run: Run) -> None:
    for _, x, y in run.batches():
        (0.1 * run.loss(x, y)).backward()
        run.optimizer.step()


def closure(run: Run) -> None:
    for _, x, y in run.batches():

        def again(x: Tensor = x, y: Tensor = y) -> Tensor:
            run.optimizer.zero_grad()
            loss = run.loss(x, y)
            loss.backward()
            return loss

        assert isinstance(run.optimizer.step(again), Tensor)


# ---- between backward and step --------------------------------------------------------------------------------------


def clip_by_norm(run: Run) -> None:
    for _, x, y in run.batches():
        run.optimizer.zero_grad()
        run.loss(x, y).backward()
        run.seen.append(float(nn.utils.clip_grad_norm_(run.model.parameters(), 0.05)))
        assert run.seen[-1] > 0.05  # so that it does clip
        run.optimizer.step()


def clip_by_value(run: Run) -> None:
    for _, x, y in run.batches():
        run.optimizer.zero_grad()
        run.loss(x, y).backward()
        nn.utils.clip_grad_value_(run.model.parameters(), 0.02)
        run.optimizer.step()


def log_norms(run: Run) -> None:
    for _, x, y in run.batches():
        run.optimizer.zero_grad()
        run.loss(x, y).backward()
        run.seen += [float(p.grad.norm()) for p in run.model.parameters() if p.grad is not None]
        run.optimizer.step()


def scale_behind_autograd(run: Run) -> None:
    for _, x, y in run.batches():
        run.optimizer.zero_grad()
        run.loss(x, y).backward()
        for p in run.model.parameters():
            if p.grad is not None:
                p.grad.data.mul_(0.5)
        run.optimizer.step()


def replace_gradients(run: Run) -> None:
    for _, x, y in run.batches():
        run.optimizer.zero_grad()
        run.loss(x, y).backward()
        for p in run.model.parameters():
            if p.grad is not None:
                p.grad = p.grad * 0.5
        run.optimizer.step()


def add_noise(run: Run) -> None:
    """The noise comes from one seed, so that all ranks and torch alone draw the same."""
    generator = torch.Generator().manual_seed(3)
    for _, x, y in run.batches():
        run.optimizer.zero_grad()
        run.loss(x, y).backward()
        for p in run.model.parameters():
            if p.grad is not None:
                p.grad.add_(torch.randn(p.shape, generator=generator), alpha=0.01)
        run.optimizer.step()


def drop_a_gradient(run: Run) -> None:
    """The script takes a layer out of some steps."""
    for number, (_, x, y) in enumerate(run.batches()):
        run.optimizer.zero_grad()
        run.loss(x, y).backward()
        if number % 2:
            for p in run.layer.parameters():
                p.grad = None
        run.optimizer.step()


# ---- several backwards ----------------------------------------------------------------------------------------------


def two_losses(run: Run) -> None:
    for _, x, y in run.batches():
        run.optimizer.zero_grad()
        run.loss(x, y).backward()
        (0.1 * sum(p.square().sum() for p in run.layer.parameters())).backward()
        run.optimizer.step()


def clip_between_two_losses(run: Run) -> None:
    for _, x, y in run.batches():
        run.optimizer.zero_grad()
        run.loss(x, y).backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), 0.05)
        (0.5 * run.loss(x, y)).backward()
        run.optimizer.step()


def in_parts(run: Run) -> None:
    """The batch is cut into parts of two samples. The number of parts depends on the rank's share."""
    for _, x, y in run.batches():
        run.optimizer.zero_grad()
        for part, target in zip(x.split(2), y.split(2), strict=True):
            (run.loss(part, target) * (len(part) / len(x))).backward()
        run.optimizer.step()


def penalty_on_a_gradient(run: Run) -> None:
    for _, x, y in run.batches():
        run.optimizer.zero_grad()
        x = x.clone().requires_grad_()
        loss = run.loss(x, y)
        (slope,) = torch.autograd.grad(loss * len(x), x, create_graph=True)
        (loss + 0.1 * slope.square().sum(1).mean()).backward()
        run.optimizer.step()


# ---- mixed precision ------------------------------------------------------------------------------------------------


def scaler(run: Run) -> None:
    scale = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for _, x, y in run.batches():
        run.optimizer.zero_grad()
        scale.scale(run.loss(x, y)).backward()
        scale.step(run.optimizer)
        scale.update()
        run.seen.append(scale.get_scale())


def scaler_with_clipping(run: Run) -> None:
    scale = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for _, x, y in run.batches():
        run.optimizer.zero_grad()
        scale.scale(run.loss(x, y)).backward()
        scale.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), 0.05)
        scale.step(run.optimizer)
        scale.update()


def scaler_that_overflows(run: Run) -> None:
    """It overflows sometimes, and only on some ranks: only the rank with the largest sample sees it."""
    scale = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for number, (_, x, y) in enumerate(run.batches()):
        run.optimizer.zero_grad()
        loss = run.loss(x, y)
        if number % 4 == 1 and bool((x == X_MAX).any()):
            loss = loss * 1e38 * 1e38
        scale.scale(loss).backward()
        scale.step(run.optimizer)
        scale.update()
        run.seen.append(scale.get_scale())


def autocast(run: Run) -> None:
    for _, x, y in run.batches():
        run.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
            loss = run.loss(x, y)
        loss.backward()
        run.optimizer.step()


# ---- skipped steps --------------------------------------------------------------------------------------------------

X_MAX = float(make_data().tensors[0].max())


def skip_before_backward(run: Run) -> None:
    for number, (_, x, y) in enumerate(run.batches()):
        run.optimizer.zero_grad()
        loss = run.loss(x, y)
        if number % 3 == 1:
            continue
        loss.backward()
        run.optimizer.step()


def skip_after_backward(run: Run) -> None:
    for number, (_, x, y) in enumerate(run.batches()):
        run.optimizer.zero_grad()
        run.loss(x, y).backward()
        if number % 3 == 1:
            continue
        run.optimizer.step()


def skip_where_a_loss_is_not_finite(run: Run) -> None:
    """Only a rank that has one of the samples notices. torch alone has all samples, and always notices."""
    for _, x, y in run.batches():
        run.optimizer.zero_grad()
        loss = run.loss(x, y)
        if bool((x == X_MAX).any()):
            loss = loss * float("nan")
        if not torch.isfinite(loss):
            continue
        loss.backward()
        run.optimizer.step()


# ---- parameters that make no step -----------------------------------------------------------------------------------


def freeze_from_the_start(run: Run) -> None:
    run.layer.requires_grad_(False)
    usual(run)


def freeze_in_mid_run(run: Run) -> None:
    for epoch, x, y in run.batches():
        run.layer.requires_grad_(epoch < 2)
        run.optimizer.zero_grad()
        run.loss(x, y).backward()
        run.optimizer.step()


def unfreeze_in_mid_run(run: Run) -> None:
    run.layer.requires_grad_(False)
    for epoch, x, y in run.batches():
        run.layer.requires_grad_(epoch >= 2)
        run.optimizer.zero_grad()
        run.loss(x, y).backward()
        run.optimizer.step()


def use_a_layer_now_and_then(run: Run) -> None:
    for number, (_, x, y) in enumerate(run.batches()):
        run.optimizer.zero_grad()
        loss = run.loss(x, y)
        if number % 3 == 0:
            loss = loss + sum(p.square().sum() + p.sum() for p in run.model.unused.parameters())
        loss.backward()
        run.optimizer.step()


def use_a_layer_for_one_sample(run: Run) -> None:
    """Only the rank that has the sample gets a gradient for the layer."""
    for _, x, y in run.batches():
        run.optimizer.zero_grad()
        loss = run.loss(x, y)
        chosen = (x == X_MAX).any(1)
        if bool(chosen.any()):
            uses = sum(p.sum() for p in run.model.unused.parameters())
            loss = loss + uses * (chosen.sum() / len(x))
        loss.backward()
        run.optimizer.step()


# ---- parameters that the script itself moves ------------------------------------------------------------------------


def clamp_after_the_step(run: Run) -> None:
    for _, x, y in run.batches():
        run.optimizer.zero_grad()
        run.loss(x, y).backward()
        run.optimizer.step()
        for p in run.model.parameters():
            p.data.clamp_(-0.2, 0.2)


def load_the_best(run: Run) -> None:
    best = copy.deepcopy(run.model.state_dict())
    for number, (_, x, y) in enumerate(run.batches()):
        if number == 5:
            run.model.load_state_dict(best)
        run.optimizer.zero_grad()
        run.loss(x, y).backward()
        run.optimizer.step()


def replace_the_memory(run: Run) -> None:
    for _, x, y in run.batches():
        run.optimizer.zero_grad()
        run.loss(x, y).backward()
        run.optimizer.step()
        for p in run.layer.parameters():
            p.data = p.data * 0.9


def edit_at_the_end(run: Run) -> None:
    usual(run)
    with torch.no_grad():
        for p in run.layer.parameters():
            p.add_(1.0)


EDITS = [clamp_after_the_step, load_the_best, replace_the_memory, edit_at_the_end]

LOOPS: list[Loop] = [
    *(usual, zero_in_place, zero_by_model, never_zero, closure),
    *(clip_by_norm, clip_by_value, log_norms, scale_behind_autograd, replace_gradients, add_noise, drop_a_gradient),
    *(two_losses, clip_between_two_losses, in_parts, penalty_on_a_gradient),
    *(scaler, scaler_with_clipping, scaler_that_overflows, autocast),
    *(skip_before_backward, skip_after_backward, skip_where_a_loss_is_not_finite),
    *(freeze_from_the_start, freeze_in_mid_run, unfreeze_in_mid_run),
    *(use_a_layer_now_and_then, use_a_layer_for_one_sample),
    *EDITS,
]

# Several workers get the same result in any order only if a batch's contribution does not depend on other batches:
# neither on how many batches a worker has seen, nor on the parameters.
COMMUTING: list[Loop] = [
    *(usual, zero_in_place, zero_by_model, closure),
    *(clip_by_norm, clip_by_value, scale_behind_autograd, replace_gradients),
    *(in_parts, scaler, scaler_with_clipping, skip_where_a_loss_is_not_finite),
    *(freeze_from_the_start, freeze_in_mid_run, unfreeze_in_mid_run, use_a_layer_for_one_sample),
]


# ---- who runs them --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """The result of a loop."""

    model: nn.Module
    seen: list[float]


def train_with_torch(loop: Loop, problem: Problem) -> Result:
    """Train with torch alone in one process; then go from torch's variable, which looks ahead, to θ."""
    model = problem.model()
    optimizer, data, batching = problem.optimizer(model), make_data(), Batching(SAMPLES, BATCH)

    def batches() -> Iterator[tuple[int, Tensor, Tensor]]:
        for batch in range(batching.plan(EPOCHS).batches):
            yield batching.epoch_of(batch), *data[batching.indices(batch)]

    run = Run(problem, model, optimizer, batches)
    loop(run)
    for p, state in optimizer.state.items():
        if state.get("momentum_buffer") is not None:
            p.data.add_(state["momentum_buffer"], alpha=0.1 * problem.momentum)
    return Result(model, run.seen)


def train_with_danaz(loop: Loop, problem: Problem, session: Session) -> Result:
    """Train with the same loop on this rank's part of the batches."""
    atexit.unregister(session.close)
    model = problem.model()
    optimizer = DistributedOptimizer(
        problem.optimizer(model), model, session.group, replicated=session.place.server is None
    )
    session.adopt(optimizer)
    session.epochs = EPOCHS
    loader = DataLoader(make_data(), batch_size=BATCH, shuffle=True)

    def batches() -> Iterator[tuple[int, Tensor, Tensor]]:
        for epoch in range(EPOCHS):
            for x, y in session.shard(loader, epoch):
                yield epoch, x, y

    run = Run(problem, model, optimizer, batches)
    loop(run)
    session.finish()
    session.close()
    return Result(model, run.seen)


def difference(model: nn.Module, other: nn.Module) -> float:
    """Return the largest relative distance between the parameters of two models."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(float((p.detach() - q.detach()).norm() / q.detach().norm()) for p, q in pairs)


# ---- the same in every process of a world ---------------------------------------------------------------------------


def run_all(out: str, workers: int) -> None:
    """Run all loops on this rank, each as its own run, with a server in a thread of worker 0's first rank."""
    mode, place = os.environ["MODE"], RankInfo(worker=int(os.environ["DANAZ_WORKER"]))
    group = make_group(os.environ["COLLECTIVE"])
    close, group.close = group.close, lambda: None  # type: ignore[method-assign]  # the world outlives the sessions
    danaz.torch.session.make_group = lambda collective: group  # type: ignore[assignment]
    settings = Settings(algorithm=mode, workers=workers)
    number = group.size * place.worker + group.rank if mode != "ssgd" else group.rank
    problem, loops = (CURVED, LOOPS) if workers == 1 else (FLAT, COMMUTING)
    for loop in loops:
        with ExitStack() as stack:
            here = place
            if mode != "ssgd":
                address = Path(out, f"{loop.__name__}.address")
                if number == 0:
                    core = ServerCore(settings.for_server())
                    bound, thread = stack.enter_context(serving(core))
                    address.with_suffix(".part").write_text(bound)
                    address.with_suffix(".part").rename(address)
                until(address.exists, "the server has an address")
                here = replace(place, server=address.read_text())
            facts: dict[str, Any] = {"error": ""}
            try:
                result = train_with_danaz(loop, problem, Session(settings, here))
                facts |= {"model": result.model.state_dict(), "seen": result.seen}
            except EditedError as error:
                facts["error"] = str(error)
            torch.save(facts, Path(out, f"{loop.__name__}.{number}"))
            if number == 0 and mode != "ssgd" and not facts["error"]:
                thread.join(PATIENCE_S)
    close()
