"""All optimizers of a script as one: their parameters lie in one vector, and their steps on a batch make one update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from danaz.optimizers import Optimizers, Own
from danaz.torch.carried import UnsupportedOptimizerError, decayed_gradient, optimizers_of
from danaz.torch.exchange import GradientExchange, Verdict
from danaz.torch.optimizer_state import Rows
from danaz.torch.synchronized import synchronize
from danaz.vectors.cutting import Spans, all_finite, common_spans
from danaz.vectors.model import FlatModel
from danaz.worker.core import Loss
from danaz.worker.group import Group


class Updates(Protocol):
    """The object that carries out the optimizers' steps."""

    @property
    def moves_at_once(self) -> bool:
        """Whether one of several optimizers can move its parameters before the others have made their steps."""

    def is_edited(self) -> bool:
        """Return whether the script has changed parameters since the last step; only the rank that speaks can tell."""

    def move(self, grad: Tensor, absent: Spans, verdict: Verdict) -> None:
        """Make the step of one of several optimizers on this worker. ``push`` is to include it, when the batch ends."""

    def push(self, grad: Tensor | None, absent: Spans, verdict: Verdict) -> None:
        """End the batch by the step that ``verdict`` allows, along ``grad`` f32[P]. ``absent`` spans stay as they are.

        Without a gradient, the update is what has been moved.
        """

    def applied_lr(self, lr: list[float]) -> list[float]:
        """Return the rates at which the cluster makes a step, if those of the script are ``lr``."""

    def skip(self) -> None:
        """Count the batch as used, without a step."""

    def state_rows(self) -> Rows | None:
        """Return the optimizers' state in torch's form, as far as this rank has it; None before the run."""

    def end(self) -> None:
        """Note that the ranks leave the run and make no more steps."""


@dataclass(frozen=True)
class Member:
    """One of the script's optimizers, and the model that it came with."""

    wrapped: torch.optim.Optimizer
    model: nn.Module
    optimizers: Optimizers
    own_step: Callable[[], Any]
    passes: int = 1  # number of backwards before each step

    @property
    def size(self) -> int:
        """Number of its parameter tensors."""
        return sum(len(group["params"]) for group in self.wrapped.param_groups)


class _Batch:
    """What has become of the steps on the batch under way."""

    def __init__(self) -> None:
        self.called: set[int] = set()  # the optimizers whose step() the script has called on this rank
        self.ended: set[int] = set()  # those of which all ranks know whether they make their step
        self.stepped: set[int] = set()  # those that make it
        self.grad: Tensor | None = None  # f32[P], of those that make it when the batch ends
        self.absent: list[Spans] = []  # for each of these, what it does not move
        self.rates: dict[int, float] = {}  # parameter group -> its rate at the step of its optimizer
        self.losses: list[float | Tensor] = []
        self.edited = False
        self.sits_out = False  # whether this rank came to a later step than another one, and makes no more steps


