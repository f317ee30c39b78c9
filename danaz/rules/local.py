"""Steps that a worker makes itself, with an optimizer state of its own."""

from __future__ import annotations

from torch import Tensor

from danaz.optimizers import Optimizers, Own, Scalars, Vectors
from danaz.rules.base import Context, Pushes, WorkerRule


def local_steps(
    optimizers: Optimizers,
    *,
    pushes: Pushes = "displacement",
    sync_period: int = 1,
    resets: bool = False,
    names_absent: bool = False,
) -> WorkerRule:
    """Return the rule of a worker that makes steps of ``optimizers`` between its pushes."""
    if isinstance(optimizers[0], Own):
        return OwnSteps(pushes=pushes, sync_period=sync_period, names_absent=names_absent)
    return LocalSteps(optimizers, pushes=pushes, sync_period=sync_period, resets=resets, names_absent=names_absent)


class OwnSteps(WorkerRule):
    """The user's own optimizer makes the steps: in place of the gradient comes how far it has moved the parameters."""

    def __init__(self, *, pushes: Pushes = "displacement", sync_period: int = 1, names_absent: bool = False):
        self.pushes = pushes
        self.sync_period = sync_period
        self.names_absent = names_absent


class LocalSteps(WorkerRule):
    """The steps of torch's class of the optimizer: each gradient displaces the parameters by s.

    Some optimizers move Θ = θ + a, where a is the look-ahead of the state. So do all of them if the worker
    ``gives_back``. Then a gradient displaces Θ by s + a′ − a, with a before and a′ after it. For SGD, this is
    −η(γv′ + g) + γ(ηᵢ − η)v. The last term is zero while η is constant. It makes the displacement exact when η changes;
    Algorithm 4 of the DANA paper leaves it out, and torch, too, and so does ``lr_correction=False``.
    """

    def __init__(
        self,
        optimizers: Optimizers,
        *,
        pushes: Pushes = "displacement",
        lr_correction: bool = False,
        sync_period: int = 1,
        resets: bool = False,
        gives_back: bool = False,
        names_absent: bool = False,
    ):
        self.optimizers = optimizers
        self.worker_state = optimizers.state
        self.needs_view = optimizers.needs_view
        self.pushes = pushes
        self.lr_correction = lr_correction
        self.sync_period = sync_period
        self.resets = resets
        self.gives_back = gives_back
        self.names_absent = names_absent

    def push(self, out: Tensor, grad: Tensor, old: Vectors, new: Vectors, ctx: Context) -> None:
        optimizer, after = self.optimizers.of(ctx.group), Scalars(ctx.lr, ctx.own_count + 1)
        if self.gives_back or optimizer.steps_look_ahead:
            before = Scalars(ctx.own_lr if self.lr_correction else ctx.lr, ctx.own_count)
            optimizer.displace(out, grad, old, new, after, before, old.get("view"))
        else:
            optimizer.advance(out, grad, old, new, after, old.get("view"))

    def give_back(self, out: Tensor, state: Vectors, ctx: Context) -> None:
        """−a."""
        optimizer = self.optimizers.of(ctx.group)
        out.zero_()
        optimizer.add_heading(out, state, Scalars(ctx.own_lr, ctx.own_count), optimizer.momentum)
