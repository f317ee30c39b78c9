"""DistributedOptimizer in one process: the user's SGD, its gradients (however they are made), and the refusals."""

from __future__ import annotations

import warnings
from math import inf, nan

import pytest
import torch
from loops import (
    BATCH,
    EPOCHS,
    SAMPLES,
    STEPS,
    Make,
    Step,
    adopt,
    alone,
    assert_same,
    in_two_passes,
    make_data,
    make_net,
    make_sgd,
    make_sgd_of_groups,
    train,
    train_with_torch,
    usual_step,
)
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, MultiStepLR
from torch.utils.data import DataLoader

from danaz.run.rates import effective_lr
from danaz.server.core import ServerCore
from danaz.torch.data import Batching
from danaz.torch.optimizer import DistributedOptimizer, UnsupportedOptimizerError, kept_loss
from danaz.torch.session import NotInitializedError
from danaz.worker.group import SoloGroup


@pytest.mark.parametrize("step", STEPS)
def test_each_form_of_the_loop_equals_torch(step: Step) -> None:
    ours, theirs = make_net(), make_net()
    train(ours, make_sgd_of_groups, step, passes=2 if step is in_two_passes else 1)
    train_with_torch(theirs, make_sgd_of_groups, step)
    assert_same(ours, theirs)


@pytest.mark.parametrize("algorithm", ["baseline", "nag-asgd", "multi-asgd", "dana-zero", "dana"])
@pytest.mark.parametrize("make", [make_sgd, make_sgd_of_groups])
def test_one_worker_equals_torch_under_every_algorithm(algorithm: str, make: Make) -> None:
    ours, theirs = make_net(), make_net()
    train(ours, make, algorithm=algorithm)
    train_with_torch(theirs, make)
    if algorithm == "multi-asgd":
        assert_same(ours, theirs, 1e-4)
    else:
        assert_same(ours, theirs)


def test_weight_decay_stays_out_of_the_gradient_that_the_user_sees() -> None:
    model = make_net()

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        before = model.last.weight.grad.clone()
        optimizer.step()
        assert torch.equal(model.last.weight.grad, before)

    train(model, make_sgd_of_groups, step)


def test_unused_parameters_contribute_zeros() -> None:
    model, untouched = make_net(), make_net()
    optimizer = train(model)
    assert torch.equal(model.unused.weight, untouched.unused.weight)
    assert not torch.equal(model.last.weight, untouched.last.weight)
    unused = next(e for e in optimizer.flat.layout.parameters if e.name == "unused.weight")
    assert not unused.of(optimizer.flat.grads).any()


def test_channels_last_keeps_its_strides_and_equals_contiguous_training() -> None:
    contiguous, channels_last = make_net(), make_net().to(memory_format=torch.channels_last)
    strides = channels_last.convolution.weight.stride()
    assert strides != contiguous.convolution.weight.stride()

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        usual_step(model, optimizer, x.to(memory_format=torch.channels_last), y)
        weight = model.convolution.weight
        assert weight.stride() == weight.grad.stride() == strides

    train(contiguous)
    train(channels_last, step=step)
    assert channels_last.convolution.weight.stride() == strides
    assert_same(channels_last, contiguous)


def test_a_loss_on_a_device_is_not_read_by_the_step() -> None:
    """The kept loss is also not the tensor that a captured graph overwrites. The meta device has nothing to read."""
    loss = torch.zeros((), device="meta", requires_grad=True)
    kept = kept_loss(loss)
    assert isinstance(kept, Tensor)
    assert (kept.dtype, kept.requires_grad, kept is loss) == (torch.float64, False, False)
    assert kept_loss(torch.tensor(0.5)) == kept_loss(0.5) == 0.5
    assert kept_loss(None) is None