class JointOptimizer:
    """Carries out the steps of all optimizers of a process; mostly that is one.

    Several optimizers (of a generator and its critic, say) share one flat vector, in the order in which they were
    wrapped, and one update of the cluster includes their steps on a batch. Each may make one; the update is made when
    all have, or when the loop goes on to the next batch. Where a worker's own steps are known on the worker, each
    optimizer moves its parameters there at once (``Updates.moves_at_once``), so that what the script computes for the
    next one sees them. Elsewhere its gradient is kept, and all move together at the end of the batch.

    If a rank skips one of the steps, its worker makes neither that step nor those that the rank comes to later in the
    batch.
    """

    def __init__(self, members: Sequence[Member], optimizers: Optimizers, group: Group, replicated: bool = False):
        """``optimizers`` are those of all parameter groups.

        ``replicated`` says that each rank applies the update itself, so that all ranks need the same gradient. Raises
        ValueError for parameters that danaz cannot train.
        """
        self.members = tuple(members)
        self.optimizers = optimizers
        # Of each member, the numbers of its parameters and of its parameter groups among those of all.
        self._numbers = _consecutive([member.size for member in members])
        self._groups = _consecutive([len(member.wrapped.param_groups) for member in members])
        model = self.models[0] if len(self.models) == 1 else nn.ModuleList(self.models)
        self.flat = FlatModel(model, [group["params"] for group in self.param_groups])
        passes = members[0].passes if len(members) == 1 else 1
        self.exchange = GradientExchange(self.flat, group, passes, alike=replicated, optimizers=len(members))
        self.exchange.channel = synchronize(model, group, self.flat.params.device)
        self.was_stepped = False  # whether the script has called step()
        self.was_passed_over = False  # whether the script has gone on from a batch without step()
        self._group = group
        self._replicated = replicated and group.size > 1
        self._updates: Updates | None = None
        self._batch = _Batch()
        self._watches: list[Any] = []  # handles of the hooks that look for the gradient of a skipped batch

    def connect(self, updates: Updates) -> None:
        """Let ``updates`` carry out the steps."""
        self._updates = updates

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all members."""
        return [group for member in self.members for group in member.wrapped.param_groups]

    @property
    def rates(self) -> list[float]:
        """The learning rate η of each parameter group, as the script has set it now."""
        return [float(group["lr"]) for group in self.param_groups]

    @property
    def makes_own_steps(self) -> bool:
        """Whether the script's optimizer objects make the steps, in place of the cluster's rule."""
        return isinstance(self.optimizers[0], Own)

    @property
    def models(self) -> list[nn.Module]:
        """The models that the members came with, each once."""
        return list(dict.fromkeys(member.model for member in self.members))

    def numbers_of(self, member: Member) -> range:
        """Return the numbers of a member's parameters among all of them."""
        return self._numbers[self.members.index(member)]

    def state_rows(self, member: Member) -> Rows | None:
        """Return a member's state in torch's form, as far as this rank has it; None before the run."""
        rows, numbers = None if self._updates is None else self._updates.state_rows(), self.numbers_of(member)
        return None if rows is None else {n - numbers.start: rows[n] for n in numbers if n in rows}

    def _span_of(self, number: int) -> tuple[int, int]:
        """Return where the parameters of a member lie in the flat vector."""
        entries, numbers = self.flat.layout.parameters, self._numbers[number]
        return entries[numbers[0]].start, entries[numbers[-1]].stop

    # ---- a step --------------------------------------------------------------------------------------------------

    def step(self, number: int, loss: Loss, scale: Tensor | None, overflow: bool) -> None:
        """Make the step of one member, if all ranks are at it, and none has an ``overflow``.

        ``scale`` is what a GradScaler has left in the gradients. Raises RuntimeError outside of a batch, and
        UnsupportedOptimizerError if the script has changed what must stay the same during the run.
        """
        if self._updates is None:
            raise RuntimeError(
                "optimizer.step() was called outside of danaz.shard: call it once for each batch of "
                "`for batch in danaz.shard(loader, epoch)`"
            )
        self.was_stepped = True
        self._check_unchanged(self.members[number])
        if self._was_skipped_by_others(number):
            return
        self.exchange.settle()
        if scale is not None:
            self.exchange.scale(scale.double().reciprocal(), *self._span_of(number))
        verdict = self._conclude(loss, at=number, steps=not overflow)
        if not self._ends_with(verdict) and verdict.at != number:
            # This rank has skipped a step that another is at, and their gradients have been mixed up.
            self._wait_for_others()
            self._batch.sits_out = True

    def _was_skipped_by_others(self, number: int) -> bool:
        """Return whether the ranks have agreed before that this member makes no step on this batch.

        Raises RuntimeError for a second step, if the first waits for the end of the batch.
        """
        batch = self._batch
        is_first, is_decided = number not in batch.called, number in batch.ended
        if not is_first and batch.grad is not None:
            raise RuntimeError(
                "optimizer.step() was called twice for one batch, before the other optimizers have made their steps: "
                "call it once for each batch of danaz.shard"
            )
        batch.called.add(number)
        return batch.sits_out or (is_first and is_decided)

    def begin_batch(self, weight: float) -> None:
        """Begin a batch, of which this rank has the share ``weight``."""
        self.exchange.weight = weight
        if self.exchange.channel is not None:
            self.exchange.channel.weight = weight
        self._batch = _Batch()

    def pass_over(self) -> None:
        """Note that the script has gone on to the next batch, with steps of some members or of none."""
        self.was_passed_over = True
        verdict = self._wait_for_others()
        if len(self.members) == 1 and not verdict.ends:
            self._watch_for_accumulation()

    def _wait_for_others(self) -> Verdict:
        """Make no more steps on this batch. Return the last verdict, with which all ranks have ended it."""
        while True:
            verdict = self._conclude(None, at=None, steps=False)
            if self._ends_with(verdict):
                return verdict
            if verdict.at is None:
                self._end_batch(verdict)
                return verdict

    def _conclude(self, loss: Loss, *, at: int | None, steps: bool) -> Verdict:
        assert self._updates is not None
        self.flat.bring_home()
        edited = self._replicated and self._updates.is_edited()
        return self.exchange.conclude(self.rates, loss, at=at, steps=steps, edited=edited)

    def _ends_with(self, verdict: Verdict) -> bool:
        """Do what the ranks have agreed on. Return whether the batch is over now."""
        assert self._updates is not None
        if verdict.ends:
            self._updates.end()
            return True
        if verdict.at is None:
            return False
        batch = self._batch
        batch.ended.add(verdict.at)
        if not verdict.skips:
            if self._replicated and not verdict.alike:
                self._take_over_rank_0s()
            if not self._step_of(verdict.at, verdict):  # an own step of the script's may raise an error
                return False
            batch.stepped.add(verdict.at)
            batch.edited = batch.edited or verdict.edited
            batch.rates |= {group: verdict.lr[group] for group in self._groups[verdict.at]}
        if len(batch.ended) < len(self.members):
            return False
        self._end_batch(verdict)
        return True

    def _step_of(self, number: int, verdict: Verdict) -> bool:
        """Move the parameters of a member, or keep its gradient until the batch ends.

        Return whether the step is made: it is not if the member's own step has raised an error on rank 0.
        """
        assert self._updates is not None
        batch, absent = self._batch, self.flat.absent_beside(self._numbers[number])
        start, stop = self._span_of(number)
        if self.makes_own_steps:
            moved = self._try_own_step(number, self._updates.applied_lr([1.0] * len(verdict.lr)))
            if moved is None:
                return False
            # It may also move parameters that have no gradient.
            grad, absent = moved, tuple(span for span in absent if not bool(moved[slice(*span)].any()))
        else:
            grad = decayed_gradient(self.flat, self.param_groups)
        batch.absent.append(absent)
        if len(self.members) > 1 and self._updates.moves_at_once and all_finite(grad[start:stop]):
            self._updates.move(grad, absent, verdict)  # it also takes the loss
            return True
        if verdict.loss is not None:
            batch.losses.append(verdict.loss)
        if len(self.members) == 1:
            batch.grad = grad
            return True
        # If it is not finite, the push of the whole batch will be refused, and the model must not show it before.
        batch.grad = torch.zeros_like(grad) if batch.grad is None else batch.grad
        batch.grad[start:stop].copy_(grad[start:stop])
        return True

    def _end_batch(self, verdict: Verdict) -> None:
        """Let the update be made, if any member makes a step."""
        assert self._updates is not None
        batch, self._batch = self._batch, _Batch()
        if not batch.stepped:
            self._updates.skip()
            return
        loss = sum(batch.losses) / len(batch.losses) if len(batch.losses) > 1 else next(iter(batch.losses), None)
        lr = [batch.rates.get(group, rate) for group, rate in enumerate(verdict.lr)]
        verdict = replace(verdict, loss=loss, lr=lr, edited=batch.edited)
        self._updates.push(batch.grad, common_spans(batch.absent), verdict)

    def _try_own_step(self, number: int, factors: list[float]) -> Tensor | None:
        """Return how far a member's own object moves the parameters, f32[P], and move them back.

        If the object raises an error, rank 0 raises it, too, and the others return None.

        The rates of all groups are multiplied by ``factors`` during the step. A rate that the object changes itself
        stays changed, without the factor. Rank 0 makes the step for all ranks, so that they stay the same, whatever the
        step depends on. A gradient that is not finite is returned as it is: the push will be refused, and the
        optimizer's state must not take it in.
        """
        flat, (start, stop) = self.flat, self._span_of(number)
        before = flat.params.clone()
        for parameter, has_gradient in zip(flat.trained, flat.has_gradient, strict=True):
            if not has_gradient:
                parameter.grad = None
        flat.show_gradients()
        moved, is_sound, is_made = flat.decayed, all_finite(flat.grads[start:stop]), torch.zeros(1)
        try:
            if self._group.rank == 0 and is_sound:
                with self._multiplied_rates(factors), flat.as_float32():
                    self.members[number].own_step()
            is_made.fill_(1.0)
        finally:  # also after an error, which the script may catch
            flat.bring_home()
            torch.sub(flat.params, before, out=moved)
            flat.params.copy_(before)
            flat.show_params()
            if self._group.size > 1:
                self._group.broadcast(own_step_is_made=is_made)
        if not is_made.item():
            return None
        if not is_sound:
            moved[start:stop].copy_(flat.grads[start:stop])
        if self._replicated:
            self._group.broadcast(own_step=moved)
        return moved

    @contextmanager
    def _multiplied_rates(self, factors: list[float]) -> Iterator[None]:
        """Multiply the rates of the groups for a while. If the script's object changes one, the change stays."""
        groups, rates = self.param_groups, [group["lr"] for group in self.param_groups]
        applied = [float(rate) * factor for rate, factor in zip(rates, factors, strict=True)]
        for group, rate in zip(groups, applied, strict=True):
            group["lr"] = rate
        completed = False
        try:
            yield
            completed = True
        finally:
            for group, rate, was_applied, factor in zip(groups, rates, applied, factors, strict=True):
                is_changed = completed and group["lr"] != was_applied
                group["lr"] = group["lr"] / factor if is_changed else rate

    def _check_unchanged(self, member: Member) -> None:
        """Raise UnsupportedOptimizerError if the script has changed what must stay the same during the run."""
        if self.makes_own_steps:
            return
        for number, (was, now) in enumerate(zip(member.optimizers, optimizers_of(member.wrapped), strict=True)):
            if was == now:
                continue
            changed = [name for name in asdict(was) if getattr(was, name) != getattr(now, name)]
            before, after = (", ".join(f"{name} {getattr(each, name):g}" for name in changed) for each in (was, now))
            raise UnsupportedOptimizerError(
                f"parameter group {number} had {before} when the optimizer was wrapped, and has {after} now; the "
                "cluster keeps one optimizer, and looks ahead along one momentum, for the whole run. Leave it as it "
                "is; a scheduler that would cycle it takes an option: OneCycleLR(…, cycle_momentum=False)"
            )

    def _take_over_rank_0s(self) -> None:
        """Let all ranks go on with rank 0's gradients, after they have changed them differently."""
        flat = self.flat
        flat.summed[: len(flat.trained)].copy_(torch.tensor(flat.has_gradient, dtype=torch.float32))
        self._group.broadcast(final_grads=flat.summed)
        flat.has_gradient[:] = [bool(flag) for flag in flat.summed[: len(flat.trained)].tolist()]
        flat.show_gradients()

    # ---- a batch without a step ----------------------------------------------------------------------------------

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


def _consecutive(sizes: Sequence[int]) -> list[range]:
    """Return ranges of these sizes, each of which begins where the one before ends."""
    stops = accumulate(sizes)
    return [range(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]
