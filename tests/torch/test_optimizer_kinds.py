"""danaz carries out torch's own optimizers, group by group. Where the mathematics says so, one worker equals torch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from loops import Step, adopt, alone, assert_same, make_data, make_net, train, train_with_torch, usual_step
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from danaz.torch.optimizer import DistributedOptimizer, UnsupportedOptimizerError
from danaz.worker.group import SoloGroup

Make = Callable[[nn.Module], torch.optim.Optimizer]


def two_groups(kind: type[torch.optim.Optimizer], first: dict[str, object], **options: object) -> Make:
    """Return a function that makes an optimizer whose first group has other options than the second."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        groups = [
            {"params": list(model.last.parameters()), **first},
            {"params": [*model.convolution.parameters()]},
        ]
        return kind(groups, **options)  # type: ignore[call-arg]

    return make


WITHOUT_MOMENTUM: dict[str, Make] = {
    "adagrad": two_groups(torch.optim.Adagrad, {"lr": 0.02, "lr_decay": 0.1}, lr=0.05, weight_decay=0.01),
    "rmsprop": two_groups(torch.optim.RMSprop, {"alpha": 0.8, "centered": True, "eps": 0.1}, lr=0.01, weight_decay=0.1),
    "adam": two_groups(torch.optim.Adam, {"betas": (0.0, 0.9), "amsgrad": True}, lr=0.01, betas=(0.0, 0.99)),
    "adamw": two_groups(torch.optim.AdamW, {"weight_decay": 0.5, "maximize": True}, lr=0.01, betas=(0.0, 0.99)),
    "sgd that maximizes": two_groups(torch.optim.SGD, {"weight_decay": 0.1}, lr=0.001, maximize=True),
}


@pytest.mark.parametrize("algorithm", ["baseline", "nag-asgd", "multi-asgd", "dana-zero", "dana", "asgd", "ssgd"])
@pytest.mark.parametrize("name", list(WITHOUT_MOMENTUM))
def test_without_momentum_one_worker_equals_torch_under_every_algorithm(name: str, algorithm: str) -> None:
    ours, theirs = make_net(), make_net()
    train(ours, WITHOUT_MOMENTUM[name], algorithm=algorithm)
    train_with_torch(theirs, WITHOUT_MOMENTUM[name])
    assert_same(ours, theirs)


@pytest.mark.parametrize("algorithm", ["baseline", "dana-zero", "dana"])
def test_each_group_has_its_own_momentum(algorithm: str) -> None:
    make = two_groups(torch.optim.SGD, {"momentum": 0.5}, lr=0.05, momentum=0.9, nesterov=True)
    ours, theirs = make_net(), make_net()
    train(ours, make, algorithm=algorithm)
    train_with_torch(theirs, make)
    assert_same(ours, theirs)


def test_asgd_drops_the_momentum_of_adam() -> None:
    ours, theirs = make_net(), make_net()
    train(ours, lambda model: torch.optim.Adam(model.parameters(), 0.01, betas=(0.9, 0.99)), algorithm="asgd")
    train_with_torch(theirs, lambda model: torch.optim.Adam(model.parameters(), 0.01, betas=(0.0, 0.99)))
    assert_same(ours, theirs)


@pytest.mark.parametrize("algorithm", ["dana", "ssgd"])
def test_nadam_computes_every_gradient_where_torch_does(algorithm: str) -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.NAdam(
            model.parameters(), 0.01, momentum_decay=0.1, weight_decay=0.1, decoupled_weight_decay=True
        )

    def visited(train: Callable[[nn.Module, Make, Step], object]) -> list[dict[str, Tensor]]:
        states = []

        def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
            states.append(copy.deepcopy(model.state_dict()))
            usual_step(model, optimizer, x, y)

        train(make_net(), make, step)
        return states

    ours, theirs = visited(partial(train, algorithm=algorithm)), visited(train_with_torch)
    assert len(ours) == len(theirs) > 5
    for our, their in zip(ours, theirs, strict=True):
        for name, values in their.items():
            torch.testing.assert_close(our[name], values, rtol=1e-4, atol=1e-4)


