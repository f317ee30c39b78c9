"""A worker without I/O: it holds what a worker remembers between batches, and says which request may follow which."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from danaz.protocol.messages import (
    Bye,
    Fetch,
    Fetched,
    Final,
    GoBack,
    Inquire,
    Join,
    Leave,
    Noted,
    Parameters,
    Plan,
    Pull,
    Push,
    Refusal,
    Reply,
    Report,
    check_reported,
)
from danaz.protocol.refusals import FRESH_AFTER, SICK
from danaz.rules import Context, WorkerRule
from danaz.vectors.codecs import Compressor
from danaz.vectors.cutting import Spans, all_finite, cut, parts
from danaz.vectors.layout import Layout
from danaz.worker.staging import IN_PLACE, Staging
from danaz.worker.states import WORKER_TRANSITIONS, WorkerEvent, WorkerState

Request = Join | Push | Pull | Fetch | Leave | Report | Bye | GoBack | Inquire
Asked = TypeVar("Asked", bound=Request)
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
    momentum: float
    layout: Layout
    plan: Plan
    ahead: int = 1


@dataclass(frozen=True)
class View:
    """The parameters that the server sent for the worker to compute on."""

    version: int
    life: int  # the life of the server that sent the view
    params: Tensor  # f32[P]


@dataclass(frozen=True)
class LocalStep:
    """A step on one mini-batch that moved only this worker."""

    batch: int
    lr: tuple[float, ...]
    samples: int
    loss: Loss


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
        """Put the vectors on ``device``; ``staging`` brings what is sent to where a server or a wire takes it."""
        self.role = role
        self.rule = rule
        self.staging = staging
        self.done = False  # whether no worker has batches left
        self.epoch = 0.0  # the whole cluster's epoch, as this worker last heard
        self.compressor = compressor  # compresses the pushes
        self.push_moves_view = push_moves_view
        self.state = WorkerState.NEW
        self.unanswered: Request | None = None  # the request whose reply this worker waits for
        self._request = 0
        self._view: View | None = None  # the view at hand
        self.fetched: View | None = None  # the view fetched ahead, while a batch is computed on the view at hand
        self._ahead = False  # whether the next view to arrive will be used after the view at hand
        self._own: Tensor | None = None  # f32[P], the push under way, which the view at hand does not contain
        self._loaded: tuple[Tensor, Tensor | None] | None = None  # the view and the own push that filled the model
        self._in_doubt = False  # the next push may be refused: the last one was, or this worker had to join again
        self._committed = self._zeros(device)  # the rule's vectors after the last applied push
        self._current = self._committed  # the rule's vectors after the local steps since that push
        self._spare = [self._zeros(device) for _ in range(1 if rule.sync_period == 1 else 2)]
        self._lr = self._current_lr = (0.0,) * len(role.layout.groups)
        self._steps: list[LocalStep] = []  # local steps since the last push
        self._loss: Tensor | None = None  # f64[1], the loss of the push in preparation, to be read once it has arrived
        self._sick_in_a_row = 0  # number of pushes refused for their values since the last applied push
        self._undecided = 0  # request number of the push whose outcome the server has not told yet; 0: none
        self.applied = False  # whether the last push was applied, as far as this worker knows

    def _zeros(self, device: torch.device | str) -> dict[str, Tensor]:
        return {name: torch.zeros(self.role.layout.size, device=device) for name in self.rule.worker_state}

    @property
    def vectors(self) -> dict[str, Tensor]:
        """The rule's worker_state after the last applied push, f32[P] each."""
        return self._committed

    @property
    def lr(self) -> tuple[float, ...]:
        """The learning rates ηᵢ of the last applied push, one for each parameter group."""
        return self._lr

    def given_back(self) -> Tensor | None:
        """Return what this worker would give back if it left now, f32[P]; None if its rule gives nothing back."""
        if not self.rule.gives_back:
            return None
        given = torch.empty_like(next(iter(self._committed.values())))
        for group, (start, stop) in enumerate(self.role.layout.groups):
            self.rule.give_back(given[start:stop], cut(self._committed, start, stop), self._lr[group])
        return self.staging.lift(given)

    # ---- requests ------------------------------------------------------------------------------------------------

    def join(self, params: Tensor | None = None, untrained: Tensor | None = None) -> Join:
        """Enter the run, or enter it again after a refusal that asked for this.

        Worker 0 brings ``params`` f32[P], and ``untrained`` f32[U], which its model holds beside the parameters.

        A worker that was in the run already brings its newest view, because a restarted server may lack it.
        """
        role, newest = self.role, self.fetched or self._view
        return self._ask(
            Join(
                role.worker,
                role.incarnation,
                self._number(WorkerEvent.JOIN),
                role.digest,
                role.momentum,
                role.layout,
                role.plan,
                role.ahead,
                params if newest is None else newest.params,
                0 if newest is None else newest.version,
                0 if newest is None else newest.life,
                untrained,
            )
        )

    def local_step(self, step: LocalStep, params: Tensor, grad: Tensor | None, absent: Spans = ()) -> None:
        """Move ``params`` f32[P] by one mini-batch, on this worker alone. The next push includes the step.

        Parameters in ``absent`` spans stay as they are. Without a gradient, all parameters do.
        """
        self._move(WorkerEvent.LOCAL_STEP)
        if grad is not None:
            out = torch.empty_like(grad)
            for start, stop in self._displace(out, grad, step.lr, absent):
                params[start:stop].add_(out[start:stop])
        self._steps.append(step)

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
        if torch.equal(params, view) or not all_finite(view):
            return None
        return params - view

    def push(
        self,
        grad: Tensor | None,
        lr: Sequence[float],
        samples: int,
        loss: Loss,
        batch: int,
        params: Tensor | None = None,
        wants_view: bool = True,
        absent: Spans = (),
        edit: Tensor | None = None,
    ) -> Push:
        """Push what the rule makes of a batch's gradient f32[P], which was computed on the view at hand.

        After local steps, the push covers all of them: ``params`` f32[P] are where the steps have led, and the last
        batch may have no gradient. Parameters in ``absent`` spans make no step. If the rule pushes a displacement, the
        push also carries ``edit`` f32[P].
        """
        number = self._number(WorkerEvent.PUSH)
        assert self._view is not None
        assert wants_view or self.fetched is not None, "without a view, nothing can be computed next"
        step, who = LocalStep(batch, tuple(lr), samples, loss), self.role
        out, outbox = self._work_out(grad, step, self._view.params, params, absent, edit)
        steps = [*self._steps, step]
        if self.compressor is None and self.rule.pushes != "gradient":
            absent = ()  # the push is zero there already, except for an edit
        encoded = None
        if self.compressor is not None:
            self.staging.settle()
            sent = outbox.to("cpu")
            encoded = self.compressor.compress(sent, self.epoch, absent)
            out = outbox = sent.to(outbox.device)
        push = Push(
            worker=who.worker,
            incarnation=who.incarnation,
            request=number,
            view_version=self._view.version,
            lr=step.lr,
            samples=sum(each.samples for each in steps),
            loss=self._mean([each.loss for each in steps if each.loss is not None]),
            batch=step.batch,
            push=outbox,
            earlier=tuple(each.batch for each in self._steps),
            absent=absent,
            life=self._view.life,
            wants_view=wants_view,
            encoded=encoded,
        )
        self._undecided, self._ahead = number, not wants_view
        if not wants_view:
            self._turn(out)
        return self._ask(push)

    def _turn(self, push: Tensor) -> None:
        """Go on with the view that was fetched ahead, which does not contain ``push`` f32[P]."""
        self._view, self.fetched = self.fetched, None
        adds_up = self.push_moves_view and not self._in_doubt and all_finite(push)
        self._own = push if adds_up else None

    def compute_on(self, params: Tensor) -> None:
        """Fill ``params`` f32[P] with the values that the next gradient is to be computed on."""
        assert self._view is not None
        self.staging.load(params, self._view.params)
        # Remember both: in a pipeline, another view may have arrived before the batch on this one ends.
        self._loaded = self._view.params, self._own
        if self._own is not None:
            params.add_(self._own.to(params.device))

    def _work_out(
        self,
        grad: Tensor | None,
        step: LocalStep,
        view: Tensor,
        params: Tensor | None,
        absent: Spans,
        edit: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the push f32[P], and its outbox, where the link takes it from.

        The slices of the push are still on their way to the outbox, one after another.
        """
        slices: Iterator[tuple[int, int]]
        if grad is None:
            assert params is not None
            assert self._steps, "without a gradient, a push tells of local steps"
            out = torch.zeros_like(params)
            slices = ((start, stop) for _, start, stop in self.role.layout.slices(self.staging.slice_floats))
        else:
            out = torch.empty_like(grad)
            slices = self._displace(out, grad, step.lr, absent)
        outbox = self.staging.outbox(out)
        for start, stop in slices:
            if edit is not None and self.rule.pushes == "displacement":
                out[start:stop].add_(edit[start:stop])
            if self.rule.pushes == "parameters" or self._steps:
                assert params is not None
                out[start:stop].add_(params[start:stop])
            if self.rule.pushes != "parameters" and self._steps:  # x_K − x_0, the sum of all displacements
                out[start:stop].sub_(view[start:stop].to(out.device, non_blocking=True))
            self.staging.send(out, outbox, start, stop)
        return out, outbox

    def _mean(self, losses: list[float | Tensor]) -> float | None:
        """Return the mean of ``losses``; None if there is none, or if it is a tensor that ``complete`` reads later."""
        mean = sum(losses) / len(losses) if losses else None
        if not isinstance(mean, Tensor):
            return mean
        self._loss = self.staging.lift(mean.reshape(1))
        return None

    def _displace(self, out: Tensor, grad: Tensor, lr: tuple[float, ...], absent: Spans) -> Iterator[tuple[int, int]]:
        """Write what the rule makes of one gradient into ``out`` f32[P]; yield (start, stop) of each finished slice.

        In ``absent`` spans, write zeros and leave the rule's vectors as they are. After the last slice, the vectors
        have moved on tentatively.
        """
        new = self._spare.pop()
        contexts = [Context(*rates, 0.0, 0, self.version, 0) for rates in zip(lr, self._current_lr, strict=True)]
        for group, begin, end in self.role.layout.slices(self.staging.slice_floats):
            for start, stop, is_absent in parts(begin, end, absent):
                old = cut(self._current, start, stop)
                if is_absent:
                    out[start:stop].zero_()
                    for name, vector in old.items():
                        new[name][start:stop] = vector
                else:
                    self.rule.push(out[start:stop], grad[start:stop], old, cut(new, start, stop), contexts[group])
            yield begin, end
        if self._current is not self._committed:
            self._spare.append(self._current)
        self._current, self._current_lr = new, lr

    def pull(self, ahead: bool = False, skipped: Sequence[int] = ()) -> Pull:
        """Ask for batches when none are left at hand; with ``ahead``, ask for the view to use after the next push.

        The request also tells the server which batches were ``skipped``: they count as used, without a step.
        """
        number = self._number(WorkerEvent.PULL)
        self._ahead = ahead
        return self._ask(Pull(self.role.worker, self.role.incarnation, number, ahead, tuple(skipped)))

    def fetch(self) -> Fetch:
        """Ask for what worker 0's model holds beside the parameters."""
        return self._ask(Fetch(self.role.worker, self.role.incarnation, self._number(WorkerEvent.FETCH)))

    def leave(self, buffers: Tensor, edit: Tensor | None = None, stop: str = "") -> Leave:
        """Leave in good order, and send the batch-norm statistics f32[B] and the last ``edit`` f32[P].

        ``stop``, if given, says why the run is to end for all workers.
        """
        number, done = self._number(WorkerEvent.LEAVE), self.done or bool(stop)
        given = self.given_back()
        if edit is not None:
            given = self.staging.lift(edit) if given is None else given.add_(edit.to(given.device))
        who = self.role
        return self._ask(Leave(who.worker, who.incarnation, number, given, buffers, done=done, stop=stop))

    def report(self, figures: dict[str, float | str | None]) -> Report:
        """Send figures for summary.json. Raises OutOfRangeError if they are too many or too long."""
        check_reported(figures)
        return self._ask(Report(self.role.worker, self.role.incarnation, self._number(WorkerEvent.REPORT), figures))

    def bye(self) -> Bye:
        """End the conversation."""
        return self._ask(Bye(self.role.worker, self.role.incarnation, self._number(WorkerEvent.BYE)))

    def complete(self, request: Asked) -> Asked:
        """Return ``request`` once all its parts have arrived. This is the only wait for the device in a step."""
        self.staging.settle()
        if not isinstance(request, Push) or self._loss is None:
            return request
        loss, self._loss = self._loss.item(), None
        return replace(request, loss=loss)

    def _number(self, event: WorkerEvent) -> int:
        """Return the number of a new request. Raises IllegalTransitionError if the worker may not make it now."""
        WORKER_TRANSITIONS.after(self.state, event, str(self.role.worker))
        self._request += 1
        return self._request

    def _ask(self, request: Asked) -> Asked:
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
                self._keep(View(reply.version, reply.life, reply.view))
            # If the answer to a push was lost, the server may have applied the push before it gave this worker up.
            applied = reply.applied if asked is WorkerState.PUSHING else reply.last_applied == self._undecided != 0
            differing = [part for part in reply.parts if (part[2] == self._undecided != 0) != applied]
            self.applied = applied
            self._commit(applied, [(start, stop) for start, stop, _ in differing])
            if asked is WorkerState.PUSHING:
                self._in_doubt = not applied
                self._heed(reply)
        elif isinstance(reply, Refusal):
            self._in_doubt = True
            if asked is WorkerState.JOINING and reply.newest >= self.role.incarnation:
                # This process took its incarnation number from a clock that is slow, so it takes a higher number. (A
                # worker that was in the run already, and was replaced, does not come back.)
                self.role = replace(self.role, incarnation=reply.newest + 1)

    def _heed(self, reply: Parameters) -> None:
        """Start afresh after FRESH_AFTER pushes in a row were refused for their values.

        With the same velocity and residual, the server would refuse the next push, too. The worker forfeits its share
        of the look-ahead, as a worker that crashes does: the vectors led to the refused pushes, so giving them back
        would move the parameters just as far.
        """
        self._sick_in_a_row = 0 if reply.applied else self._sick_in_a_row + (reply.refused in SICK)
        if self._sick_in_a_row < FRESH_AFTER:
            return
        self._sick_in_a_row = 0
        for vector in self._committed.values():
            vector.zero_()
        if self.compressor:
            self.compressor.forget()

    @property
    def version(self) -> int:
        """The version of the view at hand."""
        return 0 if self._view is None else self._view.version

    def _keep(self, view: View) -> None:
        if self._ahead:
            self.fetched = view
        else:
            self._view, self.fetched, self._own = view, None, None

    def _commit(self, applied: bool, otherwise: Sequence[tuple[int, int]] = ()) -> None:
        """Keep the steps since the last push, or undo them; in the ``otherwise`` slices, do the opposite."""
        self._steps, self._undecided = [], 0
        if self.compressor:
            self.compressor.settle(applied, otherwise)
        if self._current is self._committed:
            return
        for start, stop in otherwise:
            kept, dropped = (self._current, self._committed) if applied else (self._committed, self._current)
            for name, vector in kept.items():
                vector[start:stop] = dropped[name][start:stop]
        if applied:
            self._spare.append(self._committed)
            self._committed, self._lr = self._current, self._current_lr
        else:
            self._spare.append(self._current)
            self._current, self._current_lr = self._committed, self._lr
        if applied and self.rule.resets:
            for vector in self._committed.values():
                vector.zero_()


class Backoff:
    """Growing waits between repetitions: each is twice the one before, up to a cap, plus a random 0 to 50 %."""

    def __init__(self, first_s: float, longest_s: float, seed: int):
        self._next_s = first_s
        self._longest_s = longest_s
        self._random = random.Random(seed)

    def wait_s(self) -> float:
        wait_s, self._next_s = self._next_s, min(2 * self._next_s, self._longest_s)
        return wait_s * (1 + self._random.random() / 2)


def answers(reply: Reply, request: Request) -> bool:
    """Return whether this reply answers ``request``, and is not a late reply to an earlier request.

    A refusal with number 0 comes from a server that could not read the request.
    """
    return reply.request == request.request or (isinstance(reply, Refusal) and reply.request == 0)
