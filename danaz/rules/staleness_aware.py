"""Staleness-aware updates: the more updates a gradient missed, the less it counts (Zhang et al., IJCAI 2016)."""

from __future__ import annotations

from torch import Tensor

from danaz.optimizers import Optimizers
from danaz.rules.asgd import NagAsgd
from danaz.rules.base import Context, Rule, algorithm, sgd_unless
from danaz.rules.chain import chain, scale_gradient
from danaz.rules.dana import DanaZero

PAPER = "Zhang et al., Staleness-Aware Async-SGD, IJCAI 2016, arXiv 1511.05950"


def divide_by_lag(grad: Tensor, ctx: Context) -> None:
    """g ← g / max(1, τ)."""
    grad.div_(max(1, ctx.lag))


@algorithm("sa", paper=PAPER)
def sa(momentum: float = 0.9, optimizer: Optimizers | None = None) -> Rule:
    """NAG-ASGD on gradients divided by their lag."""
    return chain(scale_gradient(divide_by_lag), NagAsgd(sgd_unless(optimizer, momentum)))


@algorithm("dana-sa", paper=PAPER)
def dana_sa(momentum: float = 0.9, optimizer: Optimizers | None = None) -> Rule:
    """DANA-Zero on gradients divided by their lag."""
    return chain(scale_gradient(divide_by_lag), DanaZero(sgd_unless(optimizer, momentum)))