def test_ssgd_makes_the_steps_of_torchs_adam() -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)

    ours, theirs = make_net(), make_net()
    train(ours, make, algorithm="ssgd")
    train_with_torch(theirs, make)
    assert_same(ours, theirs)


def test_the_flags_of_torchs_implementation_make_no_difference() -> None:
    ours, theirs = make_net(), make_net()
    train(ours, lambda model: torch.optim.AdamW(model.parameters(), 0.01, foreach=True))
    train(theirs, lambda model: torch.optim.AdamW(model.parameters(), 0.01, fused=True))
    assert_same(ours, theirs, 0.0)


# ---- a user's own class ----------------------------------------------------------------------------------------------


class OwnSGD(torch.optim.SGD):
    """A user's variation of SGD, which danaz cannot know: its steps have a size of their own."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                state["mean"] = p.grad.clone() if "mean" not in state else 0.5 * state["mean"] + p.grad
                p.data = p.data - group["lr"] * state["mean"].sign() * (1 + group["weight_decay"])


own_sgd = two_groups(OwnSGD, {"weight_decay": 0.5}, lr=0.01)


@pytest.mark.parametrize("algorithm", ["baseline", "ssgd", "asgd"])
@pytest.mark.parametrize("make", [own_sgd, lambda model: torch.optim.Rprop(model.parameters(), 0.01)])
def test_it_makes_its_steps_itself(make: Make, algorithm: str) -> None:
    ours, theirs = make_net(), make_net()
    train(ours, make, algorithm=algorithm)
    train_with_torch(theirs, make)
    assert_same(ours, theirs)


@pytest.mark.parametrize("algorithm", ["asgd", "easgd", "model-averaging", "bmuf", "diloco", "async-diloco"])
def test_it_makes_local_steps_between_pushes(algorithm: str) -> None:
    """On one worker, the mean of all models is its own, and there is nobody to be elastic with but the centre."""
    ours, theirs = make_net(), make_net()
    plain = {"outer_lr": 1.0, "outer_momentum": 0.0} if "diloco" in algorithm else {}
    train(ours, own_sgd, algorithm=algorithm, sync_period=3, hyperparameters=plain)
    train_with_torch(theirs, own_sgd)
    if algorithm == "easgd":
        assert all(p.isfinite().all() for p in ours.parameters())
    else:
        assert_same(ours, theirs)


def test_the_local_steps_of_an_optimizer_that_danaz_knows_are_torchs() -> None:
    """Whether or not its parameters look ahead."""
    for make in (
        lambda model: torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1),
        lambda model: torch.optim.NAdam(model.parameters(), 0.01, momentum_decay=0.1),
        lambda model: torch.optim.Adam(model.parameters(), 0.01, amsgrad=True),
    ):
        for algorithm in ("model-averaging", "diloco"):
            ours, theirs = make_net(), make_net()
            plain = {"outer_lr": 1.0, "outer_momentum": 0.0} if algorithm == "diloco" else {}
            train(ours, make, algorithm=algorithm, sync_period=3, hyperparameters=plain)
            train_with_torch(theirs, make)
            assert_same(ours, theirs)


@pytest.mark.parametrize(("algorithm", "sync_period"), [("baseline", None), ("ssgd", None), ("asgd", 1), ("easgd", 2)])
def test_its_state_does_not_take_in_a_gradient_that_is_refused(algorithm: str, sync_period: int | None) -> None:
    model = make_net()
    refused = 0
    with alone(algorithm, **({} if sync_period is None else {"sync_period": sync_period})) as session:
        optimizer = adopt(session, model, own_sgd(model))
        for number in session.run_steps(12, 4):
            x, y = make_data()[number : number + 4]
            optimizer.zero_grad()
            mse_loss(model(x), y).backward()
            before = copy.deepcopy(list(optimizer.wrapped.state.values()))
            if 4 <= number < 6:
                model.last.weight.grad[0, 0] = float("nan")
            optimizer.step()
            if 4 <= number < 6:
                refused += 1
                after = list(optimizer.wrapped.state.values())
                assert all(torch.equal(a["mean"], b["mean"]) for a, b in zip(before, after, strict=True))
        assert refused == 2
        assert session.worker.metrics.refused_pushes == (2 if sync_period != 2 else 1)
    assert all(p.isfinite().all() for p in model.parameters())


def test_its_rates_are_the_clusters_during_a_step_only() -> None:
    seen = []

    class Watched(torch.optim.Adadelta):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            seen.append([group["lr"] for group in self.param_groups])
            super().step()

    model = make_net()
    optimizer = train(model, lambda model: Watched(model.parameters(), lr=0.5), algorithm="ssgd", workers=1)
    assert seen == [[0.5]] * len(seen) != []
    assert optimizer.param_groups[0]["lr"] == 0.5


class Halving(OwnSGD):
    """Sets its own rates, as optimizers do that estimate them."""

    def step(self, closure: object = None) -> None:
        super().step()
        self.param_groups[0]["lr"] = self.param_groups[0]["lr"] / 2 + 0.01


@pytest.mark.parametrize("algorithm", ["baseline", "asgd", "ssgd"])
def test_a_rate_that_it_sets_itself_stays_set(algorithm: str) -> None:
    ours, theirs = make_net(), make_net()
    make = two_groups(Halving, {"lr": 0.1}, lr=0.05)
    optimizer = train(ours, make, algorithm=algorithm)
    their_optimizer = train_with_torch(theirs, make)
    assert_same(ours, theirs)
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in their_optimizer.param_groups]
    assert optimizer.param_groups[1]["lr"] == 0.05


def test_a_rate_that_it_sets_itself_is_scaled_as_the_scripts_own_rates_are() -> None:
    """During a step the rate is that of the cluster, here a quarter at first; between steps it is the script's."""
    given, kept, model = [], [], make_net()

    class Setting(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            given.append(self.param_groups[0]["lr"])
            self.param_groups[0]["lr"] *= 0.5

    with alone("asgd", workers=4, warmup_epochs=1.0) as session:
        optimizer = adopt(session, model, Setting(model.parameters(), lr=0.8))
        session.epochs = 1
        for x, y in session.shard(DataLoader(make_data(), batch_size=1), 0):
            optimizer.zero_grad()
            mse_loss(model(x), y).backward()
            optimizer.step()
            kept.append(optimizer.param_groups[0]["lr"])
    assert len(kept) > 3
    assert kept == pytest.approx([0.8 * 0.5**step for step in range(1, len(kept) + 1)])
    factors = [rate / (0.8 * 0.5**step) for step, rate in enumerate(given)]
    assert factors[0] == pytest.approx(0.25)
    assert factors == sorted(factors)
    assert factors[-1] > 0.5


def test_an_error_in_its_step_changes_neither_rates_nor_parameters() -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                p.data.add_(1.0)
            self.param_groups[0]["lr"] = 99.0
            raise ArithmeticError("no")

    model = make_net()
    with alone("baseline", workers=4, warmup_epochs=1.0) as session:
        optimizer = adopt(session, model, Failing(model.parameters(), lr=0.5))
        session.epochs = 1
        for x, y in session.shard(DataLoader(make_data(), batch_size=4), 0):
            before = copy.deepcopy(model.state_dict())
            optimizer.zero_grad()
            mse_loss(model(x), y).backward()
            with pytest.raises(ArithmeticError, match="no"):
                optimizer.step()
            assert optimizer.param_groups[0]["lr"] == 0.5
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
            break


def test_it_may_move_parameters_without_a_gradient() -> None:
    class Shrinking(torch.optim.SGD):
        """Decays all parameters, also those without a gradient."""

        def step(self, closure: object = None) -> None:  # type: ignore[override]
            super().step()
            for p in self.param_groups[0]["params"]:
                p.data.mul_(0.9)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        model.last.weight.requires_grad_(False)
        mse_loss(model(x), y).backward()
        optimizer.step()

    ours, theirs = make_net(), make_net()
    train(ours, lambda model: Shrinking(model.parameters(), lr=0.01), step, algorithm="ssgd")
    train_with_torch(theirs, lambda model: Shrinking(model.parameters(), lr=0.01), step)
    assert_same(ours, theirs)


def test_its_state_can_be_saved_and_loaded() -> None:
    first = train(make_net(), own_sgd, algorithm="baseline")
    saved = copy.deepcopy(first.state_dict())
    assert len(saved["state"]) == 4
    model = make_net()
    with alone("baseline") as session:
        second = adopt(session, model, own_sgd(model))
        second.load_state_dict(saved)
        assert all(
            torch.equal(second.state_dict()["state"][key]["mean"], saved["state"][key]["mean"]) for key in range(4)
        )
        second.param_groups[0]["lr"] = 0.125
        assert second.rates[0] == second.wrapped.param_groups[0]["lr"] == 0.125


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda model: torch.optim.LBFGS(model.parameters()),
            "dana does not take LBFGS.* Adam.*: asgd, async-diloco, baseline, ",
        ),
        (lambda model: OwnSGD(model.parameters(), lr=0.1), "dana does not take OwnSGD"),
        (lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5), "SGD with dampening"),
        (lambda model: torch.optim.Adam(model.parameters(), differentiable=True), "make differentiable=False"),
        (lambda model: torch.optim.RMSprop(model.parameters(), momentum=1.5), "RMSprop: momentum is 1.5"),
        (lambda model: torch.optim.Adam(model.parameters(), eps=0), "Adam: eps is 0.0"),
    ],
)
def test_unsupported_optimizers_are_refused_with_the_reason(make: Make, reason: str) -> None:
    model = make_net()
    with alone("dana") as session, pytest.raises(UnsupportedOptimizerError, match=reason):
        adopt(session, model, make(model))


