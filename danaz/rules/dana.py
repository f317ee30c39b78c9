"""DANA: send each worker the estimated future position of the parameters (Hakimi et al., arXiv 1907.11612).

All workers' momentum is still to be applied while worker i computes, so its gradient belongs at θ + Σⱼ aⱼ: for SGD,
θ − γ Σⱼ ηⱼvⱼ. DANA-Zero keeps the optimizer states on the server. DANA ("slim", Algorithm 4) keeps each on its worker,
by the change of variable Θ = θ + Σⱼ aⱼ, and its server only adds. Both send the same parameters.

The paper has SGD with Nesterov momentum. The same holds for every optimizer whose momentum makes a step of its own.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from danaz.optimizers import Optimizers, Scalars, Vectors
from danaz.rules.asgd import Displace
from danaz.rules.base import Context, Rule, algorithm, sgd_unless
from danaz.rules.local import LocalSteps


class DanaZero(Rule):
    """θ ← θ + sᵢ; worker i gets θ − μU with U = Σⱼ uⱼ, the sum of all headings (Algorithm 3).

    For SGD: vᵢ ← γvᵢ + g; θ ← θ − ηvᵢ; worker i gets θ − γ Σⱼ ηⱼvⱼ.
    """

    def __init__(self, optimizers: Optimizers):
        self.optimizers = optimizers.fused()
        self.worker_state = optimizers.state
        self.shared_state = ("sum",)  # U, kept incrementally
        self.needs_view = optimizers.needs_view

    def apply(self, params: Tensor, push: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        optimizer, after = self.optimizers.of(ctx.group), Scalars(ctx.lr, ctx.own_count + 1)
        optimizer.add_heading(shared["sum"], own, Scalars(ctx.own_lr, ctx.own_count), -1)
        optimizer.step(params, push, own, after, own.get("view"))
        optimizer.add_heading(shared["sum"], own, after, 1)

    def view(self, out: Tensor, params: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        torch.sub(params, shared["sum"], alpha=self.optimizers.of(ctx.group).momentum, out=out)

    def resum(self, shared: Vectors, workers: Iterable[tuple[Vectors, Context]]) -> None:
        shared["sum"].zero_()
        for own, ctx in workers:
            at = Scalars(ctx.own_lr, ctx.own_count)
            self.optimizers.of(ctx.group).add_heading(shared["sum"], own, at, 1)

    def velocity(self, own: Vectors, shared: Vectors, ctx: Context) -> Tensor:
        return self.optimizers.of(ctx.group).velocity(own, Scalars(ctx.lr, ctx.own_count + 1))


@algorithm("dana-zero", paper="Hakimi et al., arXiv 1907.11612, Algorithm 3")
def dana_zero(momentum: float = 0.9, optimizer: Optimizers | None = None) -> Rule:
    """DANA with the velocities on the server."""
    return DanaZero(sgd_unless(optimizer, momentum))


@algorithm("dana", paper="Hakimi et al., arXiv 1907.11612, Algorithm 4")
def dana(
    momentum: float = 0.9, lr_correction: bool = True, sync_period: int = 1, optimizer: Optimizers | None = None
) -> Rule:
    """DANA with each velocity on its worker: the look-ahead costs the server nothing."""
    optimizers = sgd_unless(optimizer, momentum)
    return Displace(LocalSteps(optimizers, lr_correction=lr_correction, sync_period=sync_period, gives_back=True))
