"""Every optimizer against torch's own and against its formula in float64, alone and under every algorithm."""

from __future__ import annotations

import tracemalloc
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from cluster import Cluster
from oracle_optimizers import AdagradOracle, AdamOracle, Array, NAdamOracle, RMSpropOracle, SgdOracle
from torch import Tensor

from danaz.optimizers import (
    KINDS,
    Adagrad,
    Adam,
    NAdam,
    Optimizer,
    OptimizerError,
    Optimizers,
    PlainSgd,
    RMSprop,
    Scalars,
    Sgd,
    optimizers_from_lists,
    optimizers_to_lists,
)
from danaz.rules import ALGORITHMS, UnfitOptimizerError, find_algorithm

SIZE = 12
CURVATURE = torch.logspace(-2, 0.5, SIZE)
TARGET = torch.linspace(-1, 1, SIZE)
RATES = [0.1, 0.1, 0.05, 0.01, 0.03] * 5

ORACLES: dict[type[Optimizer], Any] = {
    Sgd: SgdOracle,
    Adam: AdamOracle,
    NAdam: NAdamOracle,
    RMSprop: RMSpropOracle,
    Adagrad: AdagradOracle,
}
OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": Sgd(0.9),
    "adam": Adam(0.9, 0.99),
    "amsgrad": Adam(0.8, 0.9, amsgrad=True),
    "adamw": Adam(0.9, 0.99, weight_decay=0.1),
    "adam without momentum": Adam(0.0, 0.9),
    "nadam": NAdam(0.9, 0.99, weight_decay=0.05, momentum_decay=0.1),
    "rmsprop": RMSprop(0.9, momentum=0.8),
    "rmsprop centered": RMSprop(0.9, eps=0.1, centered=True),
    "adagrad": Adagrad(lr_decay=0.1, initial=0.5),
}
every_optimizer = pytest.mark.parametrize("optimizer", list(OPTIMIZERS.values()), ids=list(OPTIMIZERS))
TORCHS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.1, betas=(0.9, 0.99)),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.1, betas=(0.8, 0.9), amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, betas=(0.9, 0.99), weight_decay=0.1),
    "adam without momentum": lambda p: torch.optim.Adam(p, 0.1, betas=(0.0, 0.9)),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1, alpha=0.9, momentum=0.8),
    "rmsprop centered": lambda p: torch.optim.RMSprop(p, 0.1, alpha=0.9, eps=0.1, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1, lr_decay=0.1, initial_accumulator_value=0.5),
}


def gradient(at: Tensor) -> Tensor:
    return CURVATURE * (at - TARGET)