def test_an_algorithm_that_cannot_carry_it_out_says_so() -> None:
    model = make_net()
    with alone("ssgd-lars") as session, pytest.raises(UnsupportedOptimizerError, match="ssgd-lars is a rule of SGD"):
        adopt(session, model, torch.optim.Adam(model.parameters()))


@pytest.mark.parametrize(("momentum", "warns"), [(0.9, True), (0.0, False)])
def test_plain_momentum_is_taken_with_a_warning(momentum: float, warns: bool) -> None:
    model = make_net()
    with alone() as session, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adopt(session, model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum))
        next(session.shard(DataLoader(make_data(), batch_size=4), 0))
    assert ["nesterov=False is not kept" in str(each.message) for each in said] == [True] * warns


def test_betas_that_change_during_the_run_are_refused() -> None:
    model = make_net()
    with alone() as session:
        optimizer = adopt(session, model, torch.optim.Adam(model.parameters(), 0.01))
        session.epochs = 1
        loader = torch.utils.data.DataLoader(make_data(), batch_size=4)
        for x, y in session.shard(loader, 0):
            mse_loss(model(x), y).backward()
            optimizer.param_groups[0]["betas"] = (0.8, 0.999)
            with pytest.raises(UnsupportedOptimizerError, match=r"had beta1 0.9 when .* and has beta1 0.8 now"):
                optimizer.step()
            break


def test_the_state_of_another_class_is_not_taken_over() -> None:
    source, model = make_net(), make_net()
    adam = torch.optim.Adam(source.parameters())
    mse_loss(source(make_data()[:4][0]), make_data()[:4][1]).backward()
    adam.step()
    ours = DistributedOptimizer(torch.optim.RMSprop(model.parameters()), model, SoloGroup())
    with pytest.raises(ValueError, match=r"has square_avg of .* missing, expected shape"):
        ours.load_state_dict(adam.state_dict())
