"""DANA's look-ahead for Nadam: our reading of the DANA paper's future work, with no published figure to compare.

Nadam is Dozat, Incorporating Nesterov Momentum into Adam, ICLR 2016 workshop.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from danaz.optimizers import Vectors
from danaz.rules.base import Context, Rule, algorithm


class DanaNadam(Rule):
    """mᵢ ← β₁mᵢ + (1 − β₁)g; n ← β₂n + (1 − β₂)g²; θ ← θ − η mᵢ/(1 − β₁^tᵢ)/d; reply θ − ηβ₁ Σⱼ mⱼ/(1 − β₁^(tⱼ+1))/d.

    d = √(n/(1 − β₂^t)) + ε. tᵢ counts worker i's gradients, t all of them. Unlike dana-zero with Adam, all workers
    share n, the second moment.
    """

    worker_state = ("mean",)  # mᵢ
    shared_state = ("square", "sum")  # n, Σⱼ mⱼ/(1 − β₁^(tⱼ+1))

    def __init__(self, beta1: float, beta2: float = 0.999, eps: float = 1e-8):
        self.beta1 = beta1
        self.beta2 = beta2
        self.eps = eps

    def apply(self, params: Tensor, push: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        mean, total, count = own["mean"], shared["sum"], ctx.own_count + 1
        total.sub_(mean, alpha=self._unbiased(count))
        mean.mul_(self.beta1).add_(push, alpha=1 - self.beta1)
        shared["square"].mul_(self.beta2).addcmul_(push, push, value=1 - self.beta2)
        total.add_(mean, alpha=self._unbiased(count + 1))
        rate = ctx.lr * self._unbiased(count)
        params.addcdiv_(mean, self._denominator(shared, ctx.shared_count + 1), value=-rate)

    def view(self, out: Tensor, params: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        out.copy_(params)
        if ctx.shared_count:
            denominator = self._denominator(shared, ctx.shared_count)
            out.addcdiv_(shared["sum"], denominator, value=-ctx.lr * self.beta1)

    def resum(self, shared: Vectors, workers: Iterable[tuple[Vectors, Context]]) -> None:
        shared["sum"].zero_()
        for own, ctx in workers:
            shared["sum"].add_(own["mean"], alpha=self._unbiased(ctx.own_count + 1))

    def _unbiased(self, count: int) -> float:
        return 1 / (1 - self.beta1**count)

    def _denominator(self, shared: Vectors, count: int) -> Tensor:
        """d f32[n]."""
        return shared["square"].div(1 - self.beta2**count).sqrt_().add_(self.eps)


@algorithm("dana-nadam", paper="Dozat, ICLR 2016 workshop; Hakimi et al., arXiv 1907.11612 (future work)")
def dana_nadam(momentum: float = 0.9) -> Rule:
    """Nadam with a first moment for each worker, and DANA's look-ahead along their sum."""
    return DanaNadam(momentum)
