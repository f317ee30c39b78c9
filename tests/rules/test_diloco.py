"""DiLoCo and its asynchronous form, against the optimizers of torch and, for each outer rule, against its formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cluster import Cluster
from hypothesis import given, settings
from pair import Pair, Run, close, runs
from torch import Tensor, nn

from danaz.optimizers import Adam, NAdam, Optimizer, Optimizers, Sgd
from danaz.rules import find_algorithm
from danaz.rules.base import HyperparameterError

SIZE, PERIOD, ROUNDS = 6, 4, 5
OUTER = find_algorithm("async-diloco").choices["outer"]
CURVATURE = torch.logspace(-1, 0.5, SIZE)

INNER: dict[str, tuple[Optimizer, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]] = {
    "AdamW": (
        Adam(0.9, 0.99, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, 0.05, betas=(0.9, 0.99), weight_decay=0.1),
    ),
    "NAdam": (NAdam(0.9, 0.99), lambda p: torch.optim.NAdam(p, 0.05, betas=(0.9, 0.99))),
    "SGD": (Sgd(0.9), lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True)),
}
every_inner = pytest.mark.parametrize(("inner", "torchs"), list(INNER.values()), ids=list(INNER))


def gradient(at: Tensor, worker: int) -> Tensor:
    return CURVATURE * (at - worker)


class Papers:
    """DiLoCo as the paper has it, of torch's own optimizers: an inner one for each worker, and an outer one."""

    def __init__(self, workers: int, make_inner: Callable[[list[nn.Parameter]], torch.optim.Optimizer]):
        self.theta = nn.Parameter(torch.zeros(SIZE))
        self.outer = torch.optim.SGD([self.theta], 0.7, momentum=0.9, nesterov=True)
        self.models = [nn.Parameter(torch.zeros(SIZE)) for _ in range(workers)]
        self.inner = [make_inner([model]) for model in self.models]

    def local_steps(self, worker: int, lr: float) -> list[Tensor]:
        """Let a worker go on from θ, and return its gradients."""
        model, inner, grads = self.models[worker], self.inner[worker], []
        model.data.copy_(self.theta.data)
        inner.param_groups[0]["lr"] = lr
        for _ in range(PERIOD):
            model.grad = gradient(model.data, worker)
            grads.append(model.grad.clone())
            inner.step()
        return grads

    def end_round(self) -> None:
        self.theta.grad = self.theta.data - torch.stack([model.data for model in self.models]).mean(0)
        self.outer.step()


@every_inner
@pytest.mark.parametrize("workers", [1, 3])
def test_it_is_the_papers_with_torchs_own_optimizers(workers: int, inner: Optimizer, torchs: Any) -> None:
    """Every view is the paper's θ, also while the inner rate changes, and so is the model at the end."""
    papers = Papers(workers, torchs)
    cluster = Cluster("diloco", workers, torch.zeros(SIZE), optimizers=Optimizers([inner]), sync_period=PERIOD)
    for number in range(ROUNDS):
        lr = 0.05 / (1 + number)
        for worker in range(workers):
            cluster.push(worker, papers.local_steps(worker, lr), lr)
        papers.end_round()
        for view in cluster.views.values():
            close(view, papers.theta.data)
    for worker in range(workers):
        cluster.leave(worker)
    close(cluster.server.master.params, papers.theta.data)


@every_inner
@pytest.mark.parametrize("outer", ["nag-asgd", "delayed-nesterov", "dana"])
def test_on_one_worker_its_asynchronous_form_is_the_same(outer: str, inner: Optimizer, torchs: Any) -> None:
    papers, optimizers = Papers(1, torchs), Optimizers([inner])
    cluster = Cluster(
        "async-diloco",
        1,
        torch.zeros(SIZE),
        optimizers=optimizers,
        sync_period=PERIOD,
        hyperparameters={"outer": outer},
    )
    for _ in range(ROUNDS):
        cluster.push(0, papers.local_steps(0, 0.05), 0.05)
        papers.end_round()
        close(cluster.views[0], papers.theta.data)


def test_bmuf_is_its_relative() -> None:
    """With ε = 1 and β = 1 − 1/N, workers compute on the same parameters, unless an inner momentum is reset."""
    numbers = {"diloco": {"outer_lr": 1.0, "outer_momentum": 1 - 1 / 3}, "bmuf": {}}
    clusters = [
        Cluster(
            name, 3, torch.zeros(SIZE), optimizers=Optimizers([Sgd(0.0)]), sync_period=PERIOD, hyperparameters=values
        )
        for name, values in numbers.items()
    ]
    for turn in range(9):
        grads = list(torch.randn(PERIOD, SIZE, generator=torch.Generator().manual_seed(turn)))
        for cluster in clusters:
            cluster.push(turn % 3, grads, 0.1)
    ours, theirs = (cluster.views[0] for cluster in clusters)
    close(ours, theirs)


@pytest.mark.parametrize("outer", OUTER)
@given(run=runs("lose", "come_back", "start_anew", "leave"))
@settings(max_examples=20, deadline=None)
def test_each_outer_rule_is_its_formula_while_workers_come_and_go(outer: str, run: Run) -> None:
    Pair("async-diloco", run, outer=outer).live_through_it()


@pytest.mark.parametrize(
    ("algorithm", "choice"), [("diloco", {}), *(("async-diloco", {"outer": outer}) for outer in OUTER)]
)
def test_the_outer_momentum_leaves_a_frozen_layer_where_it_is(algorithm: str, choice: dict[str, str]) -> None:
    """A layer counts as frozen if no step since the last push has moved it, and the script has not, either."""
    cluster = Cluster(algorithm, 2, torch.zeros(SIZE), sync_period=2, hyperparameters=choice)
    frozen, grads = ((2, 4),), [torch.ones(SIZE)] * 2
    for turn in range(4):
        cluster.push(turn % 2, grads, 0.1)
    before = cluster.views[1][2:4].clone()
    assert before.any()
    for turn in range(6):
        cluster.push(turn % 2, grads, 0.1, absent=frozen)
    assert torch.equal(cluster.views[1][2:4], before)
    assert not torch.equal(cluster.views[1][:2], before)


@pytest.mark.parametrize(
    ("algorithm", "values", "why"),
    [
        ("async-diloco", {"outer": "adam"}, "outer = 'adam', expected one of asgd, nag-asgd, delayed-nesterov, dana"),
        ("async-diloco", {"outer": 3}, "outer = 3, expected text, as its default"),
        ("diloco", {"outer": "dana"}, "diloco has no hyper-parameter 'outer'; it has outer_lr, outer_momentum"),
        ("diloco", {"outer_lr": 0.0}, "outer_lr is 0.0; a number above 0 was expected"),
        ("diloco", {"outer_momentum": 1.0}, "outer_momentum is 1.0; a number from 0 to below 1 was expected"),
    ],
)
def test_numbers_and_names_that_do_not_fit_are_refused(algorithm: str, values: dict[str, Any], why: str) -> None:
    with pytest.raises(HyperparameterError, match=why):
        Cluster(algorithm, 1, torch.zeros(SIZE), hyperparameters=values)


@pytest.mark.parametrize(
    ("choice", "on_server", "for_each"),
    [("asgd", 0, 0), ("nag-asgd", 1, 0), ("delayed-nesterov", 2, 0), ("dana", 0, 1)],
)
def test_what_the_server_keeps(choice: str, on_server: int, for_each: int) -> None:
    rule = find_algorithm("async-diloco").rule(outer=choice)
    assert (len(rule.shared_state), len(rule.worker_state), rule.needs_view) == (on_server, for_each, False)
