"""DiLoCo: each worker makes many local steps, and an outer optimizer on the server steps along what they have moved.

Douillard et al., DiLoCo: Distributed Low-Communication Training of Language Models, arXiv 2311.08105. Without rounds:
Liu et al., Asynchronous Local-SGD Training for Language Modeling, arXiv 2401.09135.

The inner optimizer is the user's own, and its state stays on its worker from push to push. The outer one is SGD with
Nesterov momentum, at a rate ε and with a momentum β of its own. D is the displacement that K local steps have made.
Workers compute on θ itself, which looks ahead as the parameters of torch.optim.SGD(nesterov=True) do.
"""

from __future__ import annotations

from torch import Tensor

from danaz.optimizers import Optimizers, Vectors
from danaz.rules.averaging import SYNC_PERIOD
from danaz.rules.base import Context, HyperparameterError, Rule, WorkerRule, algorithm, sgd_unless
from danaz.rules.local import local_steps

OUTER_LR, OUTER_MOMENTUM = 0.7, 0.9  # as in both papers


class Outer(Rule):
    """θ ← θ + εD/N, for each push of one of N workers; with a barrier, θ ← θ + εD for the mean D of a round."""

    def __init__(self, worker_rule: WorkerRule, lr: float, momentum: float):
        """Raises HyperparameterError for numbers with which no training converges."""
        if not lr > 0:
            raise HyperparameterError(f"outer_lr is {lr!r}; a number above 0 was expected")
        if not 0 <= momentum < 1:
            raise HyperparameterError(f"outer_momentum is {momentum!r}; a number from 0 to below 1 was expected")
        self.worker_rule = worker_rule
        self.lr = lr  # ε
        self.momentum = momentum  # β

    def apply(self, params: Tensor, push: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        moved = push if self.barrier else push / ctx.workers
        params.add_(moved, alpha=self.lr)
        self.accelerate(params, moved, own, shared, ctx)

    def accelerate(self, params: Tensor, moved: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        """Add what the momentum makes of ``moved`` f32[n], which is D/N, or the mean D of a round."""

    def _lead(self, params: Tensor, velocity: Tensor, moved: Tensor) -> None:
        """v ← βv + ``moved``; θ ← θ + εβv."""
        velocity.mul_(self.momentum).add_(moved)
        params.add_(velocity, alpha=self.lr * self.momentum)


class OuterNesterov(Outer):
    """v ← βv + D/N; θ ← θ + ε(D/N + βv), with one v."""

    shared_state = ("velocity",)

    def accelerate(self, params: Tensor, moved: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        self._lead(params, shared["velocity"], moved)


class OuterDana(Outer):
    """vᵢ ← βvᵢ + D/N; θ ← θ + ε(D/N + βvᵢ), with a velocity for each worker.

    In these variables, that is DANA: θ is the position to which the momentum of all workers is about to lead.
    """

    worker_state = ("velocity",)

    def accelerate(self, params: Tensor, moved: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        self._lead(params, own["velocity"], moved)


class DelayedNesterov(Outer):
    """b ← b + D/N; θ ← θ + εD/N; after every N-th push also v ← βv + b, θ ← θ + εβv, b ← 0.

    Algorithm 3 of Liu et al., with their default c = 0 of the share of the momentum that each push applies.
    """

    shared_state = ("velocity", "buffer")

    def accelerate(self, params: Tensor, moved: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        buffer = shared["buffer"].add_(moved)
        if (ctx.shared_count + 1) % ctx.workers == 0:
            self._lead(params, shared["velocity"], buffer)
            buffer.zero_()


class Diloco(OuterNesterov):
    barrier = True


OUTER: dict[str, type[Outer]] = {
    "asgd": Outer,
    "nag-asgd": OuterNesterov,
    "delayed-nesterov": DelayedNesterov,
    "dana": OuterDana,
}


@algorithm("diloco", paper="Douillard et al., arXiv 2311.08105", takes_own=True)
def diloco(
    momentum: float = 0.9,
    sync_period: int = SYNC_PERIOD,
    outer_lr: float = OUTER_LR,
    outer_momentum: float = OUTER_MOMENTUM,
    optimizer: Optimizers | None = None,
) -> Rule:
    """DiLoCo: local steps of your optimizer in rounds; Nesterov momentum along the mean displacement."""
    inner = local_steps(sgd_unless(optimizer, momentum), sync_period=sync_period, names_absent=True)
    return Diloco(inner, outer_lr, outer_momentum)


@algorithm("async-diloco", paper="Liu et al., arXiv 2401.09135", takes_own=True, choices={"outer": tuple(OUTER)})
def async_diloco(
    momentum: float = 0.9,
    sync_period: int = SYNC_PERIOD,
    outer: str = "delayed-nesterov",
    outer_lr: float = OUTER_LR,
    outer_momentum: float = OUTER_MOMENTUM,
    optimizer: Optimizers | None = None,
) -> Rule:
    """DiLoCo without rounds: each displacement counts 1/N, along a momentum that `outer` chooses."""
    inner = local_steps(sgd_unless(optimizer, momentum), sync_period=sync_period, names_absent=True)
    return OUTER[outer](inner, outer_lr, outer_momentum)
