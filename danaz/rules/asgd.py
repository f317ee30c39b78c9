"""Asynchronous SGD, without and with Nesterov momentum: the DANA paper's starting points (arXiv 1907.11612)."""

from __future__ import annotations

from torch import Tensor

from danaz.rules.base import Context, Pushes, Rule, Vectors, WorkerRule, algorithm


class Asgd(Rule):
    """θ ← θ − ηg; the worker gets θ."""

    view_is_state = True

    def apply(self, params: Tensor, push: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        params.sub_(push, alpha=ctx.lr)


class Displace(Rule):
    """Θ ← Θ + the displacement that the worker computed, learning rates included; the worker gets Θ."""

    view_is_state = True

    def __init__(self, worker_rule: WorkerRule):
        self.worker_rule = worker_rule

    def apply(self, params: Tensor, push: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        params.add_(push)


class LocalSgd(WorkerRule):
    """x ← x − ηg on the worker."""

    pushes: Pushes = "displacement"

    def __init__(self, sync_period: int):
        self.sync_period = sync_period

    def push(self, out: Tensor, grad: Tensor, old: Vectors, new: Vectors, ctx: Context) -> None:
        out.copy_(grad).mul_(-ctx.lr)


class NagAsgd(Rule):
    """One velocity for all workers: v ← γv + g; θ ← θ − ηv; the worker gets θ − ηγv."""

    shared_state = ("velocity",)

    def __init__(self, momentum: float):
        self.momentum = momentum

    def apply(self, params: Tensor, push: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        velocity = shared["velocity"].mul_(self.momentum).add_(push)
        params.sub_(velocity, alpha=ctx.lr)

    def view(self, out: Tensor, params: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        out.copy_(params).sub_(shared["velocity"], alpha=ctx.lr * self.momentum)

    def velocity(self, own: Vectors, shared: Vectors) -> Tensor:
        return shared["velocity"]


class MultiAsgd(Rule):
    """One velocity per worker: vᵢ ← γvᵢ + g; θ ← θ − ηvᵢ; worker i gets θ − γηᵢvᵢ, without the others' momentum."""

    worker_state = ("velocity",)

    def __init__(self, momentum: float):
        self.momentum = momentum

    def apply(self, params: Tensor, push: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        velocity = own["velocity"].mul_(self.momentum).add_(push)
        params.sub_(velocity, alpha=ctx.lr)

    def view(self, out: Tensor, params: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        out.copy_(params).sub_(own["velocity"], alpha=ctx.own_lr * self.momentum)


class Baseline(NagAsgd):
    max_workers = 1


class Ssgd(NagAsgd):
    barrier = True
    all_reduce = True
    scales_lr = True


@algorithm("asgd", paper="Dean et al., Large Scale Distributed Deep Networks, NIPS 2012")
def asgd(sync_period: int = 1) -> Rule:
    """Asynchronous SGD without momentum."""
    return Asgd() if sync_period == 1 else Displace(LocalSgd(sync_period))


@algorithm("nag-asgd", paper="Hakimi et al., arXiv 1907.11612")
def nag_asgd(momentum: float = 0.9) -> Rule:
    """Asynchronous SGD with one Nesterov momentum for all workers; breaks as workers are added."""
    return NagAsgd(momentum)


@algorithm("multi-asgd", paper="Hakimi et al., arXiv 1907.11612")
def multi_asgd(momentum: float = 0.9) -> Rule:
    """Asynchronous SGD with a Nesterov momentum of its own for each worker."""
    return MultiAsgd(momentum)


@algorithm("baseline", paper="Nesterov 1983; Sutskever et al., ICML 2013")
def baseline(momentum: float = 0.9) -> Rule:
    """Nesterov SGD on one worker: torch.optim.SGD(nesterov=True) in the variable Θ = θ − ηγv."""
    return Baseline(momentum)


@algorithm("ssgd", paper="Goyal et al., Accurate, Large Minibatch SGD, arXiv 1706.02677")
def ssgd(momentum: float = 0.9) -> Rule:
    """Synchronous SGD: all gradients averaged, one Nesterov step at N times the rate (linear scaling)."""
    return Ssgd(momentum)
