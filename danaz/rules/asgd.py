"""Asynchronous SGD, without and with momentum: the DANA paper's starting points (arXiv 1907.11612)."""

from __future__ import annotations

from torch import Tensor

from danaz.optimizers import SGD, Optimizers, Own, PlainSgd, Scalars, Vectors
from danaz.rules.base import Context, Rule, WorkerRule, algorithm, sgd_unless
from danaz.rules.local import OwnSteps, local_steps


class Displace(Rule):
    """Θ ← Θ + the displacement that the worker computed, learning rates included; the worker gets Θ."""

    view_is_state = True

    def __init__(self, worker_rule: WorkerRule):
        self.worker_rule = worker_rule

    def apply(self, params: Tensor, push: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        params.add_(push)


class NagAsgd(Rule):
    """One state for all workers: θ ← θ + s; the worker gets θ + a. For SGD, that is θ − ηγv."""

    def __init__(self, optimizers: Optimizers):
        self.optimizers = optimizers
        self.shared_state = optimizers.state
        self.needs_view = optimizers.needs_view

    def apply(self, params: Tensor, push: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        at = Scalars(ctx.lr, ctx.shared_count + 1)
        self.optimizers.of(ctx.group).step(params, push, shared, at, own.get("view"))

    def view(self, out: Tensor, params: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        optimizer = self.optimizers.of(ctx.group)
        out.copy_(params)
        optimizer.add_heading(out, shared, Scalars(ctx.lr, ctx.shared_count), -optimizer.momentum)

    def velocity(self, own: Vectors, shared: Vectors, ctx: Context) -> Tensor:
        return self.optimizers.of(ctx.group).velocity(shared, Scalars(ctx.lr, ctx.shared_count + 1))


class Asgd(NagAsgd):
    """The same without momentum: θ ← θ + s; the worker gets θ."""

    def __init__(self, optimizers: Optimizers = SGD):
        super().__init__(optimizers.without_momentum())
        self.view_is_state = not self.shared_state


class MultiAsgd(Rule):
    """A state for each worker: θ ← θ + sᵢ; worker i gets θ + aᵢ, without the others' momentum."""

    def __init__(self, optimizers: Optimizers):
        self.optimizers = optimizers
        self.worker_state = optimizers.state
        self.needs_view = optimizers.needs_view

    def apply(self, params: Tensor, push: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        at = Scalars(ctx.lr, ctx.own_count + 1)
        self.optimizers.of(ctx.group).step(params, push, own, at, own.get("view"))

    def view(self, out: Tensor, params: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        optimizer = self.optimizers.of(ctx.group)
        out.copy_(params)
        optimizer.add_heading(out, own, Scalars(ctx.own_lr, ctx.own_count), -optimizer.momentum)


class Baseline(NagAsgd):
    max_workers = 1


class OwnBaseline(Displace):
    max_workers = 1


class Ssgd(NagAsgd):
    """All gradients averaged. The steps are those of torch, where SGD (Nesterov's) and NAdam look ahead themselves."""

    barrier = True
    all_reduce = True
    scales_lr = True

    def view(self, out: Tensor, params: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        if self.optimizers.of(ctx.group).steps_look_ahead:
            super().view(out, params, own, shared, ctx)
        else:
            out.copy_(params)


class OwnSsgd(Displace):
    barrier = True
    all_reduce = True
    scales_lr = True


@algorithm("asgd", paper="Dean et al., Large Scale Distributed Deep Networks, NIPS 2012", takes_own=True)
def asgd(sync_period: int = 1, optimizer: Optimizers | None = None) -> Rule:
    """Asynchronous SGD without momentum."""
    optimizers = sgd_unless(optimizer).without_momentum()
    if sync_period == 1 and isinstance(optimizers[0], PlainSgd):
        return Asgd(optimizers)
    return Displace(local_steps(optimizers, sync_period=sync_period))


@algorithm("nag-asgd", paper="Hakimi et al., arXiv 1907.11612")
def nag_asgd(momentum: float = 0.9, optimizer: Optimizers | None = None) -> Rule:
    """Asynchronous SGD with one Nesterov momentum for all workers; breaks as workers are added."""
    return NagAsgd(sgd_unless(optimizer, momentum))


@algorithm("multi-asgd", paper="Hakimi et al., arXiv 1907.11612")
def multi_asgd(momentum: float = 0.9, optimizer: Optimizers | None = None) -> Rule:
    """Asynchronous SGD with a Nesterov momentum of its own for each worker."""
    return MultiAsgd(sgd_unless(optimizer, momentum))


@algorithm("baseline", paper="Nesterov 1983; Sutskever et al., ICML 2013", takes_own=True)
def baseline(momentum: float = 0.9, optimizer: Optimizers | None = None) -> Rule:
    """Nesterov SGD on one worker: torch.optim.SGD(nesterov=True) in the variable Θ = θ − ηγv."""
    optimizers = sgd_unless(optimizer, momentum)
    return OwnBaseline(OwnSteps()) if isinstance(optimizers[0], Own) else Baseline(optimizers)


@algorithm("ssgd", paper="Goyal et al., Accurate, Large Minibatch SGD, arXiv 1706.02677", takes_own=True)
def ssgd(momentum: float = 0.9, optimizer: Optimizers | None = None) -> Rule:
    """Synchronous SGD: all gradients averaged, one Nesterov step at N times the rate (linear scaling)."""
    optimizers = sgd_unless(optimizer, momentum)
    return OwnSsgd(OwnSteps()) if isinstance(optimizers[0], Own) else Ssgd(optimizers)
