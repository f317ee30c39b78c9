"""Elastic averaging: workers explore on their own, tied to a centre by a spring (Zhang et al., NIPS 2015)."""

from __future__ import annotations

from torch import Tensor

from danaz.rules.asgd import LocalSgd
from danaz.rules.base import Context, Pushes, Rule, Vectors, WorkerRule, algorithm
from danaz.rules.dana import DanaWorker

PAPER = "Zhang, Choromanska, LeCun, NIPS 2015, arXiv 1412.6651"
SYNC_PERIOD = 10  # local steps between exchanges
BETA = 0.9


class ElasticSgd(LocalSgd):
    """x ← x − ηg on the worker; x is pushed."""

    pushes: Pushes = "parameters"


class ElasticNesterov(DanaWorker):
    """v ← γv + g; x ← x − η(γv + g) on the worker; x is pushed."""

    pushes: Pushes = "parameters"
    gives_back = False  # the centre is the model


class Elastic(Rule):
    """e = α(xᵢ − x̃); xᵢ ← xᵢ − e; x̃ ← x̃ + e, with α = β/N. The worker gets its own xᵢ back, drawn to the centre."""

    worker_state = ("local",)  # xᵢ after the exchange

    def __init__(self, worker_rule: WorkerRule):
        self.worker_rule = worker_rule

    def apply(self, params: Tensor, push: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        pull = push.sub(params).mul_(BETA / ctx.workers)  # e
        own["local"].copy_(push).sub_(pull)
        params.add_(pull)

    def enter(self, own: Vectors, params: Tensor) -> None:
        own["local"].copy_(params)

    def view(self, out: Tensor, params: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        out.copy_(own["local"])


@algorithm("easgd", paper=PAPER)
def easgd(sync_period: int = SYNC_PERIOD) -> Rule:
    """Elastic averaging SGD: local SGD steps, then a pull towards the centre."""
    return Elastic(ElasticSgd(sync_period))


@algorithm("eamsgd", paper=PAPER)
def eamsgd(momentum: float = 0.9, sync_period: int = SYNC_PERIOD) -> Rule:
    """Elastic averaging SGD with Nesterov momentum on each worker."""
    return Elastic(ElasticNesterov(momentum, lr_correction=False, sync_period=sync_period))
