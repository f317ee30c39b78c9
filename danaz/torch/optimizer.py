"""The optimizer that lets the cluster carry out the user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from danaz.optimizers import Own
from danaz.torch.carried import UnsupportedOptimizerError, decayed_gradient, optimizers_of, warn_if_not_nesterov
from danaz.torch.exchange import GradientExchange, Verdict
from danaz.torch.optimizer_state import Rows, from_torch
from danaz.vectors.cutting import Spans, all_finite
from danaz.vectors.model import FlatModel
from danaz.worker.core import Loss
from danaz.worker.group import Group


class Updates(Protocol):
    """The object that carries out the optimizer's steps."""

    def is_edited(self) -> bool:
        """Return whether the script has changed parameters since the last step; only the rank that speaks can tell."""

    def push(self, grad: Tensor, absent: Spans, verdict: Verdict) -> None:
        """Carry out the step that ``verdict`` allows, along ``grad`` f32[P]. The ``absent`` spans stay as they are."""

    def applied_lr(self, lr: list[float]) -> list[float]:
        """Return the rates at which the cluster makes a step, if those of the script are ``lr``."""

    def skip(self) -> None:
        """Count the batch as used, without a step."""

    def state_rows(self, loaded: Rows) -> Rows:
        """Return the optimizer's state in torch's form, as far as this rank has it: ``loaded`` before the run."""

    def end(self) -> None:
        """Note that the ranks leave the run and make no more steps."""


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
        self.optimizers = optimizers_of(optimizer)
        warn_if_not_nesterov(optimizer)
        self.flat = FlatModel(model, [group["params"] for group in optimizer.param_groups])
        self.exchange = GradientExchange(self.flat, group, backward_passes_per_step, alike=replicated)
        self._group = group
        self._replicated = replicated and group.size > 1
        self.wrapped = optimizer
        self._own_step = optimizer.step if isinstance(self.optimizers[0], Own) else None
        self.loaded: tuple[Rows, list[float]] | None = None  # a state to begin with, in torch's form, and its rates
        self._updates: Updates | None = None
        self.was_stepped = False  # whether the script has called step()
        self.was_passed_over = False  # whether the script has gone on from a batch without step()
        self._watches: list[Any] = []  # handles of the hooks that look for the gradient of a skipped batch
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

    def connect(self, updates: Updates) -> None:
        """Let ``updates`` carry out the steps of this optimizer."""
        self._updates = updates

    # ---- what every optimizer of torch has -----------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group that the wrapped optimizer had from the start.

        Raises UnsupportedOptimizerError for another one, because the layout of the vectors is fixed.
        """
        if len(self.param_groups) >= len(self.flat.layout.groups):
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
        if self._own_step is not None:
            self.wrapped.load_state_dict(state_dict)
            self.param_groups = self.wrapped.param_groups
            return
        saved = state_dict["param_groups"]
        rows = {number: row for number, row in state_dict["state"].items() if any(v is not None for v in row.values())}
        if rows and (self.was_stepped or self.was_passed_over):
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
        from_torch(rows, self.optimizers, self.flat.layout, rates)  # this raises an error if the state does not fit
        for group, values in zip(self.param_groups, saved, strict=True):
            group.update({name: value for name, value in values.items() if name != "params"})
        self.loaded = (rows, rates) if rows else None

    def state_dict(self) -> dict[str, Any]:
        """Return the options of the groups, and the state in torch's form, as far as this rank has it at hand.

        The first rank of a worker has the state that its worker keeps, or a server core in its own process.
        """
        if self._own_step is not None:
            return self.wrapped.state_dict()
        rows = self.loaded[0] if self.loaded else {}
        return {**super().state_dict(), "state": rows if self._updates is None else self._updates.state_rows(rows)}

    @property
    def rates(self) -> list[float]:
        """The learning rate η of each parameter group, as the script has set it now."""
        return [float(group["lr"]) for group in self.param_groups]

    # ---- a step --------------------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        """Make every ``p.grad`` the mean over the ranks now. Otherwise ``backward()`` does so in its last pass."""
        self.exchange.settle()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss: float | Tensor | None = None) -> Any:
        """Make one update of this worker. Returns the closure's result, if a closure is given.

        If a GradScaler has found an overflow, or another rank has skipped the batch, no rank makes a step.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = loss = closure()
        if self._updates is None:
            raise RuntimeError(
                "optimizer.step() was called outside of danaz.shard: call it once for each batch of "
                "`for batch in danaz.shard(loader, epoch)`"
            )
        self.was_stepped = True
        self._check_unchanged()
        self.exchange.settle()
        overflow = self._unscale()
        verdict = self._conclude(kept_loss(loss), steps=not overflow)
        if verdict.ends:
            self._updates.end()
        elif verdict.skips:
            self._updates.skip()
        else:
            if self._replicated and not verdict.alike:
                self._take_over_rank_0s()
            if self._own_step is None:
                self._updates.push(decayed_gradient(self.flat, self.param_groups), self.flat.absent, verdict)
            else:
                moved = self._try_own_step(self._own_step, self._updates.applied_lr(verdict.lr))
                self._updates.push(moved, (), verdict)  # it may also move parameters that have no gradient
        # A scheduler that was made for the wrapped optimizer checks whether that optimizer has stepped.
        self.wrapped._opt_called = True  # type: ignore[attr-defined]
        return result

    def _try_own_step(self, own_step: Callable[[], Any], lr: list[float]) -> Tensor:
        """Return how far the user's own optimizer moves the parameters at the rates ``lr``, f32[P], and move them back.

        Rank 0 makes the step for all ranks, so that they stay the same, whatever the step depends on. A gradient that
        is not finite is returned as it is: the push will be refused, and the optimizer's state must not take it in.
        """
        flat, groups = self.flat, self.wrapped.param_groups
        before, rates = flat.params.clone(), [group["lr"] for group in groups]
        for number, parameter in enumerate(flat.trained):
            parameter.grad = flat.grad_views[number] if flat.has_gradient[number] else None
        moved = flat.decayed
        try:
            is_sound = all_finite(flat.grads)
            if self._group.rank == 0 and is_sound:
                for group, rate in zip(groups, lr, strict=True):
                    group["lr"] = rate
                own_step()
        finally:  # also after an error, which the script may catch
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
            flat.bring_home()
            torch.sub(flat.params, before, out=moved)
            flat.params.copy_(before)
        if not is_sound:
            moved.copy_(flat.grads)
        if self._replicated:
            self._group.broadcast(own_step=moved)
        return moved

    def _conclude(self, loss: Loss, *, steps: bool) -> Verdict:
        assert self._updates is not None
        self.flat.bring_home()
        edited = self._replicated and self._updates.is_edited()
        return self.exchange.conclude(self.rates, loss, steps=steps, edited=edited)

    def _check_unchanged(self) -> None:
        """Raise UnsupportedOptimizerError if the script has changed what must stay the same during the run."""
        for number, (was, now) in enumerate(zip(self.optimizers, optimizers_of(self.wrapped), strict=True)):
            if was == now:
                continue
            changed = [name for name in asdict(was) if getattr(was, name) != getattr(now, name)]
            before, after = (", ".join(f"{name} {getattr(each, name):g}" for name in changed) for each in (was, now))
            raise UnsupportedOptimizerError(
                f"parameter group {number} had {before} when the optimizer was wrapped, and has {after} now; the "
                "cluster keeps one optimizer, and looks ahead along one momentum, for the whole run. Leave it as it "
                "is; a scheduler that would cycle it takes an option: OneCycleLR(…, cycle_momentum=False)"
            )

    def _unscale(self) -> bool:
        """Divide gradients by a GradScaler's scale if it left that to us; return whether it has found an overflow."""
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if scale is not None:
            self.exchange.gather()
            self.flat.grads.mul_(scale.double().reciprocal().to(self.flat.grads))
        return found_inf is not None and bool(found_inf)

    def _take_over_rank_0s(self) -> None:
        """Let all ranks go on with rank 0's gradients, after they have changed them differently."""
        flat = self.flat
        flat.summed[: len(flat.trained)].copy_(torch.tensor(flat.has_gradient, dtype=torch.float32))
        self._group.broadcast(final_grads=flat.summed)
        flat.has_gradient[:] = [bool(flag) for flag in flat.summed[: len(flat.trained)].tolist()]

    # ---- a batch without a step ----------------------------------------------------------------------------------

    def pass_over(self) -> None:
        """Note that the script has gone on to the next batch without ``step()``, so that no rank makes a step."""
        assert self._updates is not None
        self.was_passed_over = True
        if self._conclude(None, steps=False).ends:
            self._updates.end()
            return
        self._updates.skip()
        self._watch_for_accumulation()

    def _watch_for_accumulation(self) -> None:
        """Watch for the next backward, which tells whether the loop skipped a batch or meant to add batches up.

        In the second case, the gradients have not been cleared by then.
        """
        if not self._watches and any(p.grad is not None for p in self.flat.trained):
            watched, look = [p for p in self.flat.trained if p.requires_grad], self._look_for_accumulation
            self._watches = [p.register_hook(look) for p in watched]  # type: ignore[no-untyped-call]

    def _look_for_accumulation(self, _: Tensor) -> None:
        for watch in self._watches:
            watch.remove()
        self._watches.clear()
        if any(p.grad is not None and bool(p.grad.any()) for p in self.flat.trained):
            raise RuntimeError(
                "a batch of danaz.shard was not followed by optimizer.step(), and its gradient is still there while "
                "the next one's is added to it. One batch is one update. To make updates larger, raise the loader's "
                "batch_size; to save memory, split the batch in your loop, call backward() for each part, and step() "
                "once. To skip a batch, clear its gradient with optimizer.zero_grad()."
            )


def kept_loss(loss: Loss) -> Loss:
    """Return the loss as it is now. On a GPU it is a copy to read later, because a read waits for all of backward."""
    if not isinstance(loss, Tensor):
        return loss
    return loss.item() if loss.device.type == "cpu" else loss.detach().to(torch.float64, copy=True)
