"""The optimizer that lets the cluster carry out the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from danaz.torch.carried import UnsupportedOptimizerError, optimizers_of
from danaz.torch.joint import JointOptimizer, Member
from danaz.torch.optimizer_state import Rows, from_torch
from danaz.vectors.model import FlatModel
from danaz.worker.core import Loss
from danaz.worker.group import Group


class DistributedOptimizer(torch.optim.Optimizer):
    """Replaces the optimizer that it wraps; it reads lr, weight decay and groups from that one at each step.

    When ``backward()`` has returned, every ``p.grad`` is the mean over the worker's ranks. ``step()`` pushes it, and
    puts the next view into the model. It takes ``loss=`` (the mean over this rank's samples) for the run's records.
    As in torch, a parameter without a gradient makes no step, and changes that the script itself makes to a parameter
    persist.
    """

    _step_supports_amp_scaling = True  # a GradScaler then lets step() decide what to do about an overflow

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        group: Group,
        backward_passes_per_step: int = 1,
        replicated: bool = False,
    ):
        """``replicated`` says that each rank applies the update itself, so that all ranks need the same gradient.

        Raises UnsupportedOptimizerError, and ValueError for parameters that danaz cannot train.
        """
        if backward_passes_per_step < 1:
            raise ValueError(f"backward_passes_per_step is {backward_passes_per_step}; expected 1 or more")
        self.wrapped = optimizer
        self.optimizers = optimizers_of(optimizer)
        self.member = Member(optimizer, model, self.optimizers, optimizer.step, backward_passes_per_step)
        self.joint = JointOptimizer([self.member], self.optimizers, group, replicated)  # of all optimizers so far
        self.loaded: tuple[Rows, list[float]] | None = None  # a state to begin with, in torch's form, and its rates
        self._groups = len(optimizer.param_groups)
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._refuse_the_wrapped_one()

    def _refuse_the_wrapped_one(self) -> None:
        """Refuse to step the wrapped optimizer, which would move this rank alone, or to add a group to it later."""

        def step(*_: Any, **__: Any) -> None:
            raise RuntimeError(
                "step() was called on the optimizer that was given to DistributedOptimizer. Call it on the one that "
                "DistributedOptimizer returned: optimizer = danaz.DistributedOptimizer(optimizer, model)"
            )

        step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # a scheduler may belong to either optimizer
        self.wrapped.step = step  # type: ignore[assignment, method-assign]
        self.wrapped.add_param_group = self.add_param_group  # type: ignore[method-assign]

    @property
    def flat(self) -> FlatModel:
        """The model, in vectors, with the parameters of all optimizers of the script."""
        return self.joint.flat

    # ---- what every optimizer of torch has -----------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group that the wrapped optimizer had from the start.

        Raises UnsupportedOptimizerError for another one, because the layout of the vectors is fixed.
        """
        if len(self.param_groups) >= self._groups:
            raise UnsupportedOptimizerError(
                "add_param_group() was called after danaz.DistributedOptimizer, but the cluster lays the parameters "
                "out once. Give the optimizer all parameters from the start, and freeze those that are to train later "
                "with p.requires_grad_(False): a parameter without a gradient makes no step."
            )
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the options of the groups and, before training begins, the state: momentum buffers and the like.

        The run begins with that state if the algorithm keeps it where it can be set; otherwise danaz warns that it
        begins without. Raises UnsupportedOptimizerError for a state when training has begun, and ValueError for what
        an optimizer of another class or over other parameters has saved.
        """
        if self.joint.makes_own_steps:
            with self.flat.as_float32():  # torch gives the state the types of the parameters
                self.wrapped.load_state_dict(state_dict)
            self.param_groups = self.wrapped.param_groups
            return
        saved = state_dict["param_groups"]
        rows = {number: row for number, row in state_dict["state"].items() if any(v is not None for v in row.values())}
        if rows and (self.joint.was_stepped or self.joint.was_passed_over):
            raise UnsupportedOptimizerError(
                "load_state_dict() was given momentum buffers when training had begun: the cluster's momentum lives in "
                "its workers and server, and goes on. Load before the first batch, or set state_dict['state'] = {}"
            )
        found, expected = ([len(group["params"]) for group in groups] for groups in (saved, self.param_groups))
        if found != expected:
            raise ValueError(
                f"load_state_dict() was given parameter groups of {found} parameters, expected {expected}: load what "
                "an optimizer with the same groups has saved"
            )
        rates = [float(group["lr"]) for group in saved]
        first = self.joint.numbers_of(self.member).start
        ours = {first + number: row for number, row in rows.items()}
        from_torch(ours, self.joint.optimizers, self.flat.layout, self.joint.rates)  # this raises an error if none fits
        for group, values in zip(self.param_groups, saved, strict=True):
            group.update({name: value for name, value in values.items() if name != "params"})
        self.loaded = (rows, rates) if rows else None

    def hand_over_loaded(self) -> None:
        """Give a state that was loaded to the wrapped optimizer, if that one makes its steps itself by now."""
        if self.loaded is not None and self.joint.makes_own_steps:
            (rows, _), self.loaded = self.loaded, None
            with self.flat.as_float32():
                self.wrapped.load_state_dict({**self.wrapped.state_dict(), "state": rows})

    def state_dict(self) -> dict[str, Any]:
        """Return the options of the groups, and the state in torch's form, as far as this rank has it at hand.

        The first rank of a worker has the state that its worker keeps, or a server core in its own process.
        """
        if self.joint.makes_own_steps:
            return self.wrapped.state_dict()
        rows = self.joint.state_rows(self.member)
        return {**super().state_dict(), "state": rows if rows is not None else self.loaded[0] if self.loaded else {}}

    @property
    def rates(self) -> list[float]:
        """The learning rate η of each parameter group, as the script has set it now."""
        return [float(group["lr"]) for group in self.param_groups]

    # ---- a step --------------------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        """Make every ``p.grad`` the mean over the ranks now. Otherwise ``backward()`` does so in its last pass."""
        self.joint.exchange.settle()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss: float | Tensor | None = None) -> Any:
        """Make one update of this worker. Returns the closure's result, if a closure is given.

        If a GradScaler has found an overflow, or another rank has skipped the batch, no rank makes a step. With several
        optimizers, the update is made once all have made their steps on the batch, or the loop has gone on from it.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = loss = closure()
        # A GradScaler leaves it to us to divide the gradients by its scale, if the script has not called unscale_().
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        overflow = found_inf is not None and bool(found_inf)
        self.joint.step(self.joint.members.index(self.member), kept_loss(loss), scale, overflow)
        # A scheduler that was made for the wrapped optimizer checks whether that optimizer has stepped.
        self.wrapped._opt_called = True  # type: ignore[attr-defined]
        return result


def kept_loss(loss: Loss) -> Loss:
    """Return the loss as it is now. On a GPU it is a copy to read later, because a read waits for all of backward."""
    if not isinstance(loss, Tensor):
        return loss
    return loss.item() if loss.device.type == "cpu" else loss.detach().to(torch.float64, copy=True)
