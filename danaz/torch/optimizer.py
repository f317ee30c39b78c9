"""The optimizer that lets the cluster carry out the user's own torch.optim.SGD."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from danaz.vectors.cutting import Spans
from danaz.vectors.model import FlatModel
from danaz.worker.core import Loss
from danaz.worker.group import Group

BUCKET_FLOATS = 1 << 20  # 4 MB: long enough to use the wire well, short enough to begin while backward still runs
MARK_PARTS = 5


class UnsupportedOptimizerError(TypeError):
    """An optimizer that DANA cannot stand in for."""


def check_supported(optimizer: torch.optim.Optimizer) -> float:
    """Return the optimizer's momentum. Raises UnsupportedOptimizerError with the reason if danaz cannot replace it."""
    if type(optimizer) is not torch.optim.SGD:
        raise UnsupportedOptimizerError(
            f"danaz carries out torch.optim.SGD, not {type(optimizer).__name__}: the rules it implements are those of "
            "SGD with (Nesterov) momentum."
        )
    for key in ("dampening", "maximize"):
        if any(group[key] for group in optimizer.param_groups):
            raise UnsupportedOptimizerError(f"danaz cannot carry out SGD with {key}: no asynchronous rule has it.")
    momenta = {float(group["momentum"]) for group in optimizer.param_groups}
    if len(momenta) > 1:
        raise UnsupportedOptimizerError(
            f"all parameter groups must have the same momentum, these have {sorted(momenta)}: the server looks ahead "
            "along one sum of velocities."
        )
    if momenta != {0.0} and not all(group["nesterov"] for group in optimizer.param_groups):
        warnings.warn(
            "danaz trains with Nesterov momentum (DANA is built on it); nesterov=False is not kept", stacklevel=3
        )
    return momenta.pop()


@dataclass(frozen=True)
class Verdict:
    """What the ranks of a worker agree on at the end of a batch."""

    skips: int  # number of ranks that made no step; if there are any, the batch makes none
    loss: Loss  # mean over the batch
    lr: list[float]  # rank 0's rates, one for each parameter group
    edited: bool  # whether some rank's script has changed parameters since the last step
    alike: bool  # whether all ranks hold the same gradient, if that was asked for
    ends: bool = False  # whether a rank has asked to end the run; all ranks hear it in this step