# ---- rates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_the_wrapped_one", [True, False])
@pytest.mark.parametrize("per_epoch", [True, False])
def test_schedulers_on_either_optimizer(on_the_wrapped_one: bool, per_epoch: bool) -> None:
    def schedule(optimizer: torch.optim.Optimizer) -> LRScheduler:
        if per_epoch:
            return MultiStepLR(optimizer, milestones=[1, 2], gamma=0.5)
        return LambdaLR(optimizer, lambda step: 1 / (1 + step))

    theirs, theirs_sgd = make_net(), []
    scheduler: list[LRScheduler] = []
    steps = 0

    def make_and_schedule(model: nn.Module) -> torch.optim.SGD:
        theirs_sgd.append(make_sgd_of_groups(model))
        scheduler.append(schedule(theirs_sgd[0]))
        return theirs_sgd[0]

    def step_and_schedule(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        nonlocal steps
        usual_step(model, optimizer, x, y)
        steps += 1
        last = steps == Batching(SAMPLES, BATCH).plan(EPOCHS).batches
        if not last and (not per_epoch or steps % Batching(SAMPLES, BATCH).batches_per_epoch == 0):
            scheduler[0].step()

    train_with_torch(theirs, make_and_schedule, step_and_schedule)
    used_last = [group["lr"] for group in theirs_sgd[0].param_groups]

    ours, steps = make_net(), 0
    with alone(lr_correction=False) as session, warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of a scheduler that steps before its optimizer
        sgd = make_sgd_of_groups(ours)
        optimizer = adopt(session, ours, sgd)
        scheduler[:] = [schedule(sgd if on_the_wrapped_one else optimizer)]
        session.epochs = EPOCHS
        for epoch in range(EPOCHS):
            for x, y in session.shard(DataLoader(make_data(), batch_size=BATCH, shuffle=True), epoch):
                step_and_schedule(ours, optimizer, x, y)
        session.finish()
        assert [group["lr"] for group in sgd.param_groups] == used_last
        assert [group["lr"] for group in optimizer.param_groups] == used_last
    assert_same(ours, theirs)


def test_effective_lr_warms_up_and_scales() -> None:
    rates = {"workers": 4, "warmup_epochs": 2.0}
    assert effective_lr([0.4, 0.8], epoch=0.0, scale=1.0, **rates) == pytest.approx([0.1, 0.2])
    assert effective_lr([0.4], epoch=1.0, scale=1.0, **rates) == pytest.approx([0.25])
    assert effective_lr([0.4], epoch=5.0, scale=1.0, **rates) == [0.4]
    assert effective_lr([0.4], epoch=0.0, scale=4.0, **rates) == pytest.approx([0.4])
    assert effective_lr([0.4], epoch=5.0, scale=4.0, **rates) == [1.6]


# ---- what is not finite ---------------------------------------------------------------------------------------------


def poisoned(bad_steps: set[int], value: float) -> Step:
    """Return a step whose gradient holds ``value`` at the ``bad_steps``, counted from 0."""
    count = 0

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        nonlocal count
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        if count in bad_steps:
            model.last.bias.grad[0] = value
        count += 1
        optimizer.step()

    return step


@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_a_push_that_is_not_finite_leaves_the_velocity_and_training_goes_on(
    value: float, servers: list[ServerCore]
) -> None:
    """The steps after the refused push are those of a script that skips the batch."""
    model = make_net()
    with alone() as session:
        optimizer = adopt(session, model, make_sgd(model))
        step = poisoned({2}, value)
        for count, (x, y) in enumerate(session.shard(DataLoader(make_data(), batch_size=5), 0)):
            if count == 2:
                view = optimizer.flat.params.clone()
            step(model, optimizer, x, y)
            if count == 2:
                assert torch.equal(optimizer.flat.params, view)
                assert session.worker.metrics.refused_pushes == 1
        session.finish()
        [server] = servers
        assert count + 1 == 5
        assert server.totals.updates == 4
        assert dict(server.totals.refusals) == {"push is not finite": 1}
        assert not server.diverged
    assert all(p.isfinite().all() for p in model.parameters())
    skipping = make_net()
    with alone() as session:
        optimizer = adopt(session, skipping, make_sgd(skipping))
        for count, (x, y) in enumerate(session.shard(DataLoader(make_data(), batch_size=5), 0)):
            if count != 2:
                usual_step(skipping, optimizer, x, y)
        session.finish()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), skipping.parameters(), strict=True))


def test_three_in_a_row_end_the_run_as_diverged(servers: list[ServerCore]) -> None:
    model, steps = make_net(), 0

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        nonlocal steps
        steps += 1
        poison(model, optimizer, x, y)

    poison = poisoned({1, 3, 4, 5}, nan)
    with alone() as session:
        optimizer = adopt(session, model, make_sgd(model))
        session.epochs = EPOCHS
        for epoch in range(EPOCHS):
            for x, y in session.shard(DataLoader(make_data(), batch_size=BATCH), epoch):
                step(model, optimizer, x, y)
        session.finish()
        [server] = servers
        summary = server.summary()
    assert steps == 6
    assert session.worker.metrics.diverged
    assert summary["diverged"]
    assert "not finite" in summary["diverged_because"]
    assert summary["updates"] == 2
    assert all(p.isfinite().all() for p in model.parameters())


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_parameters_that_danaz_cannot_train_are_refused() -> None:
    with pytest.raises(ValueError, match="the model does not have"):
        DistributedOptimizer(make_sgd(make_net()), make_net(), SoloGroup())


def test_step_outside_of_shard() -> None:
    model = make_net()
    unconnected = DistributedOptimizer(make_sgd(model), model, SoloGroup())
    with pytest.raises(RuntimeError, match=r"outside of danaz\.shard"):
        unconnected.step()
    model = make_net()
    with alone() as session:
        optimizer = adopt(session, model, make_sgd(model))
        with pytest.raises(RuntimeError, match=r"outside of danaz\.shard"):
            optimizer.step()


