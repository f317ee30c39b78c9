"""Parameters of other types than float32: danaz trains float32 vectors, and the model holds their rounded values."""

from __future__ import annotations

import atexit
import copy
from collections.abc import Callable

import pytest
import torch
from loops import BATCH, EPOCHS, SAMPLES, adopt, alone, make_data, make_net, train
from ranks import ThreadGroup, on_each_rank
from torch import Tensor, nn
from torch.utils.data import DataLoader

from danaz.run.settings import RankInfo, Settings
from danaz.torch.data import Batching
from danaz.torch.optimizer import DistributedOptimizer
from danaz.torch.session import Session
from danaz.worker.group import SoloGroup

Make = Callable[[nn.Module], torch.optim.Optimizer]
MIXED = "some layers in bfloat16, some in float64"

MAKES: dict[str, Make] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), 0.01, betas=(0.0, 0.99), weight_decay=0.1),
}


def net_of(kind: torch.dtype | str) -> nn.Module:
    model = make_net()
    if isinstance(kind, torch.dtype):
        return model.to(kind)
    model.convolution.bfloat16()
    model.last.double()
    return model


def mixed_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    output(model, x).sub(y).square().mean().backward()
    optimizer.step()


def output(model: nn.Module, x: Tensor) -> Tensor:
    hidden = torch.tanh(model.convolution(x.to(model.convolution.weight.dtype))).mean((2, 3))
    return model.last(hidden.to(model.last.weight.dtype)).float()


def train_with_masters(model: nn.Module, make: Make) -> None:
    """Train as mixed precision is usually done: float32 masters make the steps, and the model gets them rounded."""
    master = copy.deepcopy(model).float()
    optimizer, data, batching = make(master), make_data(), Batching(SAMPLES, BATCH)
    for batch in range(batching.plan(EPOCHS).batches):
        x, y = data[batching.indices(batch)]
        model.zero_grad()
        output(model, x).sub(y).square().mean().backward()
        for exact, rounded in zip(master.parameters(), model.parameters(), strict=True):
            exact.grad = None if rounded.grad is None else rounded.grad.float()
        optimizer.step()
        for exact, rounded in zip(master.parameters(), model.parameters(), strict=True):
            rounded.data.copy_(exact.data)
    for group in optimizer.param_groups:  # from torch's variable, which looks ahead, to θ
        for p, rounded in zip(group["params"], model.parameters(), strict=True):
            if "momentum_buffer" in optimizer.state[p]:
                p.data.add_(optimizer.state[p]["momentum_buffer"], alpha=group["lr"] * group["momentum"])
                rounded.data.copy_(p.data)


@pytest.mark.parametrize("algorithm", ["baseline", "dana"])
@pytest.mark.parametrize("name", list(MAKES))
@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.float16, MIXED])
def test_float32_masters_make_the_steps(kind: torch.dtype | str, name: str, algorithm: str) -> None:
    ours, theirs = net_of(kind), net_of(kind)
    types = [p.dtype for p in ours.parameters()]
    train(ours, MAKES[name], mixed_step, algorithm=algorithm)
    train_with_masters(theirs, MAKES[name])
    assert [p.dtype for p in ours.parameters()] == types
    for (key, p), q in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        # A gradient that is rounded the other way moves a parameter by some thousandths of a step.
        tolerance = (
            1e-5 if kind == torch.float64 else 2 * torch.finfo(p.dtype).eps if p.dtype != torch.float64 else 1e-3
        )
        torch.testing.assert_close(
            p, q[1], rtol=tolerance, atol=max(tolerance, 1e-5), msg=lambda text, k=key: f"{k}: {text}"
        )