def close(ours: Tensor, theirs: Tensor | Array, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(ours.numpy(), np.asarray(theirs), rtol=0, atol=tolerance)


def zeros(optimizer: Optimizer) -> dict[str, Tensor]:
    return {name: torch.zeros(SIZE) for name in optimizer.state}


def torchs_path(make: Any) -> list[Tensor]:
    parameter = torch.nn.Parameter(torch.zeros(SIZE))
    optimizer, path = make([parameter]), []
    for lr in RATES:
        optimizer.param_groups[0]["lr"] = lr
        parameter.grad = gradient(parameter.detach())
        optimizer.step()
        path.append(parameter.detach().clone())
    return path


# ---- an optimizer alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(TORCHS))
def test_steps_are_those_of_torch(name):
    """θ + s with the gradient at θ: what torch does."""
    optimizer = OPTIMIZERS[name]
    params, state = torch.zeros(SIZE), zeros(optimizer)
    for count, (lr, theirs) in enumerate(zip(RATES, torchs_path(TORCHS[name]), strict=True), start=1):
        optimizer.step(params, gradient(params), state, Scalars(lr, count), params.clone())
        close(params, theirs)


def test_displacements_of_nadam_are_torchs_steps():
    """torch.optim.NAdam looks ahead itself: with a constant rate, s + a′ − a is its step."""
    optimizer = OPTIMIZERS["nadam"]
    parameter = torch.nn.Parameter(torch.zeros(SIZE))
    torchs = torch.optim.NAdam(
        [parameter], 0.1, betas=(0.9, 0.99), weight_decay=0.05, momentum_decay=0.1, decoupled_weight_decay=True
    )
    params, old, out = torch.zeros(SIZE), zeros(optimizer), torch.empty(SIZE)
    for count in range(1, 30):
        new = zeros(optimizer)
        at, before = Scalars(0.1, count), Scalars(0.1, count - 1)
        optimizer.displace(out, gradient(params), old, new, at, before, params.clone())
        params.add_(out)
        old = new
        parameter.grad = gradient(parameter.detach())
        torchs.step()
        close(params, parameter.detach(), 1e-4)  # near the optimum, a step divides one rounding error by another


@pytest.mark.parametrize("decay", [0.0, 4e-3, 0.1])
@pytest.mark.parametrize("count", [1, 7, 300, 1_000_000])
def test_the_course_of_nadams_momentum_takes_no_memory(count, decay):
    """A run makes any number of steps."""
    optimizer, oracle = NAdam(0.9, 0.99, momentum_decay=decay), NAdamOracle(1, decay, beta1=0.9, beta2=0.99)
    state, out = {"mean": torch.ones(1), "square": torch.ones(1)}, torch.zeros(1)
    tracemalloc.start()
    optimizer.add_heading(out, state, Scalars(1.0, count), -optimizer.momentum)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000
    oracle.m, oracle.n, oracle.t = np.ones(1), np.ones(1), np.array([float(count)])
    close(out, oracle.a(1.0), 1e-6)


@every_optimizer
def test_a_displacement_is_s_and_the_change_of_the_look_ahead(optimizer):
    """Also while the rate changes. The gradient and the old state stay as they are."""
    draws = torch.Generator().manual_seed(3)
    oracle = ORACLES[type(optimizer)](SIZE, **asdict(optimizer))
    state, rate, everywhere = zeros(optimizer), 0.0, np.ones(SIZE, bool)
    for count, lr in enumerate(RATES, start=1):
        grad, view, out = torch.randn(SIZE, generator=draws), torch.randn(SIZE, generator=draws), torch.empty(SIZE)
        kept, old = grad.clone(), {name: vector.clone() for name, vector in state.items()}
        new = {name: torch.full((SIZE,), float("nan")) for name in state}
        optimizer.displace(out, grad, state, new, Scalars(lr, count), Scalars(rate, count - 1), view)
        before = oracle.a(rate)
        expected = oracle.s(grad.double().numpy(), view.double().numpy(), lr, everywhere) + oracle.a(lr) - before
        close(out, expected)
        assert torch.equal(grad, kept)
        assert all(torch.equal(state[name], old[name]) for name in state)
        state, rate = new, lr


@every_optimizer
def test_without_momentum_nothing_is_ahead(optimizer):
    plain = optimizer.without_momentum()
    assert plain.momentum == 0
    params, state = torch.zeros(SIZE), zeros(plain)
    plain.step(params, torch.ones(SIZE), state, Scalars(0.1, 1), torch.zeros(SIZE))
    ahead = torch.zeros(SIZE)
    plain.add_heading(ahead, state, Scalars(0.1, 1), -plain.momentum)
    assert not ahead.any()
    assert params.any()


# The step of NAdam takes the new gradient at another weight than its mean does: there, the velocity is near to it only.
@pytest.mark.parametrize(
    "name", [name for name, each in OPTIMIZERS.items() if each.keeps_velocity and not isinstance(each, NAdam)]
)
def test_the_velocity_is_what_the_step_went_along(name):
    optimizer = OPTIMIZERS[name]
    state, view = zeros(optimizer), torch.zeros(SIZE)
    for count in range(1, 5):
        params = torch.zeros(SIZE)
        optimizer.step(params, torch.linspace(-1, 1, SIZE) * count, state, Scalars(0.1, count), view)
        close(-0.1 * optimizer.velocity(state, Scalars(0.1, count)), params)


# ---- hyper-parameters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(KINDS.values()))
def test_they_travel(kind):
    two = Optimizers([kind(), kind()])
    assert optimizers_from_lists(optimizers_to_lists(two)) == two


@pytest.mark.parametrize(
    "lists",
    [
        None,
        [],
        ["sgd"],
        ["sgd", []],
        ["lion", [{}]],
        ["sgd", [{"momentum": 0.9, "nesterov": True}]],
        ["sgd", [{"momentum": "0.9"}]],
        ["sgd", [{"momentum": 1.0}]],
        ["sgd", [{"momentum": float("nan")}]],
        ["adagrad", [{"eps": float("inf"), "lr_decay": 0.0, "initial": 0.0}]],
    ],
)
def test_what_is_none_is_refused(lists):
    with pytest.raises(OptimizerError):
        optimizers_from_lists(lists)


@pytest.mark.parametrize("wrong", [{"beta1": 1.0}, {"beta2": -0.1}, {"eps": 0.0}, {"weight_decay": float("nan")}])
def test_numbers_out_of_range_are_named(wrong):
    [name] = wrong
    with pytest.raises(OptimizerError, match=f"{name} is .*; a number from"):
        Adam(**wrong)


@every_optimizer
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-3, 1e9])
def test_equal_gradients_of_any_size_leave_all_finite(optimizer, size):
    """No gradient at all, and a variance that is zero but for rounding, among them."""
    params, state = torch.zeros(SIZE), zeros(optimizer)
    for count in range(1, 200):
        optimizer.step(params, torch.full((SIZE,), size), state, Scalars(0.1, count), torch.zeros(SIZE))
        optimizer.add_heading(params, state, Scalars(0.1, count), -optimizer.momentum)
    assert params.isfinite().all()