class GradientExchange:
    """Makes ``p.grad`` the mean over the batch, on every rank, before ``backward()`` returns.

    The flat gradient is cut into buckets of neighbouring parameters. The sum of a bucket begins while backward still
    runs, as soon as all its gradients have arrived. The buckets are always summed in the same order (last parameters
    first), because torch.distributed requires that. A callback, which autograd calls at the end of backward, begins the
    remaining sums and waits for all of them. So everything that a loop does with gradients between backward and step
    (clip, unscale, log, add noise) sees the mean.

    The ranks move in step although each runs its own loop. A *round* is one sum of all buckets, and it ends with a
    vote. Each rank says one of three things: another backward is about to add to its gradient (then another round
    follows for all), or it is at its step, or its loop has skipped the step. Each rank's part is weighted with its
    share of the samples, and the shares add up to one. So summing a mean again changes nothing, and what a further
    backward has added is replaced by its mean.
    """

    def __init__(self, flat: FlatModel, group: Group, passes: int, alike: bool = False):
        """With ``alike``, the vote also finds out whether the gradients of all ranks are the same, bit for bit."""
        self.flat = flat
        self.group = group
        self.weight = 1.0 / group.size
        self.asks_to_end = False  # whether this rank asks that its worker leave the run
        self._passes = passes
        self._alike = alike
        self._buckets = _buckets(flat)
        self._bucket_of = {i: number for number, bucket in enumerate(self._buckets) for i in bucket}
        self._passes_done = 0
        self._open_round()
        if group.size > 1:
            for index, parameter in enumerate(flat.trained):
                _hook(parameter, partial(self._gradient_is_there, index))

    def _open_round(self) -> None:
        self._settled = False  # whether the gradients are means by now
        self._backward_runs = False
        self._missing = [len(bucket) for bucket in self._buckets]
        self._handles: list[Any] = []

    # ---- while backward runs -------------------------------------------------------------------------------------

    def _gradient_is_there(self, index: int, parameter: Tensor) -> None:
        if self._settled:
            self._vote(_Ballot(more=1))
            self._open_round()
        if not self._backward_runs:
            self._backward_runs = True
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)
        if self._passes_done % self._passes != self._passes - 1:
            return
        number = self._bucket_of[index]
        if number < len(self._handles):
            raise RuntimeError("a gradient was produced twice in one backward, after its sum over the ranks had begun")
        self._missing[number] -= 1
        while len(self._handles) < len(self._buckets) and not self._missing[len(self._handles)]:
            self._begin_next()

    def _backward_ended(self) -> None:
        self._backward_runs = False
        self._passes_done += 1
        if self._passes_done % self._passes == 0:
            self.settle()

    def _begin_next(self) -> None:
        number = len(self._handles)
        bucket, flat = self._buckets[number], self.flat
        flat.gather_gradients(bucket)
        entries = flat.layout.parameters
        grads = flat.grads[entries[bucket.start].start : entries[bucket.stop - 1].stop]
        # Fill with zeros instead of multiplying by zero: a rank without samples may hold anything, such as NaN.
        grads.mul_(self.weight) if self.weight else grads.zero_()
        if bucket.start == 0:  # the last bucket also carries the flags of which parameters have a gradient
            flags = torch.tensor(flat.has_gradient, dtype=torch.float32)
            flat.summed[: len(flags)].copy_(flags)
            grads = flat.summed[: entries[bucket.stop - 1].stop - flat.layout.size or None]
        self._handles.append(self.group.sum_async(grads, f"grads.{number}"))

    def settle(self) -> None:
        """Return when every ``p.grad`` is the mean over the batch. Each rank must call it, or its backward does."""
        if self._settled or self.group.size == 1:
            return
        while len(self._handles) < len(self._buckets):
            self._begin_next()
        for handle in self._handles:
            self.group.wait(handle)
        flat = self.flat
        if not all(flat.has_gradient):
            # If only other ranks have a gradient for a parameter, this rank takes it over, too.
            somewhere = flat.summed[: len(flat.trained)].tolist()
            for number in (number for number, ranks in enumerate(somewhere) if ranks):
                flat.has_gradient[number] = True
                flat.trained[number].grad = flat.grad_views[number]
        self._settled, self._backward_runs = True, False

    # ---- at the end of a batch -----------------------------------------------------------------------------------

    def conclude(self, lr: list[float], loss: Loss = None, *, steps: bool = True, edited: bool = False) -> Verdict:
        """Find out whether all ranks make a step. Afterwards their gradients are the batch's mean.

        Rank 0's rates count, because the ranks may have moved their schedules differently.
        """
        if self.group.size == 1:
            self.gather()
            return Verdict(int(not steps), loss, lr, edited, alike=True)
        share = 0.0 if loss is None else float(loss) * self.weight
        ballot = _Ballot(0, int(not steps), int(edited), int(loss is not None), share, lr, int(self.asks_to_end))
        while True:
            self.settle()
            self.gather()
            verdict, more = self._vote(ballot)
            self._open_round()
            if not more:
                self._passes_done = 0
                return verdict

    def gather(self) -> None:
        """Bring all gradients into the flat vector."""
        self.flat.gather_gradients(range(len(self.flat.trained)))  # the user may have replaced some since backward

    def _vote(self, ballot: _Ballot) -> tuple[Verdict, int]:
        """Return the ranks' common verdict, and the number of ranks that are about to add to their gradients."""
        rates = ballot.lr or [0.0] * len(self.flat.layout.groups)
        counted = rates if self.group.rank == 0 else [0.0] * len(rates)
        mark = _mark(self.flat) if self._alike and not ballot.more else [0.0] * MARK_PARTS
        counts = [ballot.more, ballot.skips, ballot.edited, ballot.ends, ballot.has_loss]
        # The votes are float32 like the gradients, so that Horovod can sum both in one go.
        votes = torch.tensor([*counts, ballot.loss, *mark, *(part for rate in counted for part in _parts(rate))])
        self.group.wait(self.group.sum_async(votes, "votes"))
        more, skips, edited, ends, has_loss, loss, *rest = votes.tolist()
        marks, parts = rest[:MARK_PARTS], rest[MARK_PARTS:]
        lr = [sum(parts[i : i + 3]) for i in range(0, len(parts), 3)]
        alike = marks == [self.group.size * part for part in mark]
        mean_loss = loss if has_loss else None
        return Verdict(int(skips), mean_loss, lr, bool(edited), alike, bool(ends)), int(more)


