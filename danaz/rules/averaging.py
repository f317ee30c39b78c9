"""Model averaging in rounds, plain and with block momentum: what CNTK offers (ModelAveragingSGD, BlockMomentumSGD)."""

from __future__ import annotations

from torch import Tensor

from danaz.optimizers import Optimizers, Vectors
from danaz.rules.base import Context, Rule, algorithm, sgd_unless
from danaz.rules.local import local_steps

SYNC_PERIOD = 10  # local steps in a round


class ModelAveraging(Rule):
    """W ← mean(Wᵢ)."""

    barrier = True

    def __init__(self, optimizers: Optimizers, sync_period: int):
        self.worker_rule = local_steps(optimizers, pushes="parameters", sync_period=sync_period)

    def apply(self, params: Tensor, push: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        params.copy_(push)


class BlockMomentum(Rule):
    """G = mean(Wᵢ) − B; Δ ← βΔ + ζG; W ← W + Δ; the server sends B = W + βΔ (W itself in the classic form).

    β = 1 − 1/N, ζ = 1. Workers begin each block without momentum, unless the user's own optimizer keeps it.
    """

    barrier = True
    needs_view = True  # B
    shared_state = ("step",)  # Δ

    def __init__(self, optimizers: Optimizers, sync_period: int, nesterov: bool):
        self.worker_rule = local_steps(optimizers, pushes="parameters", sync_period=sync_period, resets=True)
        self.nesterov = nesterov

    def apply(self, params: Tensor, push: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        step = shared["step"].mul_(1 - 1 / ctx.workers).add_(push).sub_(own["view"])
        params.add_(step)

    def view(self, out: Tensor, params: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        out.copy_(params)
        if self.nesterov:
            out.add_(shared["step"], alpha=1 - 1 / ctx.workers)


@algorithm("model-averaging", paper="McDonald et al., NAACL 2010; CNTK ModelAveragingSGD", takes_own=True)
def model_averaging(momentum: float = 0.9, sync_period: int = SYNC_PERIOD, optimizer: Optimizers | None = None) -> Rule:
    """Local Nesterov steps; then everyone goes on from the mean of all models."""
    return ModelAveraging(sgd_unless(optimizer, momentum), sync_period)


@algorithm("bmuf", paper="Chen, Huo, ICASSP 2016; CNTK BlockMomentumSGD", takes_own=True)
def bmuf(
    momentum: float = 0.9, sync_period: int = SYNC_PERIOD, nesterov: bool = True, optimizer: Optimizers | None = None
) -> Rule:
    """Blockwise model-update filtering: the mean model of each block moves the server with a momentum of its own."""
    return BlockMomentum(sgd_unless(optimizer, momentum), sync_period, nesterov)
