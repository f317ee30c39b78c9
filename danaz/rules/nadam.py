"""DANA's look-ahead for Nadam: our reading of the DANA paper's future work, with no published figure to compare.

Nadam is Dozat, Incorporating Nesterov Momentum into Adam, ICLR 2016 workshop.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from danaz.rules.base import Context, Rule, Vectors, algorithm

DECAY = 0.999  # β₂
EPSILON = 1e-8


class DanaNadam(Rule):
    """mᵢ ← β₁mᵢ + (1 − β₁)g; n ← β₂n + (1 − β₂)g²; θ ← θ − ηm̂ᵢ/(√n̂ + ε); reply θ − ηβ₁ Σⱼ m̂ⱼ/(√n̂ + ε).

    m̂ᵢ = mᵢ/(1 − β₁^tᵢ) counts worker i's updates, n̂ = n/(1 − β₂^t) all of them.
    """

    worker_state = ("mean",)  # mᵢ
    shared_state = ("square", "sum")  # n, Σⱼ m̂ⱼ

    def __init__(self, momentum: float):
        self.momentum = momentum  # β₁

    def apply(self, params: Tensor, push: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        mean, total = own["mean"], shared["sum"]
        if ctx.own_updates:
            total.sub_(mean, alpha=self._unbiased(ctx.own_updates))
        mean.mul_(self.momentum).add_(push, alpha=1 - self.momentum)
        shared["square"].mul_(DECAY).addcmul_(push, push, value=1 - DECAY)
        unbiased = self._unbiased(ctx.own_updates + 1)
        total.add_(mean, alpha=unbiased)
        params.addcdiv_(mean, self._scale(shared, ctx.version + 1), value=-ctx.lr * unbiased)

    def view(self, out: Tensor, params: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        out.copy_(params)
        if ctx.version:
            out.addcdiv_(shared["sum"], self._scale(shared, ctx.version), value=-ctx.lr * self.momentum)

    def resum(self, shared: Vectors, workers: Iterable[tuple[Vectors, Context]]) -> None:
        shared["sum"].zero_()
        for own, ctx in workers:
            if ctx.own_updates:
                shared["sum"].add_(own["mean"], alpha=self._unbiased(ctx.own_updates))

    def _unbiased(self, updates: int) -> float:
        return 1 / (1 - self.momentum**updates)

    def _scale(self, shared: Vectors, updates: int) -> Tensor:
        """√n̂ + ε, f32[n]."""
        return shared["square"].div(1 - DECAY**updates).sqrt_().add_(EPSILON)


@algorithm("dana-nadam", paper="Dozat, ICLR 2016 workshop; Hakimi et al., arXiv 1907.11612 (future work)")
def dana_nadam(momentum: float = 0.9) -> Rule:
    """Nadam with a first moment for each worker, and DANA's look-ahead along their sum."""
    return DanaNadam(momentum)