@dataclass(frozen=True)
class _Ballot:
    """The vote of one rank at the end of a round."""

    more: int = 0
    skips: int = 0
    edited: int = 0
    has_loss: int = 0
    loss: float = 0.0
    lr: Sequence[float] = ()
    ends: int = 0


def _hook(parameter: nn.Parameter, hook: Callable[[Tensor], None]) -> None:
    """Call ``hook`` with the parameter when its gradient has arrived, even if it is frozen now and trains later."""
    frozen = not parameter.requires_grad
    parameter.requires_grad_(True)
    parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    parameter.requires_grad_(not frozen)


def _mark(flat: FlatModel) -> list[float]:
    """Return a checksum of the gradient's bits and of which parameters have a gradient.

    Ranks whose checksums agree hold the same gradient. It comes as 5 whole numbers of 12 bits, because float32 then
    holds the sum of the marks of 4,096 ranks exactly.
    """
    bits = int(flat.grads.view(torch.int32).sum(dtype=torch.int64))
    bits += sum(7919 * number for number, has_gradient in enumerate(flat.has_gradient) if has_gradient)
    return [float(bits >> 12 * part & 0xFFF) for part in range(MARK_PARTS)]


def _parts(value: float) -> list[float]:
    """Return three float32 that add up to the float64 ``value``: 3 x 24 bits hold its 53 bits."""
    parts = []
    for _ in range(3):
        part = float(np.float32(value))
        parts.append(part)
        value -= part
    return parts


def _buckets(flat: FlatModel) -> list[range]:
    """Return the buckets as ranges of parameter numbers, from the last parameters to the first."""
    buckets, stop, floats = [], len(flat.trained), 0
    for index in reversed(range(len(flat.trained))):
        floats += flat.trained[index].numel()
        if floats >= BUCKET_FLOATS or index == 0:
            buckets.append(range(index, stop))
            stop, floats = index, 0
    return buckets


class Updates(Protocol):
    """The object that carries out the optimizer's steps."""

    def is_edited(self) -> bool:
        """Return whether the script has changed parameters since the last step; only the rank that speaks can tell."""

    def push(self, grad: Tensor, absent: Spans, verdict: Verdict) -> None:
        """Carry out the step that ``verdict`` allows, along ``grad`` f32[P]. The ``absent`` spans stay as they are."""

    def skip(self) -> None:
        """Count the batch as used, without a step."""

    def end(self) -> None:
        """Note that the ranks leave the run and make no more steps."""


