"""What follows from the formulas, and must be true of the code: equalities between rules, and with torch's own SGD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from cluster import Cluster
from hypothesis import given, settings
from pair import GROUPS, SIZE, Pair, close, runs
from torch import Tensor

from danaz.files.user_module import UserModuleError
from danaz.optimizers import Optimizers, Sgd
from danaz.rules import Context, UnknownAlgorithmError, chain, dana_zero, find_algorithm, scale_gradient
from danaz.rules.asgd import Asgd

CURVATURE = torch.logspace(-2, 0, SIZE)


def gradient(at: Tensor) -> Tensor:
    return CURVATURE * (at - 1)


def torch_sgd(rates: Sequence[Sequence[float]], momentum: float) -> list[Tensor]:
    """The parameters before each step of torch's own optimizer, and after the last."""
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in GROUPS]
    optimizer = torch.optim.SGD([{"params": [p]} for p in parameters], lr=1.0, momentum=momentum, nesterov=momentum > 0)
    path = [torch.zeros(SIZE)]
    for step in rates:
        for group, rate in zip(optimizer.param_groups, step, strict=True):
            group["lr"] = rate
        for parameter, grad in zip(parameters, gradient(path[-1]).split(GROUPS), strict=True):
            parameter.grad = grad
        optimizer.step()
        path.append(torch.cat([p.detach() for p in parameters]))
    return path


def our_views(name: str, rates: Sequence[Sequence[float]], momentum: float, lr_correction: bool = True) -> list[Tensor]:
    optimizers = Optimizers([Sgd(momentum)])
    cluster = Cluster(name, 1, torch.zeros(SIZE), groups=GROUPS, optimizers=optimizers, lr_correction=lr_correction)
    path = [cluster.views[0]]
    for step in rates:
        cluster.push(0, gradient(path[-1]), step)
        path.append(cluster.views[0])
    return path


NESTEROV = ["baseline", "ssgd", "nag-asgd", "multi-asgd", "dana-zero", "dana"]


class TestOneWorkerIsTorchsSGD:
    @pytest.mark.parametrize("rate", [(0.1, 0.1), (0.1, 0.02)], ids=["one lr", "a lr for each group"])
    @pytest.mark.parametrize("momentum", [0.9, 0.5])
    @pytest.mark.parametrize("name", NESTEROV)
    def test_step_for_step(self, name, momentum, rate):
        rates = [rate] * 40
        for ours, torchs in zip(our_views(name, rates, momentum), torch_sgd(rates, momentum), strict=True):
            close(ours, torchs, 1e-6)

    def test_dana_without_correction_also_while_lr_changes(self):
        rates = [(0.1 / (1 + step % 7), 0.02 * (1 + step % 3)) for step in range(40)]
        ours = our_views("dana", rates, 0.9, lr_correction=False)
        for our, torchs in zip(ours, torch_sgd(rates, 0.9), strict=True):
            close(our, torchs, 1e-6)

    def test_the_correction_is_felt_when_lr_changes(self):
        """Or the test above would not tell the two forms apart."""
        rates = [(0.1, 0.1)] * 5 + [(0.01, 0.01)] * 5
        with_it, without = our_views("dana", rates, 0.9), our_views("dana", rates, 0.9, lr_correction=False)
        assert torch.equal(with_it[5], without[5])
        assert (with_it[6] - without[6]).abs().max() > 1e-3

    def test_asgd_is_plain_sgd(self):
        rates = [(0.1 / (1 + step % 7), 0.02) for step in range(40)]
        for ours, torchs in zip(our_views("asgd", rates, 0.0), torch_sgd(rates, 0.0), strict=True):
            close(ours, torchs, 1e-6)

    @pytest.mark.parametrize("name", NESTEROV)
    def test_without_momentum_all_are_plain_sgd(self, name):
        rates = [(0.1 / (1 + step % 7), 0.02) for step in range(20)]
        for ours, torchs in zip(our_views(name, rates, 0.0), torch_sgd(rates, 0.0), strict=True):
            close(ours, torchs, 1e-6)


class TestDanaIsDanaZero:
    @given(run=runs("leave"))
    @settings(max_examples=60, deadline=None)
    def test_both_send_the_same_and_end_the_same(self, run):
        """Any order of pushes, and whatever lr does; workers may leave in good order on the way."""
        corrected = replace(run, lr_correction=True, sync_period=1)
        slim, zero = Pair("dana", corrected), Pair("dana-zero", corrected)
        for what, worker in run.events:
            getattr(slim, what)(worker)
            getattr(zero, what)(worker)
            assert slim.cluster.views.keys() == zero.cluster.views.keys()
            if what == "push" and worker in slim.cluster.views:
                close(slim.cluster.views[worker], zero.cluster.views[worker])
        close(slim.theta(), zero.theta())


class TestLookup:
    def test_a_typo_is_met_with_the_nearest_name(self):
        with pytest.raises(UnknownAlgorithmError, match="Did you mean 'dana-zero'"):
            find_algorithm("dana-zreo")

    def test_an_algorithm_of_the_users_own(self):
        """By import path: here, one of ours."""
        assert find_algorithm("danaz.rules.dana:dana_zero").rule(momentum=0.5).optimizers.of(0).momentum == 0.5

    @pytest.mark.parametrize(
        ("path", "complaint"),
        [
            ("no.such.module:rule", "algorithm 'no.such.module:rule': no module 'no' here or on PYTHONPATH"),
            ("danaz.rules:no_such_rule", "danaz.rules has no callable 'no_such_rule'"),
        ],
    )
    def test_an_import_path_that_leads_nowhere(self, path, complaint):
        with pytest.raises(UserModuleError, match=complaint):
            find_algorithm(path)

    def test_a_rule_gets_those_hyperparameters_that_it_has(self):
        assert isinstance(find_algorithm("asgd").rule(momentum=0.9, lr_correction=False), Asgd)


class TestChain:
    def test_the_example_of_the_documentation(self):
        """g / √(1 + τ), then DANA-Zero."""
        rule = chain(scale_gradient(lambda grad, ctx: grad.div_((1 + ctx.lag) ** 0.5)), dana_zero(0.9))
        params, push = torch.zeros(3), torch.ones(3)
        own, shared = {"velocity": torch.zeros(3)}, {"sum": torch.zeros(3)}
        context = Context(lr=0.5, own_lr=0.0, max_lr=0.5, lag=3, version=5, own_count=0)
        rule.apply(params, push, own, shared, context)
        assert params.tolist() == [-0.25] * 3

    def test_a_displacement_is_no_gradient(self):
        with pytest.raises(ValueError, match="takes a displacement"):
            chain(scale_gradient(lambda grad, ctx: grad), find_algorithm("dana").rule())

    def test_a_rule_comes_last(self):
        with pytest.raises(TypeError, match="last, one rule"):
            chain(dana_zero(0.9), scale_gradient(lambda grad, ctx: grad))
