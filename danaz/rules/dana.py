"""DANA: send each worker the estimated future position of the parameters (Hakimi et al., arXiv 1907.11612).

All workers' momentum is still to be applied while worker i computes, so its gradient belongs at
θ − γ Σⱼ ηⱼvⱼ. DANA-Zero keeps the velocities on the server; DANA ("slim", Algorithm 4) keeps each on its worker,
by the change of variable Θ = θ − γ Σⱼ ηⱼvⱼ, and its server is plain ASGD. Both send the same parameters.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from danaz.rules.asgd import Displace
from danaz.rules.base import Context, Pushes, Rule, Vectors, WorkerRule, algorithm


class DanaZero(Rule):
    """vᵢ ← γvᵢ + g; θ ← θ − ηvᵢ; worker i gets θ − γR with R = Σⱼ ηⱼvⱼ (Algorithm 3)."""

    worker_state = ("velocity",)
    shared_state = ("sum",)  # R, kept incrementally

    def __init__(self, momentum: float):
        self.momentum = momentum

    def apply(self, params: Tensor, push: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        velocity = own["velocity"]
        shared["sum"].sub_(velocity, alpha=ctx.own_lr)
        torch.add(push, velocity, alpha=self.momentum, out=velocity)
        shared["sum"].add_(velocity, alpha=ctx.lr)
        params.sub_(velocity, alpha=ctx.lr)

    def view(self, out: Tensor, params: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        torch.sub(params, shared["sum"], alpha=self.momentum, out=out)

    def resum(self, shared: Vectors, workers: Iterable[tuple[Vectors, Context]]) -> None:
        shared["sum"].zero_()
        for own, ctx in workers:
            shared["sum"].add_(own["velocity"], alpha=ctx.own_lr)

    def velocity(self, own: Vectors, shared: Vectors) -> Tensor:
        return own["velocity"]


class DanaWorker(WorkerRule):
    """vᵢ′ = γvᵢ + g; push −η(γvᵢ′ + g) + γ(ηᵢ − η)vᵢ.

    The last term is zero while η is constant. It makes the displacement of Θ exact when η changes, and Algorithm 4
    leaves it out: ``lr_correction=False`` does so too.
    """

    pushes: Pushes = "displacement"
    worker_state = ("velocity",)
    gives_back = True

    def __init__(self, momentum: float, lr_correction: bool, sync_period: int = 1):
        self.momentum = momentum
        self.lr_correction = lr_correction
        self.sync_period = sync_period

    def push(self, out: Tensor, grad: Tensor, old: Vectors, new: Vectors, ctx: Context) -> None:
        velocity = new["velocity"].copy_(old["velocity"]).mul_(self.momentum).add_(grad)
        out.copy_(grad).add_(velocity, alpha=self.momentum).mul_(-ctx.lr)
        if self.lr_correction and ctx.own_lr != ctx.lr:
            out.add_(old["velocity"], alpha=self.momentum * (ctx.own_lr - ctx.lr))

    def give_back(self, out: Tensor, state: Vectors, own_lr: float) -> None:
        out.copy_(state["velocity"]).mul_(self.momentum * own_lr)


@algorithm("dana-zero", paper="Hakimi et al., arXiv 1907.11612, Algorithm 3")
def dana_zero(momentum: float = 0.9) -> Rule:
    """DANA with the velocities on the server."""
    return DanaZero(momentum)


@algorithm("dana", paper="Hakimi et al., arXiv 1907.11612, Algorithm 4")
def dana(momentum: float = 0.9, lr_correction: bool = True, sync_period: int = 1) -> Rule:
    """DANA with each velocity on its worker: the look-ahead costs the server nothing."""
    return Displace(DanaWorker(momentum, lr_correction, sync_period))