# ---- under every algorithm -----------------------------------------------------------------------------------------


@dataclass
class Laboratory:
    """An algorithm over an optimizer, in float64: what θ and every view are."""

    algorithm: str
    oracle: Any
    workers: int
    theta: Array = field(default_factory=lambda: np.zeros(SIZE))
    lr: Array = field(default_factory=lambda: np.zeros(SIZE))  # of each parameter's last gradient

    def __post_init__(self) -> None:
        self.states = [self.oracle.clone() for _ in range(1 if self.algorithm == "nag-asgd" else self.workers)]
        self.rates = [np.zeros(SIZE) for _ in range(self.workers)]  # the same, for each worker
        self.views = [self.theta.copy() for _ in range(self.workers)]

    def push(self, worker: int, g: Array, lr: float, there: Array) -> Array:
        state = self.states[0 if self.algorithm == "nag-asgd" else worker]
        self.theta = self.theta + state.s(g, self.views[worker], lr, there)
        self.rates[worker] = np.where(there, lr, self.rates[worker])
        self.lr = np.where(there, lr, self.lr)
        self.views[worker] = self.theta + self.ahead(worker)
        return self.views[worker]

    def ahead(self, worker: int) -> Array:
        match self.algorithm:
            case "nag-asgd":
                return self.states[0].a(self.lr)
            case "multi-asgd":
                return self.states[worker].a(self.rates[worker])
            case "dana-zero" | "dana":
                return sum((state.a(rate) for state, rate in zip(self.states, self.rates, strict=True)), np.zeros(SIZE))
            case "asgd":
                return np.zeros(SIZE)
        raise AssertionError(self.algorithm)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("absent", [(), ((3, 7),)], ids=["all", "some without a gradient"])
@pytest.mark.parametrize("algorithm", ["nag-asgd", "multi-asgd", "dana-zero", "dana", "asgd"])
@every_optimizer
def test_every_algorithm_is_its_formula(algorithm, optimizer, absent, seed):
    """Any order of workers. A layer without a gradient in some updates has its own count of them, and last rate."""
    draws, workers = np.random.default_rng(seed), 3
    carried = optimizer.without_momentum() if algorithm == "asgd" else optimizer
    if isinstance(carried, PlainSgd):
        carried = Sgd(0.0)
    laboratory = Laboratory(algorithm, ORACLES[type(carried)](SIZE, **asdict(carried)), workers)
    cluster = Cluster(algorithm, workers, torch.zeros(SIZE), optimizers=Optimizers([optimizer]))
    for turn in range(25):
        worker, lr = int(draws.integers(workers)), RATES[turn]
        skipped = absent if turn % 3 else ()
        there = np.ones(SIZE, bool)
        for start, stop in skipped:
            there[start:stop] = False
        g = (draws.uniform(0.3, 2, SIZE) * draws.choice([-1, 1], SIZE)).astype(np.float32)
        g[~there] = 0
        cluster.push(worker, torch.from_numpy(g.copy()), lr, absent=skipped)
        close(cluster.views[worker], laboratory.push(worker, g.astype(np.float64), lr, there))


