"""Training without a server: each worker has its own parameters and averages them with neighbours (simulator only).

The model is the mean of all workers' parameters. Averaging does not change this mean: only gradients move it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from danaz.optimizers import Vectors
from danaz.rules.base import Context, Rule, algorithm


class Decentralised(Rule):
    """The worker computes on its own xᵢ."""

    live = False
    worker_state = ("local",)  # xᵢ

    def enter(self, own: Vectors, params: Tensor) -> None:
        own["local"].copy_(params)

    def view(self, out: Tensor, params: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        out.copy_(own["local"])


class AdPsgd(Decentralised):
    """xᵢ and one random xⱼ become their mean; then xᵢ ← xᵢ − ηg."""

    gossips = True

    def apply(self, params: Tensor, push: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        local, neighbour = own["local"], own["neighbour"]
        neighbour.add_(local).mul_(0.5)
        local.copy_(neighbour)
        local.sub_(push, alpha=ctx.lr)
        params.sub_(push, alpha=ctx.lr / ctx.workers)


class DPsgd(Decentralised):
    """In rounds: xᵢ becomes the mean of itself and both neighbours on a ring, less ηgᵢ."""

    barrier = True

    def apply_round(
        self,
        params: Tensor,
        pushes: Sequence[tuple[Tensor, float]],
        owns: Sequence[Vectors],
        shared: Vectors,
        ctx: Context,
    ) -> None:
        before, n = [own["local"].clone() for own in owns], len(owns)
        for i, (own, (push, _)) in enumerate(zip(owns, pushes, strict=True)):
            around = {(i - 1) % n, i, (i + 1) % n}  # fewer than three workers are each other's neighbours
            local = own["local"].zero_()
            for j in around:
                local.add_(before[j], alpha=1 / len(around))
            local.sub_(push, alpha=ctx.lr)
            params.sub_(push, alpha=ctx.lr / ctx.workers)


@algorithm("ad-psgd", paper="Lian et al., ICML 2018, arXiv 1710.06952")
def ad_psgd() -> Rule:
    """Asynchronous decentralised SGD: average with one random worker, then step."""
    return AdPsgd()


@algorithm("d-psgd", paper="Lian et al., NIPS 2017, arXiv 1705.09056")
def d_psgd() -> Rule:
    """Synchronous decentralised SGD: average with both neighbours on a ring, then step."""
    return DPsgd()
