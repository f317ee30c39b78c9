"""A worker without I/O: which request may follow which, and what the worker remembers after a refusal."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite

import pytest
import torch
from axis import of
from cluster import DIGEST, layout_of
from torch import Tensor

from danaz.optimizers import SGD, Optimizers
from danaz.protocol.messages import Bye, Final, Join, Noted, Parameters, Plan, Pull, Push, Refusal
from danaz.protocol.transitions import IllegalTransitionError
from danaz.rules import find_algorithm
from danaz.vectors.codecs import Compressor, push_codec
from danaz.worker.core import Role, Step, WorkerCore, answers

SIZE = 3
ROLE = Role(2, 4, DIGEST, SGD, layout_of(SIZE, buffers=1), Plan(10, 1), ahead=2)
NO_BUFFERS = torch.zeros(1)


def worker(algorithm: str = "dana", optimizers: Optimizers = SGD, **hyperparameters: object) -> WorkerCore:
    rule = find_algorithm(algorithm).rule(optimizer=optimizers, **hyperparameters).worker_rule  # type: ignore[arg-type]
    return WorkerCore(replace(ROLE, optimizers=optimizers), rule)


def view(request: int, *, version: int = 0, applied: bool = False, refused: str = "") -> Parameters:
    return Parameters(request, version, applied, refused, (0, 1), False, 0.0, 0, None, torch.zeros(SIZE))


def joined(algorithm: str = "dana", optimizers: Optimizers = SGD, **hyperparameters: object) -> WorkerCore:
    core = worker(algorithm, optimizers, **hyperparameters)
    core.receive(view(core.join().request))
    return core


def ones(value: float = 1.0) -> Tensor:
    return torch.full((SIZE,), value)


def state(core: WorkerCore) -> list[object]:
    return [core.counts, {name: vector.tolist() for name, vector in core.vectors.items()}, core.given_back()]


class TestRequests:
    def test_each_says_who_and_has_a_number_of_its_own(self):
        core = worker()
        join = core.join(ones())
        assert (join.worker, join.incarnation, join.request, join.digest, join.ahead) == (2, 4, 1, DIGEST, 2)
        assert (join.layout, join.plan, join.optimizers) == (ROLE.layout, ROLE.plan, SGD)
        core.receive(view(1, version=5))
        push = core.push(Step(1, (0.1,), 8, 0.5), ones())
        assert (push.worker, push.incarnation, push.request, push.view_version) == (2, 4, 2, 5)
        assert (push.lr, push.samples, push.loss, push.batch) == ((0.1,), 8, 0.5, 1)
        core.receive(view(2, version=6, applied=True))
        assert core.pull().request == 3

    def test_a_whole_conversation(self):
        core = joined()
        core.push(Step(0, (0.1,), 1, None), ones())
        core.receive(view(2, applied=True))
        core.leave(NO_BUFFERS)
        core.receive(Final(3, 1, False, ones(), NO_BUFFERS))
        core.report({"test_error_percent": 1.0})
        core.receive(Noted(4))
        assert core.bye() == Bye(2, 4, 5)
        core.receive(Noted(5))

    @pytest.mark.parametrize("event", ["push", "pull", "leave", "report", "bye"])
    def test_nothing_before_joining(self, event):
        core = worker()
        with pytest.raises(
            IllegalTransitionError, match=f"worker 2: the event '{event}' is not allowed in the state 'new'"
        ):
            ask(core, event)

    @pytest.mark.parametrize("event", ["join", "push", "pull", "leave"])
    def test_no_work_after_leaving(self, event):
        core = joined()
        core.leave(NO_BUFFERS)
        core.receive(Final(2, 1, False, ones(), NO_BUFFERS))
        with pytest.raises(IllegalTransitionError, match=f"worker 2: the event '{event}' .* the state 'left'"):
            ask(core, event)

    @pytest.mark.parametrize("event", ["report", "bye"])
    def test_no_goodbye_before_leaving(self, event):
        with pytest.raises(IllegalTransitionError, match=f"worker 2: the event '{event}' .* the state 'joined'"):
            ask(joined(), event)

    @pytest.mark.parametrize("event", ["join", "push", "pull", "leave"])
    def test_one_at_a_time(self, event):
        core = joined()
        core.pull()
        with pytest.raises(IllegalTransitionError, match=f"worker 2: the event '{event}' .* the state 'pulling'"):
            ask(core, event)

    def test_an_answer_that_nobody_asked_for(self):
        with pytest.raises(IllegalTransitionError, match=r"worker 2: the event 'view' .* the state 'joined'"):
            joined().receive(view(1))

    def test_after_a_refusal_it_may_join_again(self):
        core = joined()
        core.push(Step(0, (0.1,), 1, None), ones())
        core.receive(Refusal(2, "worker was silent too long and was given up", rejoin=True))
        again = core.join()
        assert isinstance(again, Join)
        assert (again.request, again.incarnation) == (3, 4)


def ask(core: WorkerCore, event: str) -> None:
    if event == "push":
        core.push(Step(0, (0.1,), 1, None), ones())
    elif event == "leave":
        core.leave(NO_BUFFERS)
    elif event == "report":
        core.report({})
    else:
        getattr(core, event)()


class TestCommitOnAcceptance:
    def test_an_applied_push_moves_the_velocity(self):
        core = joined()
        push = core.push(Step(0, (0.1,), 1, None), ones(2.0))
        assert torch.allclose(push.push, ones(-0.1 * 2.0 * 1.9))
        assert core.vectors["velocity"].tolist() == [0, 0, 0], "not before the server says so"
        core.receive(view(2, applied=True))
        assert core.vectors["velocity"].tolist() == [2, 2, 2]
        assert (core.counts.counts, core.counts.rates) == ((1,), (0.1,))

    @pytest.mark.parametrize(
        "reply", [view(3, refused="push is not finite"), view(3), Refusal(3, "given up", rejoin=True)]
    )
    def test_a_refused_push_does_not(self, reply):
        core = joined()
        core.push(Step(0, (0.1,), 1, None), ones())
        core.receive(view(2, applied=True))
        before = str(state(core))
        core.push(Step(1, (0.7,), 1, None), ones(float("nan")))
        core.receive(reply)
        if isinstance(reply, Refusal):
            core.receive(view(core.join().request))
        assert str(state(core)) == before
        after_the_nan = core.push(Step(1, (0.1,), 1, None), ones(3.0))
        assert torch.allclose(after_the_nan.push, ones(-0.1 * (0.9 * (0.9 + 3) + 3)))

    @of("sgd adamw nadam rmsprop adagrad")
    @pytest.mark.parametrize("sync_period", [1, 3])
    def test_of_refused_pushes_no_state_keeps_a_trace(self, optimizers, sync_period):
        """Neither a vector nor a count nor a rate does: all later pushes are as if the refused ones had not been."""
        often, never = (joined("dana", optimizers, sync_period=sync_period) for _ in "ab")
        refusals = {0: view(0), 2: view(0, refused="push is not finite"), 3: Refusal(0, "given up", rejoin=True)}
        for turn in range(6):
            if turn in refusals:
                bad, absent = (float("nan"), ()) if turn == 2 else (7.0, ((0, 1),))
                push = self.push_of(often, 0.7, bad, sync_period, absent)
                often.receive(replace(refusals[turn], request=push.request))
            if turn == 3:
                often.receive(view(often.join().request))
            pushes = [self.push_of(core, 0.1 / (1 + turn), 1.0 + turn, sync_period) for core in (often, never)]
            assert torch.equal(pushes[0].push, pushes[1].push), turn
            for core, push in zip((often, never), pushes, strict=True):
                core.receive(view(push.request, applied=True))
            assert torch.equal(often.given_back(), never.given_back())

    def push_of(
        self, core: WorkerCore, lr: float, value: float, steps: int, absent: tuple[tuple[int, int], ...] = ()
    ) -> Push:
        params = torch.zeros(SIZE)
        for batch in range(steps - 1):
            core.local_step(Step(batch, (lr,), 1, None, absent), ones(value + batch), params)
        return core.push(Step(steps, (lr,), 1, None, absent), ones(value), params)

    @pytest.mark.parametrize("was_applied", [True, False])
    def test_a_worker_that_was_given_up_learns_whether_its_last_push_had_been_applied(self, was_applied):
        core = joined()
        core.push(Step(0, (0.1,), 1, None), ones())
        core.receive(view(2, applied=True))
        core.push(Step(1, (0.1,), 1, None), ones())  # request 3, whose answer is lost
        core.receive(Refusal(3, "worker was silent too long and was given up", rejoin=True))
        join = core.join()
        core.receive(replace(view(join.request), last_applied=3 if was_applied else 2))
        assert core.vectors["velocity"].tolist() == ones(1.9 if was_applied else 1.0).tolist()

    def test_other_answers_do_not_commit(self):
        core = joined()
        core.pull()
        core.receive(view(2, applied=True))
        assert core.vectors["velocity"].tolist() == [0, 0, 0]

    def test_what_is_given_back(self):
        """The worker gives back γηv of the last applied push."""
        core = joined()
        core.push(Step(0, (0.1,), 1, None), ones(2.0))
        core.receive(view(2, applied=True))
        leave = core.leave(NO_BUFFERS)
        assert leave.give_back is not None
        assert torch.allclose(leave.give_back, ones(0.9 * 0.1 * 2.0))

    @pytest.mark.parametrize("algorithm", ["asgd", "dana-zero", "ssgd", "easgd", "bmuf"])
    def test_rules_that_keep_nothing_of_the_model_give_nothing_back(self, algorithm):
        assert joined(algorithm).leave(NO_BUFFERS).give_back is None

    def test_the_push_is_a_buffer_of_its_own(self):
        """The push may still be travelling while the next gradient is computed into the flat vector."""
        grad = ones()
        push = joined("asgd").push(Step(0, (0.1,), 1, None), grad)
        grad.fill_(9)
        assert push.push.tolist() == [1, 1, 1]


class TestCompressedPushes:
    """onebit replaces the positive elements by their mean, and the other elements by theirs."""

    def joined(self, algorithm: str = "asgd", first_epoch: float = 0.0, **hyperparameters: object) -> WorkerCore:
        rule = find_algorithm(algorithm).rule(**hyperparameters).worker_rule
        core = WorkerCore(ROLE, rule, compressor=Compressor(push_codec("onebit"), [(0, SIZE)], first_epoch))
        core.receive(view(core.join().request))
        return core

    def pushed(self, core: WorkerCore, *grad: float) -> list[float]:
        return core.push(Step(0, (0.1,), 1, None), torch.tensor(grad)).push.tolist()

    def test_the_server_gets_what_it_would_decode(self):
        push = self.joined().push(Step(0, (0.1,), 1, None), torch.tensor([1.0, 3.0, -1.0]))
        assert push.push.tolist() == [2, 2, -1]
        assert push.encoded is not None
        decoded = torch.empty(SIZE)
        push_codec(push.encoded.codec).decode(push.encoded.chunks[0], decoded)
        assert decoded.tolist() == [2, 2, -1]

    def test_what_is_lost_goes_with_the_next_push(self):
        core = self.joined()
        self.pushed(core, 1.0, 3.0, -1.0)  # the codec loses -1, 1, 0
        core.receive(view(2, applied=True))
        assert self.pushed(core, 2.0, 2.0, -1.0) == [2, 2, -1]  # this is 1, 3, -1, compressed

    @of("sgd adamw")
    def test_error_feedback_and_the_state_go_back_together(self, optimizers):
        """Under dana, what is compressed is the displacement that the optimizer made."""
        refused, clean = self.joined("dana", optimizer=optimizers), self.joined("dana", optimizer=optimizers)
        for turn in range(5):
            grad = torch.tensor([1.0, 3.0 + turn, -1.0])
            if turn % 2:
                push = refused.push(Step(0, (0.3,), 1, None), 9 * grad, torch.zeros(SIZE))
                refused.receive(view(push.request, refused="batch was not leased to this worker"))
            pushes = [core.push(Step(0, (0.1,), 1, None), grad, torch.zeros(SIZE)) for core in (refused, clean)]
            assert torch.equal(pushes[0].push, pushes[1].push)
            for core, push in zip((refused, clean), pushes, strict=True):
                core.receive(view(push.request, applied=True))

    @pytest.mark.parametrize("reply", [view(2, refused="push is not finite"), Refusal(2, "given up", rejoin=True)])
    def test_what_a_refused_push_lost_does_not(self, reply):
        core = self.joined()
        self.pushed(core, 1.0, 3.0, -1.0)
        core.receive(reply)
        if isinstance(reply, Refusal):
            core.receive(view(core.join().request))
        assert self.pushed(core, 2.0, 4.0, -1.0) == [3, 3, -1]

    def test_a_worker_that_was_given_up_keeps_it_if_the_push_had_been_applied(self):
        core = self.joined()
        self.pushed(core, 1.0, 3.0, -1.0)
        core.receive(Refusal(2, "worker was silent too long and was given up", rejoin=True))
        core.receive(replace(view(core.join().request), last_applied=2))
        assert self.pushed(core, 2.0, 4.0, -1.0) == [3, 3, -1]  # this is 1, 5, -1, compressed
        core.receive(view(4, applied=True))
        assert self.pushed(core, 3.0, 1.0, -1.0) == [2, 2, -1]  # this is 1, 3, -1, compressed

    def test_pushes_are_not_compressed_in_the_first_epochs(self):
        core = self.joined(first_epoch=1.5)
        push = core.push(Step(0, (0.1,), 1, None), torch.tensor([1.0, 3.0, -1.0]))
        assert (push.push.tolist(), push.encoded) == ([1, 3, -1], None)
        core.receive(replace(view(2, applied=True), epoch=1.5))
        assert self.pushed(core, 1.0, 3.0, -1.0) == [2, 2, -1]

    def test_local_steps_are_compressed_as_one(self):
        core, params = self.joined("asgd", sync_period=2), torch.zeros(SIZE)
        core.local_step(Step(0, (1.0,), 1, None), torch.tensor([1.0, 1.0, 1.0]), params)
        push = core.push(Step(1, (1.0,), 1, None), torch.tensor([1.0, 3.0, -2.0]), params)
        assert push.push.tolist() == [-3, -3, 1]

    @pytest.mark.parametrize("absent", [((2, 3),), ((0, 2),)])
    def test_a_parameter_that_only_one_of_several_steps_leaves_alone_moves(self, absent):
        core, params = self.joined("asgd", sync_period=2), torch.zeros(SIZE)
        core.local_step(Step(0, (1.0,), 1, None), ones(), params)
        push = core.push(Step(1, (1.0,), 1, None, absent), ones(0.0), params)
        assert push.push.tolist() == [-1, -1, -1]
        assert push.absent == ()

    def test_a_parameter_that_all_steps_leave_alone_stays(self):
        core, params = self.joined("asgd", sync_period=2), torch.zeros(SIZE)
        core.local_step(Step(0, (1.0,), 1, None, ((0, 2),)), ones(), params)
        push = core.push(Step(1, (1.0,), 1, None, ((1, 3),)), ones(), params)
        assert push.absent == ((1, 2),)
        assert push.push[1] == 0

    def test_an_edit_of_a_parameter_that_all_steps_leave_alone_is_pushed(self):
        core, params = self.joined("asgd", sync_period=2), torch.zeros(SIZE)
        core.local_step(Step(0, (1.0,), 1, None, ((0, 3),)), ones(), params)
        push = core.push(Step(1, (1.0,), 1, None, ((0, 3),)), ones(), params.sub_(2.0))
        assert push.push.tolist() == [-2, -2, -2]
        assert push.absent == ()

    def test_an_edit_of_a_parameter_without_a_gradient_is_pushed(self):
        core = self.joined("dana")
        push = core.push(Step(0, (0.1,), 1, None, ((0, 3),)), ones(), edit=ones(-2.0))
        assert push.push.tolist() == [-2, -2, -2]
        assert push.absent == ()

    def test_values_that_are_not_finite_arrive_as_such(self):
        """The server must see it, to refuse the push and count it."""
        core = self.joined()
        assert any(not isfinite(value) for value in self.pushed(core, 1.0, float("nan"), 2.0))
        core.receive(view(2, refused="push is not finite"))
        assert self.pushed(core, 1.0, 3.0, -1.0) == [2, 2, -1]


class TestLocalSteps:
    def walk(self, core: WorkerCore, *values: float) -> Tensor:
        params = ones(0.0)
        for batch, value in enumerate(values):
            core.local_step(Step(batch, (0.1,), 4, float(batch)), ones(value), params)
        return params

    def test_they_move_only_the_worker(self):
        core = joined("asgd", sync_period=3)
        assert torch.allclose(self.walk(core, 1.0, 2.0), ones(-0.3))

    def test_the_push_contains_all_of_them(self):
        core = joined("asgd", sync_period=3)
        params = self.walk(core, 1.0, 2.0)
        push = core.push(Step(7, (0.1,), 6, 4.0), ones(4.0), params)
        assert torch.allclose(push.push, ones(-0.7))
        assert (push.samples, push.loss, push.batch, push.earlier, push.batches) == (14, 5 / 3, 7, (0, 1), (0, 1, 7))

    @pytest.mark.parametrize("applied", [True, False])
    def test_a_refusal_takes_all_of_them_back(self, applied):
        core = joined("dana", sync_period=3)
        before = str(state(core))
        push = core.push(Step(7, (0.1,), 6, 4.0), ones(4.0), self.walk(core, 1.0, 2.0))
        core.receive(view(push.request, applied=applied))
        assert (str(state(core)) == before) is not applied
        assert core.push(Step(8, (0.1,), 1, None), ones()).earlier == ()

    def test_many_rounds_of_refusals_and_acceptances(self):
        """No vector is used for two purposes at once."""
        core, velocity = joined("dana", sync_period=3), torch.zeros(SIZE)
        for turn in range(12):
            push = core.push(Step(7, (0.1,), 1, None), ones(3.0), self.walk(core, 1.0, 2.0))
            applied = turn % 3 != 1
            if applied:
                for value in (1.0, 2.0, 3.0):
                    velocity = 0.9 * velocity + value
            core.receive(view(push.request, applied=applied))
            assert torch.allclose(core.vectors["velocity"], velocity)

    def test_no_local_step_while_an_answer_is_awaited(self):
        core = joined("dana", sync_period=3)
        core.pull()
        with pytest.raises(IllegalTransitionError, match="worker 2: the event 'local step'"):
            self.walk(core, 1.0)


class TestAnswers:
    def test_only_the_reply_to_this_request(self):
        assert answers(Noted(7), Pull(0, 1, 7))
        assert not answers(Noted(6), Pull(0, 1, 7)), "it is a late reply to an earlier request"

    def test_a_server_that_could_not_read_the_request_cannot_say_which(self):
        assert answers(Refusal(0, "unreadable", rejoin=False), Pull(0, 1, 7))


def test_a_view_that_arrives_during_a_batch_is_no_edit() -> None:
    """In a pipeline, the worker may have to join again while the script computes on the view before."""
    core, params = joined("dana"), torch.zeros(3)
    core.compute_on(params)
    join = core.join()
    core.receive(Parameters(join.request, 7, False, "", (1,), False, 0.0, 0, None, torch.full((3,), 5.0)))
    assert core.edit(params) is None
    params.add_(1.0)
    edit = core.edit(params)
    assert edit is not None
    assert edit.tolist() == [1.0] * 3