@every_optimizer
def test_the_look_ahead_forgets_a_worker_that_is_gone(optimizer):
    """Also if that worker alone has left out some layers, so that the counts of the shared state differ."""
    laboratory = Laboratory("dana-zero", ORACLES[type(optimizer)](SIZE, **asdict(optimizer)), 2)
    cluster = Cluster("dana-zero", 2, torch.zeros(SIZE), optimizers=Optimizers([optimizer]))
    draws = np.random.default_rng(0)
    for turn in range(9):
        if turn == 6:
            cluster.lose(1)
            laboratory.states[1] = laboratory.oracle.clone()
        worker, there = turn % 2 if turn < 6 else 0, np.ones(SIZE, bool)
        absent = ((2, 4), (6, 8), (10, 11)) if worker and turn == 3 else ()
        for start, stop in absent:
            there[start:stop] = False
        g = draws.uniform(0.3, 2, SIZE).astype(np.float32) * there
        cluster.push(worker, torch.from_numpy(g.astype(np.float32)), 0.05, absent=absent)
        close(cluster.views[worker], laboratory.push(worker, g.astype(np.float64), 0.05, there))


@every_optimizer
def test_dana_and_dana_zero_end_alike(optimizer):
    """Each worker gives back its share of the look-ahead: both end at θ."""
    ends = []
    for algorithm in ("dana", "dana-zero"):
        cluster = Cluster(algorithm, 2, torch.zeros(SIZE), optimizers=Optimizers([optimizer]))
        for turn, lr in enumerate(RATES):
            worker = turn % 3 % 2
            cluster.push(worker, gradient(cluster.views[worker]), lr)
        for worker in (0, 1):
            cluster.leave(worker)
        ends.append(cluster.server.master.params)
    close(ends[0], ends[1])


def test_each_group_has_its_own_numbers():
    groups, optimizers = (4, 8), Optimizers([Adam(0.9, 0.99), Adam(0.5, 0.9, weight_decay=0.1)])
    cluster = Cluster("dana", 1, torch.zeros(SIZE), groups=groups, optimizers=optimizers)
    halves = [
        Cluster("dana", 1, torch.zeros(size), optimizers=Optimizers([optimizer]))
        for size, optimizer in zip(groups, optimizers, strict=True)
    ]
    for lr in RATES:
        grad = gradient(cluster.views[0])
        cluster.push(0, grad, lr)
        for half, part in zip(halves, grad.split(groups), strict=True):
            half.push(0, part, lr)
        close(cluster.views[0], torch.cat([half.views[0] for half in halves]))


# ---- which algorithm carries out which optimizer --------------------------------------------------------------------


def test_a_rule_of_sgd_refuses_all_others():
    with pytest.raises(UnfitOptimizerError, match="ssgd-lars is a rule of SGD and cannot carry out adam"):
        find_algorithm("ssgd-lars").rule(optimizer=Optimizers([Adam()]))


def test_a_rule_of_one_momentum_refuses_two():
    with pytest.raises(UnfitOptimizerError, match="one momentum for all parameter groups"):
        find_algorithm("ssgd-lars").rule(optimizer=Optimizers([Sgd(0.9), Sgd(0.5)]))


@pytest.mark.parametrize("name", ["ga", "dana-ga"])
def test_gap_aware_rules_need_a_velocity(name):
    with pytest.raises(UnfitOptimizerError, match=f"{name} cannot carry out rmsprop without momentum"):
        find_algorithm(name).rule(optimizer=Optimizers([RMSprop()]))


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
@every_optimizer
def test_the_others_build_with_every_optimizer_or_say_why_not(name, optimizer):
    algorithm = find_algorithm(name)
    if refusal := algorithm.refusal(Optimizers([optimizer])):
        assert name in refusal
    else:
        assert algorithm.takes_any_optimizer or isinstance(optimizer, Sgd)
        rule = algorithm.rule(optimizer=Optimizers([optimizer]))
        assert set(optimizer.without_momentum().state) <= {
            *rule.worker_state,
            *rule.shared_state,
            *rule.worker_rule.worker_state,
        }
