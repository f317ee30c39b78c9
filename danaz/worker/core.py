"""A worker without I/O: it holds what a worker remembers between batches, and says which request may follow which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from danaz.optimizers import Optimizers
from danaz.protocol.messages import (
    NOTHING_SPENT,
    UNKNOWN_MACHINE,
    Bye,
    Fetch,
    Fetched,
    Final,
    GoBack,
    Inquire,
    Join,
    Leave,
    Machine,
    Noted,
    Parameters,
    Plan,
    Pull,
    Push,
    Refusal,
    Reply,
    Report,
    Spent,
    check_reported,
)
from danaz.protocol.refusals import FRESH_AFTER, SICK
from danaz.rules import Context, WorkerRule
from danaz.vectors.codecs import Compressor
from danaz.vectors.counts import Counts
from danaz.vectors.cutting import Spans, all_finite, common_spans, cut, parts
from danaz.vectors.equality import are_equal
from danaz.vectors.layout import Layout
from danaz.worker.staging import IN_PLACE, Staging
from danaz.worker.states import WORKER_TRANSITIONS, WorkerEvent, WorkerState

Request = Join | Push | Pull | Fetch | Leave | Report | Bye | GoBack | Inquire
Asked = TypeVar("Asked", bound=Request)
Renewed = TypeVar("Renewed", Join, Leave)
Loss = float | Tensor | None  # a tensor may still be on its way from the device


EVENT_OF: dict[type, WorkerEvent] = {
    Join: WorkerEvent.JOIN,
    Push: WorkerEvent.PUSH,
    Pull: WorkerEvent.PULL,
    Fetch: WorkerEvent.FETCH,
    Leave: WorkerEvent.LEAVE,
    Report: WorkerEvent.REPORT,
    Bye: WorkerEvent.BYE,
    Parameters: WorkerEvent.VIEW,
    Fetched: WorkerEvent.FETCHED,
    Final: WorkerEvent.FINAL,
    Noted: WorkerEvent.NOTED,
    Refusal: WorkerEvent.REFUSAL,
}


@dataclass(frozen=True)
class Role:
    """Who this worker is, and what it brings to the run."""

    worker: int
    incarnation: int
    digest: str
    optimizers: Optimizers
    layout: Layout
    plan: Plan
    ahead: int = 1  # number of batches that the worker wants to hold at a time
    machine: Machine = UNKNOWN_MACHINE


@dataclass(frozen=True)
class View:
    """The parameters that the server sent for the worker to compute on."""

    version: int
    life: int  # the life of the server that sent the view
    params: Tensor  # f32[P]


@dataclass(frozen=True)
class Step:
    """A step on one mini-batch, as the worker makes it alone or pushes it; the gradient comes beside it."""

    batch: int
    lr: tuple[float, ...]  # ηᵢ, one for each parameter group
    samples: int
    loss: Loss
    absent: Spans = ()  # parameters without a gradient, which make no step
    order: int = 0  # digest of the order of the samples in the batch's epoch; 0: none
    ends_batch: bool = True  # False: another step on the same batch follows


class WorkerCore:
    """One worker's half of the protocol and of its rule.

    Each request method returns the message to send. Before the message is sent, ``complete`` waits for those parts of
    it that are still on their way from the device. The reply goes to ``receive``. ``state`` says what may come next:
    see ``worker/states.py``. A request or a reply that does not fit the state raises IllegalTransitionError. The rule's
    vectors move only when the server says that it applied the push.

    In a pipeline, the worker fetches the next view ahead, while it computes a batch on the view at hand. It calls
    ``pull`` with ``ahead``, and then ``push`` without ``wants_view``, which replaces the view at hand by the fetched
    one. The server sent the fetched view before it got the push. If pushes move views (``Rule.push_moves_view``), the
    worker adds its push to the fetched view, and computes on what the view will be after the push.
    """

    def __init__(
        self,
        role: Role,
        rule: WorkerRule,
        device: torch.device | str = "cpu",
        staging: Staging = IN_PLACE,
        compressor: Compressor | None = None,
        push_moves_view: bool = False,
    ):
        """Put the vectors on ``device``; ``staging`` brings what is sent to where the link takes it."""
        self.role = role
        self.rule = rule
        self.staging = staging
        self.compressor = compressor  # None: pushes travel as they are
        self.push_moves_view = push_moves_view

        self.state = WorkerState.NEW
        self.unanswered: Request | None = None  # the request whose reply this worker waits for
        self.done = False  # whether no worker has batches left
        self.epoch = 0.0  # the whole cluster's epoch, as this worker last heard
        self.spent: Spent = (
            NOTHING_SPENT  # what the worker has spent its time on, as the next push or leave tells the server
        )
        self._last_number = 0  # number of the last request

        self._view: View | None = None  # the view at hand
        self.fetched: View | None = None  # the view fetched ahead, while a batch is computed on the view at hand
        self._fetches_ahead = False  # whether the next view to arrive will be used after the view at hand
        self._own_push: Tensor | None = None  # f32[P], the push under way, which the view at hand does not contain
        self._loaded: tuple[Tensor, Tensor | None] | None = None  # the view and the own push that filled the model

        self._steps: list[Step] = []  # local steps since the last push
        self._loss: Tensor | None = None  # f64[1], the loss of the push in preparation, to be read once it has arrived
        self.undecided = 0  # request number of the push whose outcome the server has not told yet; 0: none
        self.applied = False  # whether the last push was applied, as far as this worker knows
        self._in_doubt = False  # the next push may be refused: the last one was, or this worker had to join again
        self._sick_in_a_row = 0  # number of pushes refused for their values since the last applied push

        self._committed = self._zeros(device)  # the rule's vectors after the last applied push
        self._current = self._committed  # the rule's vectors after the local steps since that push
        # Memory for the vectors after the next step. Meanwhile those after the last push and the last step must stay.
        self._spare = [self._zeros(device) for _ in range(1 if rule.sync_period == 1 else 2)]
        self._device = device
        self._counts = self._current_counts = Counts.of(role.layout.size)  # gradients in the committed, current vectors

    def _zeros(self, device: torch.device | str) -> dict[str, Tensor]:
        return {name: torch.zeros(self.role.layout.size, device=device) for name in self.rule.worker_state}

    @property
    def version(self) -> int:
        """The version of the view at hand."""
        return 0 if self._view is None else self._view.version

    @property
    def vectors(self) -> dict[str, Tensor]:
        """The rule's worker_state after the last applied push, f32[P] each."""
        return self._committed

    @property
    def counts(self) -> Counts:
        """How many gradients ``vectors`` have taken in, and at which rates ηᵢ the last of them."""
        return self._counts

    @property
    def current(self) -> tuple[dict[str, Tensor], Counts]:
        """The rule's worker_state that belongs to the parameters at hand, and the counts of its gradients."""
        return self._current, self._current_counts

    def begin_with(self, vectors: Mapping[str, Tensor], counts: Counts) -> None:
        """Start from this worker_state f32[P] each, where it is zero."""
        assert self._current is self._committed, "no push is under way"
        for name, vector in self._committed.items():
            vector.copy_(vectors[name])
        self._counts = self._current_counts = counts

    def given_back(self) -> Tensor | None:
        """Return what this worker would give back if it left now, f32[P]; None if its rule gives nothing back."""
        if not self.rule.gives_back:
            return None
        given = torch.empty_like(next(iter(self._committed.values())))
        for group, (begin, end) in enumerate(self.role.layout.groups):
            for start, stop, count, lr in self._counts.runs(begin, end):
                ctx = self._context(group, lr, lr, count)
                self.rule.give_back(given[start:stop], cut(self._committed, start, stop), ctx)
        return self.staging.lift(given)

    # ---- a batch: compute on the view, then step alone or push ---------------------------------------------------

    def compute_on(self, params: Tensor) -> None:
        """Fill ``params`` f32[P] with the values that the next gradient is to be computed on."""
        assert self._view is not None
        self.staging.load(params, self._view.params)
        # Remember both: in a pipeline, another view may have arrived before the batch on this one ends.
        self._loaded = self._view.params, self._own_push
        if self._own_push is not None:
            params.add_(self._own_push.to(params.device))

    def edit(self, params: Tensor) -> Tensor | None:
        """Return how far ``params`` f32[P] have changed since ``compute_on`` filled them; None if they have not.

        After local steps the answer is None, because the next push includes such changes together with the steps.
        """
        if self._loaded is None or self._steps:
            return None
        self.staging.catch_up()  # this wait costs nothing: the push cannot be sent before the batch is computed
        loaded, own = self._loaded
        view = loaded.to(params.device)
        if own is not None:
            view = view + own.to(params.device)
        if are_equal(params, view) or not all_finite(view):
            return None
        return params - view

    def local_step(self, step: Step, grad: Tensor | None, params: Tensor) -> None:
        """Move ``params`` f32[P] along ``grad`` f32[P], on this worker alone. The next push includes the step.

        Without a gradient, all parameters stay as they are.
        """
        self._move(WorkerEvent.LOCAL_STEP)
        if grad is not None:
            out = torch.empty_like(grad)
            for start, stop in self._displace(out, grad, step, params):
                params[start:stop].add_(out[start:stop])
        self._steps.append(step)

    def push(
        self,
        step: Step,
        grad: Tensor | None,
        params: Tensor | None = None,
        *,
        edit: Tensor | None = None,
        wants_view: bool = True,
    ) -> Push:
        """Push what the rule makes of a batch's gradient f32[P], which was computed on the view at hand.

        ``params`` f32[P] are the parameters at hand. After local steps, the push covers all of them, and the last batch
        may have no gradient. If the rule pushes a displacement, the push also carries ``edit`` f32[P].
        """
        number = self._take_number(WorkerEvent.PUSH)
        assert self._view is not None
        assert wants_view or self.fetched is not None, "without a view, nothing can be computed next"
        steps, who = [*self._steps, step], self.role
        vector, outbox = self._make_vector(step, grad, params, edit)
        absent, encoded = common_spans([each.absent for each in steps]), None
        if self.compressor is not None:
            self.staging.settle()
            sent = outbox.to("cpu")
            absent = untouched(absent, sent)
            encoded = self.compressor.compress(sent, self.epoch, absent)
            vector = outbox = sent.to(outbox.device)
        elif self.rule.names_absent:
            absent = untouched(absent, vector)
        elif self.rule.pushes != "gradient":
            absent = ()  # the push is zero there already, except for an edit
        push = Push(
            worker=who.worker,
            incarnation=who.incarnation,
            request=number,
            view_version=self._view.version,
            lr=step.lr,
            samples=sum(each.samples for each in steps),
            loss=self._prepare_loss([each.loss for each in steps if each.loss is not None]),
            batch=step.batch,
            push=outbox,
            earlier=tuple(each.batch for each in self._steps if each.ends_batch),
            absent=absent,
            order=step.order,
            life=self._view.life,
            wants_view=wants_view,
            encoded=encoded,
            spent=self.spent,
        )
        self.undecided, self._fetches_ahead = number, not wants_view
        if not wants_view:
            self._advance_view(vector)
        return self._expect_answer(push)

    def _make_vector(
        self, step: Step, grad: Tensor | None, params: Tensor | None, edit: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the vector to push, f32[P], and its outbox, where the link takes it from.

        The slices of the vector are still on their way to the outbox, one after another.
        """
        slices: Iterator[tuple[int, int]]
        if grad is None:
            assert params is not None
            assert self._steps, "without a gradient, a push tells of local steps"
            out = torch.zeros_like(params)
            slices = ((start, stop) for _, start, stop in self.role.layout.slices(self.staging.slice_floats))
        else:
            out = torch.empty_like(grad)
            slices = self._displace(out, grad, step, params)
        outbox = self.staging.outbox(out)
        assert self._view is not None
        for start, stop in slices:
            if edit is not None and self.rule.pushes == "displacement":
                out[start:stop].add_(edit[start:stop])
            if self.rule.pushes == "parameters" or self._steps:
                assert params is not None
                out[start:stop].add_(params[start:stop])
            if self.rule.pushes != "parameters" and self._steps:  # x_K − x_0, the sum of all displacements
                out[start:stop].sub_(self._view.params[start:stop].to(out.device, non_blocking=True))
            self.staging.send(out, outbox, start, stop)
        return out, outbox

    def _displace(self, out: Tensor, grad: Tensor, step: Step, params: Tensor | None) -> Iterator[tuple[int, int]]:
        """Write what the rule makes of one gradient into ``out`` f32[P]; yield (start, stop) of each finished slice.

        In absent spans, write zeros and leave the rule's vectors as they are. After the last slice, the vectors have
        moved on tentatively.
        """
        # If several steps are made on a batch, there is one more place of vectors to keep.
        new = self._spare.pop() if self._spare else self._zeros(self._device)
        for group, begin, end in self.role.layout.slices(self.staging.slice_floats):
            for start, stop, is_absent in parts(begin, end, step.absent):
                if is_absent:
                    out[start:stop].zero_()
                    for name, vector in self._current.items():
                        new[name][start:stop] = vector[start:stop]
                    continue
                for first, last, count, own_lr in self._current_counts.runs(start, stop):
                    old = cut(self._current, first, last)
                    if self.rule.needs_view:
                        assert params is not None, "the rule needs the parameters that the gradient was computed on"
                        old["view"] = params[first:last]
                    ctx = self._context(group, step.lr[group], own_lr, count)
                    self.rule.push(out[first:last], grad[first:last], old, cut(new, first, last), ctx)
            yield begin, end
        if self._current is not self._committed:
            self._spare.append(self._current)
        self._current = new
        self._current_counts = self._current_counts.plus_one(self.role.layout.groups, step.lr, step.absent)

    def _context(self, group: int, lr: float, own_lr: float, count: int) -> Context:
        """Return the scalars of one slice, as far as a worker knows them."""
        return Context(lr, own_lr, max_lr=0.0, lag=0, version=self.version, own_count=count, group=group)

    def _prepare_loss(self, losses: list[float | Tensor]) -> float | None:
        """Return the mean of ``losses``; None if there is none, or if it is a tensor that ``complete`` reads later."""
        mean = sum(losses) / len(losses) if losses else None
        if not isinstance(mean, Tensor):
            return mean
        self._loss = self.staging.lift(mean.reshape(1))
        return None

    def _advance_view(self, push: Tensor) -> None:
        """Go on with the view that was fetched ahead, which does not contain ``push`` f32[P]."""
        self._view, self.fetched = self.fetched, None
        adds_up = self.push_moves_view and not self._in_doubt and all_finite(push)
        self._own_push = push if adds_up else None

    # ---- other requests ------------------------------------------------------------------------------------------

    def join(self, params: Tensor | None = None, untrained: Tensor | None = None) -> Join:
        """Enter the run, or enter it again after a refusal that asked for this.

        Worker 0 brings ``params`` f32[P], and ``untrained`` f32[U], which its model holds beside the parameters.

        A worker that was in the run already brings its newest view, because a restarted server may lack it.
        """
        role, newest = self.role, self.fetched or self._view
        return self._expect_answer(
            Join(
                role.worker,
                role.incarnation,
                self._take_number(WorkerEvent.JOIN),
                role.digest,
                role.optimizers,
                role.layout,
                role.plan,
                role.ahead,
                params if newest is None else newest.params,
                0 if newest is None else newest.version,
                0 if newest is None else newest.life,
                untrained,
                role.machine,
            )
        )

    def pull(self, ahead: bool = False, skipped: Sequence[int] = ()) -> Pull:
        """Ask for batches when none are left at hand; with ``ahead``, ask for the view to use after the next push.

        The request also tells the server which batches were ``skipped``: they count as used, without a step.
        """
        number = self._take_number(WorkerEvent.PULL)
        self._fetches_ahead = ahead
        return self._expect_answer(Pull(self.role.worker, self.role.incarnation, number, ahead, tuple(skipped)))

    def fetch(self) -> Fetch:
        """Ask for what worker 0's model holds beside the parameters."""
        number = self._take_number(WorkerEvent.FETCH)
        return self._expect_answer(Fetch(self.role.worker, self.role.incarnation, number))

    def leave(self, buffers: Tensor, edit: Tensor | None = None, stop: str = "") -> Leave:
        """Leave in good order, and send the batch-norm statistics f32[B] and the last ``edit`` f32[P].

        ``stop``, if given, says why the run is to end for all workers.
        """
        number, done = self._take_number(WorkerEvent.LEAVE), self.done or bool(stop)
        given = self.given_back()
        if edit is not None:
            given = self.staging.lift(edit) if given is None else given.add_(edit.to(given.device))
        who = self.role
        return self._expect_answer(
            Leave(who.worker, who.incarnation, number, given, buffers, done=done, stop=stop, spent=self.spent)
        )

    def report(self, figures: dict[str, float | str | None]) -> Report:
        """Send figures for summary.json. Raises OutOfRangeError if they are too many or too long."""
        check_reported(figures)
        number = self._take_number(WorkerEvent.REPORT)
        return self._expect_answer(Report(self.role.worker, self.role.incarnation, number, figures))

    def bye(self) -> Bye:
        """End the conversation."""
        return self._expect_answer(Bye(self.role.worker, self.role.incarnation, self._take_number(WorkerEvent.BYE)))

    def renew(self, request: Renewed) -> Renewed:
        """Make a Join or a Leave once more after a refusal, with a new number, as the worker is now."""
        number, incarnation = self._take_number(EVENT_OF[type(request)]), self.role.incarnation
        news: dict[str, Any] = {"done": self.done or bool(request.stop)} if isinstance(request, Leave) else {}
        return self._expect_answer(replace(request, request=number, incarnation=incarnation, **news))

    def complete(self, request: Asked) -> Asked:
        """Return ``request`` once all its parts have arrived. This is the only wait for the device in a step."""
        self.staging.settle()
        if not isinstance(request, Push) or self._loss is None:
            return request
        loss, self._loss = self._loss.item(), None
        return replace(request, loss=loss)

    def _take_number(self, event: WorkerEvent) -> int:
        """Return the number of a new request. Raises IllegalTransitionError if the worker may not make it now."""
        WORKER_TRANSITIONS.after(self.state, event, str(self.role.worker))
        self._last_number += 1
        return self._last_number

    def _expect_answer(self, request: Asked) -> Asked:
        """Note that ``request`` is made and waits for its reply, and return it."""
        self._move(EVENT_OF[type(request)])
        self.unanswered = request
        return request

    def _move(self, event: WorkerEvent) -> None:
        self.state = WORKER_TRANSITIONS.after(self.state, event, str(self.role.worker))

    # ---- replies -------------------------------------------------------------------------------------------------

    def receive(self, reply: Reply) -> None:
        """Take the reply to the last request. Raises IllegalTransitionError for one that does not answer it."""
        asked = self.state
        self._move(EVENT_OF[type(reply)])
        self.unanswered = None
        if isinstance(reply, Parameters):
            self.epoch, self.done = reply.epoch, reply.done
            if reply.view.numel():
                self._store_view(View(reply.version, reply.life, reply.view))
            # If the answer to a push was lost, the server may have applied the push before it gave this worker up.
            self.applied = reply.applied if asked is WorkerState.PUSHING else self._is_undecided(reply.last_applied)
            differing = [part for part in reply.parts if self._is_undecided(part[2]) != self.applied]
            self._end_steps(self.applied, [(start, stop) for start, stop, _ in differing])
            if asked is WorkerState.PUSHING:
                self._in_doubt = not self.applied
                self._start_afresh_if_sick(reply)
        elif isinstance(reply, Refusal):
            self._in_doubt = True
            if asked is WorkerState.JOINING and reply.newest >= self.role.incarnation:
                # This process took its incarnation number from a clock that is slow, so it takes a higher number. (A
                # worker that was in the run already, and was replaced, does not come back.)
                self.role = replace(self.role, incarnation=reply.newest + 1)

    def _store_view(self, view: View) -> None:
        if self._fetches_ahead:
            self.fetched = view
        else:
            self._view, self.fetched, self._own_push = view, None, None

    def _is_undecided(self, number: int) -> bool:
        """Return whether the push whose outcome is not known yet has this request number."""
        return number == self.undecided != 0

    def _end_steps(self, applied: bool, otherwise: Sequence[tuple[int, int]] = ()) -> None:
        """Commit the steps since the last push, or undo them; in the ``otherwise`` slices, do the opposite."""
        self._steps, self.undecided = [], 0
        if self.compressor:
            self.compressor.settle(applied, otherwise)
        if self._current is self._committed:
            return
        for start, stop in otherwise:
            kept, dropped = (self._current, self._committed) if applied else (self._committed, self._current)
            for name, vector in kept.items():
                vector[start:stop] = dropped[name][start:stop]
        if otherwise:
            committed, current = self._counts, self._current_counts
            self._counts = committed.with_spans_of(current, otherwise)
            self._current_counts = current.with_spans_of(committed, otherwise)
        if applied:
            self._spare.append(self._committed)
            self._committed, self._counts = self._current, self._current_counts
        else:
            self._spare.append(self._current)
            self._current, self._current_counts = self._committed, self._counts
        if applied and self.rule.resets:
            self._forget_state()

    def _forget_state(self) -> None:
        """Let the rule's vectors start afresh."""
        for vector in self._committed.values():
            vector.zero_()
        self._counts = self._current_counts = Counts.of(self.role.layout.size)

    def _start_afresh_if_sick(self, reply: Parameters) -> None:
        """Zero the rule's vectors and the residual if FRESH_AFTER pushes in a row were refused for their values.

        With the same velocity and residual, the server would refuse the next push, too. The worker forfeits its share
        of the look-ahead, as a worker that crashes does: the vectors led to the refused pushes, so giving them back
        would move the parameters just as far.
        """
        self._sick_in_a_row = 0 if reply.applied else self._sick_in_a_row + (reply.refused in SICK)
        if self._sick_in_a_row < FRESH_AFTER:
            return
        self._sick_in_a_row = 0
        self._forget_state()
        if self.compressor:
            self.compressor.forget()


def untouched(absent: Spans, push: Tensor) -> Spans:
    """Return those ``absent`` spans in which ``push`` f32[P] is zero; the script has edited the others."""
    return tuple((start, stop) for start, stop in absent if not push[start:stop].any())


def answers(reply: Reply, request: Request) -> bool:
    """Return whether this reply answers ``request``, and is not a late reply to an earlier request.

    A refusal with number 0 comes from a server that could not read the request.
    """
    return reply.request == request.request or (isinstance(reply, Refusal) and reply.request == 0)