def test_small_steps_add_up_in_bfloat16() -> None:
    """In pure bfloat16, 1 − 1/1024 rounds to 1, and torch's parameter would never move."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    with alone("baseline") as session:
        optimizer = adopt(session, model, torch.optim.SGD(model.parameters(), lr=2.0**-10))
        for x in session.shard(DataLoader(torch.ones(64, 1), batch_size=1), 0):
            optimizer.zero_grad()
            model(x.bfloat16()).sum().backward()
            optimizer.step()
        session.finish()
    assert model.weight.item() == 1 - 64 / 1024


def test_an_own_optimizer_steps_on_float32_masters() -> None:
    """Its state is not rounded either, also after a load_state_dict, which gives it the type of the parameters."""
    kinds = set()

    class Own(torch.optim.Adadelta):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            super().step()
            for group in self.param_groups:
                kinds.update(p.dtype for p in group["params"])
                for p in group["params"]:
                    p.data = p.data * 1.0  # new memory
            kinds.update(value.dtype for state in self.state.values() for value in state.values())

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return Own(model.parameters(), lr=0.5)

    ours, theirs = net_of(torch.bfloat16), net_of(torch.bfloat16)
    trained = train(ours, make, mixed_step, algorithm="ssgd")
    train_with_masters(theirs, lambda model: torch.optim.Adadelta(model.parameters(), lr=0.5))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-2, atol=2e-2)
    saved = copy.deepcopy(trained.state_dict())
    again = net_of(torch.bfloat16)
    with alone("ssgd") as session:
        optimizer = adopt(session, again, make(again))
        optimizer.load_state_dict(saved)
        x, y = next(session.shard(DataLoader(make_data(), batch_size=BATCH), 0))
        mixed_step(again, optimizer, x, y)
    assert kinds == {torch.float32}
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("algorithm", ["baseline", "dana"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_what_the_script_does_to_a_parameter_persists(kind: torch.dtype, algorithm: str) -> None:
    model = nn.Linear(2, 1, bias=False, dtype=kind)
    nn.init.ones_(model.weight)
    with alone(algorithm) as session:
        optimizer = adopt(session, model, torch.optim.SGD(model.parameters(), lr=2.0**-10))
        for number, x in enumerate(session.shard(DataLoader(torch.tensor([[1.0, 0.0]] * 8), batch_size=1), 0)):
            optimizer.zero_grad()
            model(x.to(kind)).sum().backward()
            optimizer.step()
            if number == 3:
                with torch.no_grad():
                    model.weight[0, 1] = 3.0  # the other element keeps what it has below bfloat16's precision
            if number == 5:
                model.weight.data = model.weight.data.clamp(max=2.0)
        session.finish()
    assert model.weight.tolist() == [[1 - 8 / 1024, 2.0]]


def test_gradients_keep_their_type_and_may_be_changed() -> None:
    def clip(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        output(model, x).sub(y).square().mean().backward()
        before = [p.grad for p in model.parameters()]
        assert nn.utils.clip_grad_norm_(model.parameters(), 0.05) > 0.05
        optimizer.step()
        for p, grad in zip(model.parameters(), before, strict=True):
            assert (p.grad is None) == (grad is None)
            assert grad is None or (p.grad.dtype == p.dtype and torch.equal(p.grad, grad))

    ours, theirs = net_of(torch.bfloat16), net_of(torch.bfloat16).float()
    train(ours, MAKES["sgd"], clip, algorithm="ssgd")
    train(theirs, MAKES["sgd"], clip, algorithm="ssgd")
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.float(), q, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("algorithm", ["baseline", "dana"])
def test_a_scaler_unscales_float16_beyond_its_range(algorithm: str) -> None:
    """A gradient of 2^-30 is zero in float16; scaled by 2^20 it is not, and the step is made in float32."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float16)
    nn.init.zeros_(model.weight)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    with alone(algorithm) as session:
        optimizer = adopt(session, model, torch.optim.SGD(model.parameters(), lr=2.0**20))
        for number, x in enumerate(session.shard(DataLoader(torch.full((4, 1), 2.0**-10), batch_size=1), 0)):
            optimizer.zero_grad()
            loss = model(x.half()).float().sum() * 2.0**-20
            scaler.scale(loss * 1e38 * 1e38 if number == 1 else loss).backward()
            scaler.step(optimizer)
            scaler.update(2.0**20)
        session.finish()
    assert model.weight.item() == pytest.approx(-3 * 2.0**-10)  # three of four steps


def test_ranks_sum_in_float32_and_see_the_mean_in_their_own_type() -> None:
    """The mean of 1 and 1 + 1/128 is no bfloat16: the script sees it rounded, and the step has it exactly."""
    models = [nn.Linear(1, 1, bias=False, dtype=torch.bfloat16) for _ in range(2)]
    for model in models:
        nn.init.zeros_(model.weight)
    seen: dict[int, float] = {}

    def work(group: ThreadGroup) -> float:
        session, model = Session(Settings(algorithm="ssgd"), RankInfo(), group), models[group.rank]
        atexit.unregister(session.close)
        sgd = torch.optim.SGD(model.parameters(), 1.0)
        optimizer = DistributedOptimizer(sgd, model, group, replicated=True)
        session.adopt(optimizer)
        for x in session.shard(DataLoader(torch.tensor([[1.0], [1 + 2.0**-7]]), batch_size=2), 0):
            model(x.bfloat16()).sum().backward()
            seen[group.rank] = model.weight.grad.item()
            optimizer.step()
        exact = optimizer.flat.params.item()
        session.finish()
        session.close()
        return exact

    assert on_each_rank(2, work) == [-(1 + 2.0**-8)] * 2
    assert seen[0] == seen[1] in (1.0, 1 + 2.0**-7)


@pytest.mark.parametrize("kind", [torch.complex64, torch.int64, torch.float8_e5m2])
def test_other_types_are_refused_by_name(kind: torch.dtype) -> None:
    model = nn.Module()
    model.odd = nn.Parameter(torch.zeros(3).to(kind), requires_grad=kind.is_complex)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = rf"parameter odd is {kind}; danaz trains parameters of the types float32, float64, bfloat16 and float16"
    with pytest.raises(ValueError, match=expected):
        DistributedOptimizer(optimizer, model, SoloGroup())


def test_what_the_script_loads_into_a_model_stays_when_it_loads_an_own_optimizer() -> None:
    class Own(torch.optim.Adadelta):
        pass

    model = net_of(torch.bfloat16)
    with alone("baseline") as session:
        optimizer = adopt(session, model, Own(model.parameters()))
        saved = copy.deepcopy(optimizer.state_dict())
        model.load_state_dict({name: torch.full_like(value, 7.0) for name, value in model.state_dict().items()})
        optimizer.load_state_dict(saved)
        assert all(bool((p == 7.0).all()) for p in model.parameters())
        next(session.shard(DataLoader(make_data(), batch_size=BATCH), 0))
        assert all(bool((p == 7.0).all()) for p in model.parameters())
