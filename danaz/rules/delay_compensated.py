"""Delay compensation: a first-order estimate of the gradient at the present parameters.

Zheng et al., Asynchronous Stochastic Gradient Descent with Delay Compensation, ICML 2017, arXiv 1609.08326: the
Hessian is approximated as λ g⊙g, so g at θ is about g + λ g⊙g⊙(θ − θ̂ᵢ).
"""

from __future__ import annotations

from torch import Tensor

from danaz.optimizers import Optimizers, Vectors
from danaz.rules.asgd import Asgd
from danaz.rules.base import Context, Rule, algorithm, sgd_unless
from danaz.rules.chain import Transform, chain
from danaz.rules.dana import DanaZero

PAPER = "Zheng et al., ICML 2017, arXiv 1609.08326"
DECAY = 0.95  # ρ of the adaptive form
EPSILON = 1e-7


class Compensate(Transform):
    """g ← g + λ g⊙g⊙(θ − θ̂ᵢ)."""

    needs_view = True

    def __init__(self, strength: float):
        self.strength = strength  # λ

    def before(self, grad: Tensor, params: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        grad.add_(params.sub(own["view"]).mul_(grad).mul_(grad), alpha=self.strength)


class CompensateAdaptively(Transform):
    """The same with λ = λ₀ / √(m + ε), m ← ρm + (1 − ρ)g², for each parameter."""

    needs_view = True
    shared_state = ("gradient_square",)  # m

    def __init__(self, strength: float):
        self.strength = strength  # λ₀

    def before(self, grad: Tensor, params: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        square = shared["gradient_square"].mul_(DECAY).addcmul_(grad, grad, value=1 - DECAY)
        correction = params.sub(own["view"]).mul_(grad).mul_(grad)
        grad.addcdiv_(correction, square.add(EPSILON).sqrt_(), value=self.strength)


@algorithm("dc-asgd", paper=PAPER)
def dc_asgd(strength: float = 0.04, optimizer: Optimizers | None = None) -> Rule:
    """ASGD on delay-compensated gradients, with a constant strength λ."""
    return chain(Compensate(strength), Asgd(sgd_unless(optimizer)))


@algorithm("dc-asgd-adaptive", paper=PAPER)
def dc_asgd_adaptive(strength: float = 2.0, optimizer: Optimizers | None = None) -> Rule:
    """ASGD on delay-compensated gradients, with a strength that follows the gradients' size."""
    return chain(CompensateAdaptively(strength), Asgd(sgd_unless(optimizer)))


@algorithm("dana-dc", paper=PAPER)
def dana_dc(momentum: float = 0.9, strength: float = 2.0, optimizer: Optimizers | None = None) -> Rule:
    """DANA-Zero on delay-compensated gradients."""
    return chain(Compensate(strength), DanaZero(sgd_unless(optimizer, momentum)))
