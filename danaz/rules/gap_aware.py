"""Gap-aware updates: the further a parameter has moved, the less its gradient counts.

Barkai, Hakimi, Schuster: Gap-Aware Mitigation of Gradient Staleness, ICLR 2020, arXiv 1909.10802.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import torch
from torch import Tensor

from danaz.optimizers import Optimizers, Vectors
from danaz.rules.asgd import NagAsgd
from danaz.rules.base import Context, Rule, UnfitOptimizerError, algorithm, sgd_unless
from danaz.rules.chain import Transform, chain
from danaz.rules.dana import DanaZero

PAPER = "Barkai et al., ICLR 2020, arXiv 1909.10802"
DECAY = 0.999  # ρ
EPSILON = 1e-8


class DivideByGap(Transform):
    """g ← g / (1 + |θ − θ̂ᵢ| / C), with C = η_max (√(r / (1 − ρᵗ)) + ε) the average step of each parameter.

    r ← ρr + (1 − ρ)v² follows the velocity v just applied; the first update is not scaled.
    """

    needs_view = True
    shared_state = ("velocity_square",)  # r

    def before(self, grad: Tensor, params: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        if ctx.shared_count == 0 or ctx.max_lr == 0:
            return
        root = sqrt(1 - DECAY**ctx.shared_count)
        step = shared["velocity_square"].sqrt().add_(EPSILON * root)  # C √(1 − ρᵗ) / η_max, in few passes
        gap = params.sub(own["view"]).abs_()
        grad.div_(torch.addcdiv(grad.new_ones(()), gap, step, value=root / ctx.max_lr, out=gap))

    def after(self, velocity: Callable[[], Tensor], shared: Vectors, ctx: Context) -> None:
        v = velocity()
        shared["velocity_square"].mul_(DECAY).addcmul_(v, v, value=1 - DECAY)


@algorithm("ga", paper=PAPER)
def ga(momentum: float = 0.9, optimizer: Optimizers | None = None) -> Rule:
    """NAG-ASGD on gradients divided, parameter by parameter, by the gap in average steps."""
    return chain(DivideByGap(), NagAsgd(with_velocity("ga", sgd_unless(optimizer, momentum))))


@algorithm("dana-ga", paper=PAPER)
def dana_ga(momentum: float = 0.9, optimizer: Optimizers | None = None) -> Rule:
    """DANA-Zero on gradients divided, parameter by parameter, by the gap in average steps."""
    return chain(DivideByGap(), DanaZero(with_velocity("dana-ga", sgd_unless(optimizer, momentum))))


def with_velocity(name: str, optimizers: Optimizers) -> Optimizers:
    """Return ``optimizers``. Raises UnfitOptimizerError if one of them keeps no velocity to measure the gap by."""
    for optimizer in optimizers:
        if not optimizer.keeps_velocity:
            raise UnfitOptimizerError(
                f"{name} cannot carry out {optimizer.name} without momentum: it measures the gap in average steps, "
                "along the velocity that the momentum keeps"
            )
    return optimizers