def test_two_steps_for_one_batch() -> None:
    model = make_net()
    with alone() as session:
        optimizer = adopt(session, model, make_sgd(model))
        x, y = next(batches := session.shard(DataLoader(make_data(), batch_size=BATCH), 0))
        usual_step(model, optimizer, x, y)
        with pytest.raises(RuntimeError, match="called twice for one batch"):
            optimizer.step()
        batches.close()


def test_batches_that_are_added_up_without_a_step() -> None:
    """torch would make one step of several batches. In danaz one batch is one update, and the error must say so."""
    model = make_net()
    with alone() as session:
        adopt(session, model, make_sgd(model))
        batches = session.shard(DataLoader(make_data(), batch_size=BATCH), 0)
        x, y = next(batches)
        mse_loss(model(x), y).backward()
        x, y = next(batches)
        with pytest.raises(RuntimeError, match=r"not followed by optimizer\.step\(\).*raise the loader's batch_size"):
            mse_loss(model(x), y).backward()


def test_a_loop_that_never_steps() -> None:
    model = make_net()
    with alone() as session:
        adopt(session, model, make_sgd(model))
        session.epochs = 1
        for _ in session.shard(DataLoader(make_data(), batch_size=BATCH), 0):
            pass
        with pytest.raises(RuntimeError, match=r"optimizer\.step\(\) was never called"):
            session.finish()


def test_a_skipped_batch_counts_as_used(servers: list[ServerCore]) -> None:
    model = make_net()
    with alone() as session:
        optimizer = adopt(session, model, make_sgd(model))
        session.epochs = 1
        for number, (x, y) in enumerate(session.shard(DataLoader(make_data(), batch_size=BATCH), 0)):
            if number != 1:
                usual_step(model, optimizer, x, y)
        session.finish()
        [server] = servers
        summary = server.summary()
        assert (summary["updates"], summary["skipped_batches"], summary["epochs"]) == (2, 1, 1.0)


def test_the_wrapped_optimizer_is_not_to_step() -> None:
    model = make_net()
    with alone() as session:
        sgd = make_sgd(model)
        adopt(session, model, sgd)
        with pytest.raises(RuntimeError, match="on the one that DistributedOptimizer returned"):
            sgd.step()


@pytest.mark.parametrize("on_the_wrapped_one", [True, False])
def test_parameters_that_come_later(on_the_wrapped_one: bool) -> None:
    model = make_net()
    with alone() as session:
        sgd = torch.optim.SGD(model.last.parameters(), lr=0.1)
        optimizer = adopt(session, model, sgd)
        chosen = sgd if on_the_wrapped_one else optimizer
        with pytest.raises(UnsupportedOptimizerError, match="freeze those that are to train later"):
            chosen.add_param_group({"params": list(model.convolution.parameters())})
        assert len(optimizer.param_groups) == len(sgd.param_groups) == 1


def test_a_momentum_that_changes_is_refused_with_the_cure() -> None:
    model = make_net()
    with alone() as session:
        optimizer = adopt(session, model, make_sgd(model))
        x, y = next(session.shard(DataLoader(make_data(), batch_size=BATCH), 0))
        optimizer.param_groups[0]["momentum"] = 0.85
        with pytest.raises(UnsupportedOptimizerError, match="cycle_momentum=False"):
            usual_step(model, optimizer, x, y)


def test_a_saved_optimizer_state() -> None:
    """danaz takes over its rates, and its momentum before training begins: later, it would be lost."""
    source, model = make_net(), make_net()
    sgd = make_sgd(source)
    sgd.param_groups[0]["lr"] = 0.07
    with alone() as session:
        optimizer = adopt(session, model, make_sgd(model))
        optimizer.load_state_dict(sgd.state_dict())
        assert optimizer.rates == [0.07]
        usual_step(source, sgd, *make_data()[:5])
        with pytest.raises(ValueError, match=r"groups of \[2, 2\] parameters, expected \[6\]"):
            optimizer.load_state_dict(make_sgd_of_groups(source).state_dict())
        optimizer.load_state_dict(sgd.state_dict())
        assert optimizer.state_dict()["state"].keys() == sgd.state_dict()["state"].keys()
        x, y = next(session.shard(DataLoader(make_data(), batch_size=BATCH), 0))
        usual_step(model, optimizer, x, y)
        with pytest.raises(UnsupportedOptimizerError, match="momentum buffers when training had begun"):
            optimizer.load_state_dict(sgd.state_dict())


def test_memory_that_does_not_fit_any_more() -> None:
    model = make_net()
    with alone() as session:
        optimizer = adopt(session, model, make_sgd(model))
        x, y = next(session.shard(DataLoader(make_data(), batch_size=BATCH), 0))
        model.double()
        with pytest.raises(RuntimeError, match=r"convert the model before you wrap the optimizer"):
            usual_step(model, optimizer, x.double(), y.double())


def test_shard_without_an_optimizer() -> None:
    with alone() as session, pytest.raises(NotInitializedError, match="wrap the optimizer first"):
        next(session.shard(DataLoader(make_data(), batch_size=BATCH), 0))
