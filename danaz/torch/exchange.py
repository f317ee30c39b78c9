"""How the ranks of a worker come to one mean gradient, and to one decision, for each batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from danaz.torch.synchronized import Channel
from danaz.vectors.model import FlatModel
from danaz.worker.core import Loss
from danaz.worker.group import Group

BUCKET_FLOATS = 1 << 20  # 4 MB: long enough to use the wire well, short enough to begin while backward still runs
MARK_PARTS = 5


@dataclass(frozen=True)
class Verdict:
    """What the ranks of a worker agree on at the end of a batch."""

    skips: int  # number of ranks that made no step; if there are any, the batch makes none
    loss: Loss  # mean over the batch
    lr: list[float]  # rank 0's rates, one for each parameter group
    edited: bool  # whether some rank's script has changed parameters since the last step
    alike: bool  # whether all ranks hold the same gradient, if the exchange is to find that out
    ends: bool = False  # whether a rank has asked to end the run; all ranks hear it in this step
    at: int | None = 0  # number of the optimizer whose step this is about; None if no rank is at a step


@dataclass(frozen=True)
class _Ballot:
    """The vote of one rank at the end of a round. The flags are 0 or 1, so that their sums count the ranks."""

    more: int = 0  # whether another backward is about to add to the gradient
    skips: int = 0  # whether the rank makes no step
    edited: int = 0  # whether its script has changed parameters
    has_loss: int = 0
    loss: float = 0.0  # the mean over its samples, times its weight
    lr: Sequence[float] = ()  # its rates, one for each parameter group
    ends: int = 0  # whether it asks to end the run
    at: int | None = None  # number of the optimizer at whose step the rank is; None if it has gone on from the batch


@dataclass
class _Round:
    """How far one sum of all buckets has come."""

    missing: list[int]  # for each bucket, number of gradients that have not arrived
    handles: list[Any]  # the sums that have begun, in the order of the buckets
    backward_runs: bool = False
    is_settled: bool = False  # whether the gradients are means by now


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

    With several optimizers, a rank also says at whose step it is. If the ranks are at different ones, some of them have
    skipped a step. The vote is then about the one that usually comes first, and no rank makes that step.
    """

    def __init__(self, flat: FlatModel, group: Group, passes: int, alike: bool = False, optimizers: int = 1):
        """Sum after every ``passes`` backwards.

        With ``alike``, the vote also finds out whether the gradients of all ranks are the same, bit for bit.
        """
        self.flat = flat
        self.group = group
        self.weight = 1.0 / group.size
        self.asks_to_end = False  # whether this rank asks that its worker leave the run
        self.channel: Channel | None = None  # of the model's layers of SyncBatchNorm, which other ranks may be in
        self._passes = passes
        self._passes_done = 0  # number of backwards since the last step
        self._alike = alike
        self._optimizers = optimizers
        self._order: list[int] = []  # the optimizers, in the order in which the script makes their steps
        self._buckets = _buckets(flat)
        self._bucket_of = {i: number for number, bucket in enumerate(self._buckets) for i in bucket}
        self._round = self._new_round()
        self._hooks: list[RemovableHandle] = []
        if group.size > 1:
            for index, parameter in enumerate(flat.trained):
                self._hooks.append(_hook(parameter, partial(self._gradient_is_there, index)))

    def close(self) -> None:
        """Take no more part in backward, because another exchange sums these gradients."""
        for hook in self._hooks:
            hook.remove()

    def _new_round(self) -> _Round:
        return _Round(missing=[len(bucket) for bucket in self._buckets], handles=[])

    # ---- while backward runs -------------------------------------------------------------------------------------

    def _gradient_is_there(self, index: int, parameter: Tensor) -> None:
        if self._round.is_settled:
            self._vote(_Ballot(more=1))
            self._round = self._new_round()
        current = self._round
        if not current.backward_runs:
            current.backward_runs = True
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)
        if self._passes_done % self._passes != self._passes - 1:
            return
        number = self._bucket_of[index]
        if number < len(current.handles):
            raise RuntimeError(
                "a gradient was produced twice in one backward, after its sum over the ranks had begun. If the model "
                "uses activation checkpointing, give torch.utils.checkpoint.checkpoint use_reentrant=False."
            )
        current.missing[number] -= 1
        while len(current.handles) < len(self._buckets) and not current.missing[len(current.handles)]:
            self._begin_next_sum()

    def _backward_ended(self) -> None:
        self._round.backward_runs = False
        self._passes_done += 1
        if self._passes_done % self._passes == 0:
            self.settle()

    def _begin_next_sum(self) -> None:
        number = len(self._round.handles)
        bucket, flat = self._buckets[number], self.flat
        self._gather(bucket)
        entries = flat.layout.parameters
        grads = flat.grads[entries[bucket.start].start : entries[bucket.stop - 1].stop]
        # Fill with zeros instead of multiplying by zero: a rank without samples may hold anything, such as NaN.
        grads.mul_(self.weight) if self.weight else grads.zero_()
        if bucket.start == 0:  # the last bucket also carries the flags of which parameters have a gradient
            flags = torch.tensor(flat.has_gradient, dtype=torch.float32)
            flat.summed[: len(flags)].copy_(flags)
            grads = flat.summed[: entries[bucket.stop - 1].stop - flat.layout.size or None]
        self._round.handles.append(self.group.sum_async(grads, f"grads.{number}"))

    def settle(self) -> None:
        """Return when every ``p.grad`` is the mean over the batch. Each rank must call it, or its backward does."""
        if self._round.is_settled or self.group.size == 1:
            return
        while len(self._round.handles) < len(self._buckets):
            self._begin_next_sum()
        self._meet()
        for handle in self._round.handles:
            self.group.wait(handle)
        flat = self.flat
        if not all(flat.has_gradient):
            # If only other ranks have a gradient for a parameter, this rank takes it over, too.
            flat.has_gradient[:] = [bool(ranks) for ranks in flat.summed[: len(flat.trained)].tolist()]
        flat.show_gradients()
        self._round.is_settled, self._round.backward_runs = True, False

    # ---- at the end of a batch -----------------------------------------------------------------------------------

    def conclude(
        self, lr: list[float], loss: Loss = None, *, at: int | None = 0, steps: bool = True, edited: bool = False
    ) -> Verdict:
        """Find out whether all ranks make a step. Afterwards their gradients are the batch's mean.

        This rank is ``at`` the step of the optimizer with this number; with None, it has gone on from the batch. Rank
        0's rates count, because the ranks may have moved their schedules differently.
        """
        if self.group.size == 1:
            self._gather_again()
            self._round = self._new_round()
            return Verdict(int(not steps), loss, lr, edited, alike=True, at=at)
        share = 0.0 if loss is None else float(loss) * self.weight
        ballot = _Ballot(0, int(not steps), int(edited), int(loss is not None), share, lr, int(self.asks_to_end), at)
        while True:
            self.settle()
            self._gather_again()
            verdict, more = self._vote(ballot)
            self._round = self._new_round()
            if not more:
                self._passes_done = 0
                return verdict

    def scale(self, factor: Tensor, start: int, stop: int) -> None:
        """Multiply a span of this rank's gradient by ``factor``."""
        self.settle()
        self._gather_again()
        self.flat.grads[start:stop].mul_(factor.to(self.flat.grads))
        self.flat.show_gradients()
        self._round.is_settled = True

    def _gather_again(self) -> None:
        """Bring all gradients into the flat vector, because the user may have changed some since backward."""
        self._gather(range(len(self.flat.trained)), again=self._round.is_settled)

    def _gather(self, numbers: range, again: bool = False) -> None:
        known = len(self.flat.sparse)
        self.flat.gather_gradients(numbers, again)
        if not known and self.flat.sparse and self.group.rank == 0:
            warnings.warn(
                f"the gradient of {min(self.flat.sparse)} is sparse. danaz makes such gradients dense, because it sums "
                "and pushes whole vectors: the result is right, but nothing is saved. sparse=False says the same.",
                stacklevel=2,
            )

    def _vote(self, ballot: _Ballot) -> tuple[Verdict, int]:
        """Return the ranks' common verdict, and the number of ranks that are about to add to their gradients."""
        rates = ballot.lr or [0.0] * len(self.flat.layout.groups)
        counted = rates if self.group.rank == 0 else [0.0] * len(rates)
        mark = _mark(self.flat) if self._alike and not ballot.more else [0.0] * MARK_PARTS
        counts = [ballot.more, ballot.skips, ballot.edited, ballot.ends, ballot.has_loss]
        counts += [int(ballot.at == number) for number in range(self._optimizers)]
        # The votes are float32 like the gradients, so that Horovod can sum both in one go.
        votes = torch.tensor([*counts, ballot.loss, *mark, *(part for rate in counted for part in _parts(rate))])
        self._meet()
        self.group.wait(self.group.sum_async(votes, "votes"))
        more, skips, edited, ends, has_loss, *rest = votes.tolist()
        there, (loss, *rest) = rest[: self._optimizers], rest[self._optimizers :]
        at = None if more else self._first_of(there)
        elsewhere = 0 if at is None else sum(there) - there[at]
        marks, parts = rest[:MARK_PARTS], rest[MARK_PARTS:]
        lr = [sum(parts[i : i + 3]) for i in range(0, len(parts), 3)]
        alike = marks == [self.group.size * part for part in mark]
        mean_loss = loss if has_loss else None
        return Verdict(int(skips + elsewhere), mean_loss, lr, bool(edited), alike, bool(ends), at), int(more)

    def _meet(self) -> None:
        """Wait for the ranks that are still in a forward or backward, and need this one for their batch norm."""
        if self.channel is not None:
            self.channel.meet()

    def _first_of(self, ranks: Sequence[float]) -> int | None:
        """Return which of the optimizers that have ``ranks`` at their step comes first; None if none has."""
        there = [number for number, count in enumerate(ranks) if count]
        if not there:
            return None
        first = next((number for number in self._order if number in there), there[0])
        if first not in self._order:
            self._order.append(first)
        return first


def _hook(parameter: nn.Parameter, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Call ``hook`` with the parameter when its gradient has arrived, even if it is frozen now and trains later."""
    frozen = not parameter.requires_grad
    parameter.requires_grad_(True)
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    parameter.requires_grad_(not frozen)
    return handle


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