class DistributedOptimizer(torch.optim.Optimizer):
    """Replaces the SGD optimizer that it wraps; it reads lr, weight decay and groups from that one at each step.

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
        self.momentum = check_supported(optimizer)
        self.flat = FlatModel(model, [group["params"] for group in optimizer.param_groups])
        self.exchange = GradientExchange(self.flat, group, backward_passes_per_step, alike=replicated)
        self._group = group
        self._replicated = replicated and group.size > 1
        self.wrapped = optimizer
        self._updates: Updates | None = None
        self.was_stepped = self.was_passed_over = False  # whether any batch so far was, or was not, followed by step()
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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises UnsupportedOptimizerError, because wrapping the optimizer fixes the layout of the vectors."""
        if hasattr(self, "_updates") and len(self.param_groups) >= len(self.flat.layout.groups):
            raise UnsupportedOptimizerError(
                "add_param_group() after DistributedOptimizer: the cluster lays the parameters out once. Give the "
                "optimizer all parameters from the start, and freeze those that are to train later with "
                "p.requires_grad_(False): a parameter without a gradient makes no step."
            )
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over rates and other options of the groups. Raises UnsupportedOptimizerError for a momentum buffer."""
        saved = state_dict["param_groups"]
        if any(state.get("momentum_buffer") is not None for state in state_dict["state"].values()):
            raise UnsupportedOptimizerError(
                "load_state_dict() with momentum buffers: the cluster's momentum lives in its workers and server, and "
                "cannot be taken over from one optimizer. Load the groups alone: state_dict['state'] = {}"
            )
        if [len(group["params"]) for group in saved] != [len(group["params"]) for group in self.param_groups]:
            raise ValueError("load_state_dict(): the saved optimizer has other parameter groups")
        for group, values in zip(self.param_groups, saved, strict=True):
            group.update({name: value for name, value in values.items() if name != "params"})

    @property
    def rates(self) -> list[float]:
        """The learning rate η of each parameter group, as the script has set it now."""
        return [float(group["lr"]) for group in self.param_groups]

    def synchronize(self) -> None:
        """Make every ``p.grad`` the mean over the ranks now. ``backward()`` does so after its last pass."""
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
                "optimizer.step() outside of danaz.shard: iterate `for batch in danaz.shard(loader, epoch)`"
            )
        self.was_stepped = True
        self._check_momentum()
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
            grad = decayed_gradient(self.flat, self.param_groups)
            self._updates.push(grad, self.flat.absent, verdict)
        # A scheduler that was made for the wrapped optimizer checks whether that optimizer has stepped.
        self.wrapped._opt_called = True  # type: ignore[attr-defined]
        return result

    def pass_over(self) -> None:
        """Note that the script has gone on to the next batch without ``step()``, so that no rank makes a step."""
        assert self._updates is not None
        self.was_passed_over = True
        if self._conclude(None, steps=False).ends:
            self._updates.end()
            return
        self._updates.skip()
        self._watch_for_accumulation()

    def _conclude(self, loss: Loss, *, steps: bool) -> Verdict:
        assert self._updates is not None
        self.flat.bring_home()
        edited = self._replicated and self._updates.is_edited()
        return self.exchange.conclude(self.rates, loss, steps=steps, edited=edited)

    def _check_momentum(self) -> None:
        momenta = {float(group["momentum"]) for group in self.param_groups}
        if momenta != {self.momentum}:
            raise UnsupportedOptimizerError(
                f"the momentum was {self.momentum:g} when the optimizer was wrapped, and is "
                f"{', '.join(f'{value:g}' for value in sorted(momenta))} now; the cluster looks ahead along one "
                "momentum for the whole run. A scheduler that cycles it can leave it alone: "
                "OneCycleLR(…, cycle_momentum=False)"
            )

    def _unscale(self) -> bool:
        """Divide gradients by a GradScaler's scale if it has not done so; return whether it has found an overflow."""
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if scale is not None:
            self.exchange.gather()
            self.flat.grads.mul_(scale.double().reciprocal().to(self.flat.grads))
        return found_inf is not None and bool(found_inf)

    def _take_over_rank_0s(self) -> None:
        """The ranks have changed their gradients differently: let all of them go on with rank 0's."""
        flat = self.flat
        flat.summed[: len(flat.trained)].copy_(torch.tensor(flat.has_gradient, dtype=torch.float32))
        self._group.broadcast(final_grads=flat.summed)
        flat.has_gradient[:] = [bool(flag) for flag in flat.summed[: len(flat.trained)].tolist()]

    def _watch_for_accumulation(self) -> None:
        """Watch for the next backward.

        If the loop has not cleared the gradients by then, it meant to add up batches and not to skip one.
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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters."""
        super().zero_grad(set_to_none)


def kept_loss(loss: Loss) -> Loss:
    """Return the loss as it is now. On a GPU it is a copy to read later, because a read waits for all of backward."""
    if not isinstance(loss, Tensor):
        return loss
    return loss.item() if loss.device.type == "cpu" else loss.detach().to(torch.float64, copy=True)


def weight_decays(param_groups: Sequence[dict[str, Any]]) -> tuple[float, ...]:
    """Return the weight decay β of each parameter group."""
    return tuple(float(group["weight_decay"]) for group in param_groups)


@torch.no_grad()
def decayed_gradient(flat: FlatModel, param_groups: Sequence[dict[str, Any]]) -> Tensor:
    """Return g + βθ̂ f32[P], where β is each group's weight decay.

    The flat gradient itself stays as it is, because some loops accumulate gradients.
    """
    decays = weight_decays(param_groups)
    if not any(decays):
        return flat.grads
    for decay, (start, stop) in zip(decays, flat.layout.groups, strict=True):
        out = flat.decayed[start:stop]
        torch.add(flat.grads[start:stop], flat.params[start:stop], alpha=decay, out=out)
    return flat.decayed
