"""DANA's look-ahead for Nadam: our reading of the DANA paper's future work, with no published figure to compare.

Nadam is Dozat, Incorporating Nesterov Momentum into Adam, ICLR 2016 workshop.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from danaz.optimizers import Adam, Optimizers, Sgd, Vectors
from danaz.rules.base import Context, Rule, UnfitOptimizerError, algorithm, sgd_unless


class DanaNadam(Rule):
    """mᵢ ← β₁mᵢ + (1 − β₁)g; n ← β₂n + (1 − β₂)g²; θ ← θ − η mᵢ/(1 − β₁^tᵢ)/d; reply θ − ηβ₁ Σⱼ mⱼ/(1 − β₁^(tⱼ+1))/d.

    d = √(n/(1 − β₂^t)) + ε. tᵢ counts worker i's gradients, t all of them. Unlike dana-zero with Adam, all workers
    share n, the second moment.
    """

    worker_state = ("mean",)  # mᵢ
    shared_state = ("square", "sum")  # n, Σⱼ mⱼ/(1 − β₁^(tⱼ+1))

    def __init__(self, adam: Adam):
        self.adam = adam

    def apply(self, params: Tensor, push: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        mean, total, count = own["mean"], shared["sum"], ctx.own_count + 1
        total.sub_(mean, alpha=self._unbiased(count))
        mean.mul_(self.adam.beta1).add_(push, alpha=1 - self.adam.beta1)
        shared["square"].mul_(self.adam.beta2).addcmul_(push, push, value=1 - self.adam.beta2)
        total.add_(mean, alpha=self._unbiased(count + 1))
        rate = ctx.lr * self._unbiased(count)
        params.addcdiv_(mean, self._denominator(shared, ctx.shared_count + 1), value=-rate)

    def view(self, out: Tensor, params: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        out.copy_(params)
        if ctx.shared_count:
            denominator = self._denominator(shared, ctx.shared_count)
            out.addcdiv_(shared["sum"], denominator, value=-ctx.lr * self.adam.beta1)

    def resum(self, shared: Vectors, workers: Iterable[tuple[Vectors, Context]]) -> None:
        shared["sum"].zero_()
        for own, ctx in workers:
            shared["sum"].add_(own["mean"], alpha=self._unbiased(ctx.own_count + 1))

    def _unbiased(self, count: int) -> float:
        return 1 / (1 - self.adam.beta1**count)

    def _denominator(self, shared: Vectors, count: int) -> Tensor:
        """d f32[n]."""
        return shared["square"].div(1 - self.adam.beta2**count).sqrt_().add_(self.adam.eps)


@algorithm("dana-nadam", paper="Dozat, ICLR 2016 workshop; Hakimi et al., arXiv 1907.11612 (future work)")
def dana_nadam(momentum: float = 0.9, optimizer: Optimizers | None = None) -> Rule:
    """Nadam with a first moment for each worker, and DANA's look-ahead along their sum."""
    return DanaNadam(_as_adam("dana-nadam", sgd_unless(optimizer, momentum)))


def _as_adam(name: str, optimizers: Optimizers) -> Adam:
    """The Adam whose numbers the rule takes; the momentum of an SGD becomes its β₁. Raises UnfitOptimizerError."""
    [optimizer, *others] = set(optimizers)
    if not others and isinstance(optimizer, Sgd):
        return Adam(beta1=optimizer.momentum)
    if others or type(optimizer) is not Adam or optimizer.amsgrad or optimizer.weight_decay:
        raise UnfitOptimizerError(
            f"{name} carries out Adam, with the same betas and eps for all parameter groups, and without amsgrad or "
            "decoupled weight decay. Use dana, which keeps all of the optimizer's state on each worker"
        )
    return optimizer
