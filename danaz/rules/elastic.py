"""Elastic averaging: workers explore on their own, tied to a centre by a spring (Zhang et al., NIPS 2015)."""

from __future__ import annotations

from torch import Tensor

from danaz.optimizers import Optimizers, Vectors
from danaz.rules.base import Context, Rule, algorithm, sgd_unless
from danaz.rules.local import local_steps

PAPER = "Zhang, Choromanska, LeCun, NIPS 2015, arXiv 1412.6651"
SYNC_PERIOD = 10  # local steps between exchanges
BETA = 0.9


class Elastic(Rule):
    """e = α(xᵢ − x̃); xᵢ ← xᵢ − e; x̃ ← x̃ + e, with α = β/N. The worker gets its own xᵢ back, drawn to the centre.

    A worker with momentum pushes the look-ahead xᵢ + a, which is what torch calls its parameters. Zhang et al. exchange
    xᵢ itself.
    """

    worker_state = ("local",)  # xᵢ after the exchange

    def __init__(self, optimizers: Optimizers, sync_period: int):
        self.worker_rule = local_steps(optimizers, pushes="parameters", sync_period=sync_period)

    def apply(self, params: Tensor, push: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        pull = push.sub(params).mul_(BETA / ctx.workers)  # e
        own["local"].copy_(push).sub_(pull)
        params.add_(pull)

    def enter(self, own: Vectors, params: Tensor) -> None:
        own["local"].copy_(params)

    def view(self, out: Tensor, params: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        out.copy_(own["local"])


@algorithm("easgd", paper=PAPER, takes_own=True)
def easgd(sync_period: int = SYNC_PERIOD, optimizer: Optimizers | None = None) -> Rule:
    """Elastic averaging SGD: local SGD steps, then a pull towards the centre."""
    return Elastic(sgd_unless(optimizer).without_momentum(), sync_period)


@algorithm("eamsgd", paper=PAPER)
def eamsgd(momentum: float = 0.9, sync_period: int = SYNC_PERIOD, optimizer: Optimizers | None = None) -> Rule:
    """Elastic averaging SGD with Nesterov momentum on each worker."""
    return Elastic(sgd_unless(optimizer, momentum), sync_period)
