"""Each push is applied once, and an unsound push changes nothing."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from axis import under
from stimuli import GRADIENT, INF, JOIN, NAN, SIZE, answer, arithmetic_of, make_core, parameters, push_on, started

from danaz.optimizers import Optimizers
from danaz.protocol.messages import (
    Heartbeat,
    Parameters,
    Pull,
    Refusal,
)
from danaz.server.core import ServerCore


class TestExactlyOnce:
    def test_a_push_is_applied(self):
        core, view = started("asgd")
        reply = parameters(core.handle(0, push_on(view), 1.0))
        assert (reply.applied, reply.refused, reply.version, reply.request) == (True, "", 1, 2)
        assert torch.equal(reply.view, torch.ones(SIZE) - 0.1 * GRADIENT)
        assert reply.leases == (1,)
        assert reply.epoch == 0.1

    @under(
        {
            **dict.fromkeys(("asgd", "nag-asgd", "multi-asgd", "dana"), "sgd adamw"),
            "dana-zero": "sgd adamw nadam",
            "dana-ga": "adamw",
            "dana-nadam": "sgd",
        }
    )
    def test_a_repeated_push_is_applied_once(self, algorithm, optimizers):
        core, view = started(algorithm, workers=2, optimizers=optimizers)
        push = push_on(view)
        first = parameters(core.handle(0, copy.deepcopy(push), 1.0))
        before = arithmetic_of(core)
        again = parameters(core.handle(0, copy.deepcopy(push), 2.0))
        assert arithmetic_of(core) == before
        assert (again.applied, again.version, again.leases) == (True, first.version, first.leases)
        assert torch.equal(again.view, first.view)

    def test_the_repeated_push_is_answered_with_the_view_of_now(self):
        """The reply was lost, and meanwhile another worker pushed."""
        core, view = started("asgd", workers=2)
        core.handle(0, push_on(view), 1.0)
        core.handle(1, push_on(view, worker=1, batch=1), 1.0)
        again = parameters(core.handle(0, push_on(view), 2.0))
        assert (again.applied, again.version) == (True, 2)
        assert torch.equal(again.view, core.master.params)
        assert parameters(core.handle(0, push_on(again, request=3), 3.0)).applied

    def test_a_late_copy_of_an_answered_push_is_dropped(self):
        core, view = started("asgd")
        second = parameters(core.handle(0, push_on(view), 1.0))
        core.handle(0, push_on(second, request=3), 2.0)
        before = arithmetic_of(core)
        assert core.handle(0, push_on(view), 3.0) == []
        assert arithmetic_of(core) == before

    def test_a_late_copy_of_the_join_changes_nothing(self):
        """Otherwise late copies of old pushes would look new. A new process learns why it may not join."""
        core, view = started("asgd")
        for request in (2, 3):
            view = parameters(core.handle(0, push_on(view, request=request), 1.0))
        refusal = answer(core.handle("old route", JOIN, 2.0), "old route")
        assert isinstance(refusal, Refusal)
        assert refusal.request == 1
        assert "this incarnation of the worker has joined and gone on" in refusal.reason
        assert "DANAZ_INCARNATION" in refusal.reason
        assert core.handle(0, push_on(view, request=2), 2.0) == [], "still an old one"
        assert parameters(core.handle(0, push_on(view, request=4), 3.0)).applied

    def test_a_push_on_another_view_is_refused_and_its_batch_leased_again(self):
        core, view = started("asgd", workers=2)
        before = arithmetic_of(core)
        reply = parameters(core.handle(0, push_on(view, view_version=7), 1.0))
        assert not reply.applied
        assert "another view" in reply.refused
        assert reply.leases == (0,), "the first worker that asks gets it, which is the same worker"
        assert arithmetic_of(core) == before
        assert core.leases.completed == 0
        assert parameters(core.handle(0, push_on(reply, request=3), 2.0)).applied

    def test_the_late_reply_to_a_repeated_push(self):
        """The worker took the first reply, the server expects the second: the push is redone, nothing is lost."""
        core, view = started("asgd", workers=2)
        first = parameters(core.handle(0, push_on(view), 1.0))
        core.handle(1, push_on(view, worker=1, batch=1), 1.0)
        core.handle(0, push_on(view), 2.0)
        reply = parameters(core.handle(0, push_on(first, request=3), 3.0))
        assert "another view" in reply.refused
        assert parameters(core.handle(0, push_on(reply, request=4), 4.0)).applied
        assert core.leases.completed == 3
        assert core.master.version == 3

    def test_a_push_once_refused_is_not_applied_later(self):
        """A copy comes when it would be valid. The worker may have read the refusal, and restored its velocity."""
        core, view = started("asgd", workers=2)
        push = push_on(view, view_version=1)
        assert "another view" in parameters(core.handle(0, push, 1.0)).refused
        core.handle(1, push_on(view, worker=1, batch=1), 2.0)
        assert parameters(core.handle(0, push, 3.0)).version == 1, "the view that the push says it was computed on"
        assert "another view" in parameters(core.handle(0, push, 4.0)).refused
        assert core.master.version == 1

    def test_a_join_repeated_while_a_round_is_open(self):
        """The answer is still to come: the worker's push is in this round already."""
        core, view = started("ssgd", workers=2)
        core.handle(0, push_on(view), 1.0)
        again = parameters(core.handle(1, replace(JOIN, worker=1, params=None), 2.0), 1)
        core.handle(1, push_on(again, worker=1), 3.0)
        assert core.master.version == 1

    def test_a_push_waiting_for_its_round_is_taken_once(self):
        core, view = started("ssgd", workers=2)
        assert core.handle(0, push_on(view), 1.0) == []
        assert core.handle(0, push_on(view), 2.0) == []
        replies = core.handle(1, push_on(view, worker=1, batch=1), 3.0)
        assert {route for route, _ in replies} == {0, 1}
        assert core.master.version == 1
        assert torch.allclose(core.master.params, torch.ones(SIZE) - 0.1 * GRADIENT)

    def test_a_pull_is_answered_again(self):
        core, _ = started()
        one, two = (parameters(core.handle(0, Pull(0, 1, 2), float(t))) for t in (1, 2))
        assert one.leases == two.leases == (0,)

    def test_a_heartbeat_comes_from_another_socket(self):
        """It must not get the answers meant for the new process."""
        core = make_core("ssgd", workers=2)
        core.handle("a", JOIN, 0.0)
        core.handle("heart of a", Heartbeat(0, 1), 5.0)
        replies = core.handle("b", replace(JOIN, worker=1, params=None), 6.0)
        assert {route for route, _ in replies} == {"a", "b"}
        core.handle("a", push_on(parameters(replies, "a")), 7.0)
        core.handle("heart of a", Heartbeat(0, 1), 12.0)
        replies = core.handle("b", push_on(parameters(replies, "b"), worker=1), 13.0)
        assert {route for route, _ in replies} == {"a", "b"}

    def test_answers_follow_a_worker_that_reconnected(self):
        core, view = started("asgd")
        assert parameters(core.handle("new route", push_on(view), 1.0), "new route").applied


UNSOUND = {
    "NaN": {"push": torch.tensor([1.0, NAN, 1.0])},
    "infinity": {"push": torch.tensor([1.0, INF, 1.0])},
    "minus infinity": {"push": torch.tensor([-INF, 1.0, 1.0])},
    "all NaN": {"push": torch.full((SIZE,), NAN)},
    "NaN loss": {"loss": NAN},
    "infinite loss": {"loss": INF},
    "NaN rate": {"lr": (NAN,)},
    "infinite rate": {"lr": (INF,)},
    "negative rate": {"lr": (-0.1,)},
    "rate beyond float32": {"lr": (1e300,)},
    "negative samples": {"samples": -1},
}
MISFITS = {
    "too short": {"push": torch.ones(SIZE - 1)},
    "too long": {"push": torch.ones(SIZE + 1)},
    "empty": {"push": torch.ones(0)},
    "no rate": {"lr": ()},
    "too many rates": {"lr": (0.1, 0.1)},
}
NOT_LEASED = {
    "batch of another": {"batch": 1},
    "batch of nobody": {"batch": 15},
    "no such batch": {"batch": 10**9},
    "negative batch": {"batch": -1},
    "earlier batch of another": {"earlier": (1,)},
    "the same batch twice": {"earlier": (0,)},
}


class TestOrders:
    def test_a_push_out_of_another_order_is_refused_for_good(self):
        core, view = started("asgd", workers=2)
        core.handle(0, replace(push_on(view), order=5), 1.0)
        before = arithmetic_of(core)
        push = replace(push_on(view, worker=1, batch=1), order=6)
        for _ in range(2):
            [(_, reply)] = core.handle(1, copy.deepcopy(push), 1.0)
            assert isinstance(reply, Refusal)
            assert (reply.rejoin, "other batches in this epoch" in reply.reason) == (False, True)
        assert arithmetic_of(core) == before

    @pytest.mark.parametrize("order", [0, 5])
    def test_a_push_out_of_the_same_or_an_unknown_order_is_applied(self, order):
        core, view = started("asgd", workers=2)
        core.handle(0, replace(push_on(view), order=5), 1.0)
        assert parameters(core.handle(1, replace(push_on(view, worker=1, batch=1), order=order), 1.0), 1).applied


@under(
    {"dana-zero": "sgd adamw", "dana-ga": "adamw", "dana": "sgd", "nag-asgd": "adamw", "ssgd": "adamw", "bmuf": "sgd"}
)
class TestWhatTouchesNothing:
    def worn(self, algorithm: str, optimizers: Optimizers) -> tuple[ServerCore, Parameters, list[object]]:
        """Return a core with two workers that each have pushed, so that no vector is zero."""
        core, view = started(algorithm, workers=2, optimizers=optimizers)
        core.handle(0, push_on(view), 1.0)
        replies = core.handle(1, push_on(view, worker=1, batch=1), 1.0)
        view = parameters(replies) if algorithm in ("ssgd", "bmuf") else parameters(core.handle(0, Pull(0, 1, 3), 1.0))
        return core, view, arithmetic_of(core)

    @pytest.mark.parametrize("change", UNSOUND.values(), ids=UNSOUND)
    def test_an_unsound_push(self, algorithm, optimizers, change):
        core, view, before = self.worn(algorithm, optimizers)
        reply = parameters(core.handle(0, push_on(view, request=4, **change), 2.0))
        assert arithmetic_of(core) == before
        assert (reply.applied, reply.refused) == (False, "push is not finite")
        assert core.totals.refusals == {"push is not finite": 1}
        assert core.leases.completed == 3, "the batch counts as used: computed again, it would be no better"
        assert not core.diverged

    @pytest.mark.parametrize("change", MISFITS.values(), ids=MISFITS)
    def test_a_push_of_the_wrong_size(self, algorithm, optimizers, change):
        core, view, before = self.worn(algorithm, optimizers)
        reply = parameters(core.handle(0, push_on(view, request=4, **change), 2.0))
        assert arithmetic_of(core) == before
        assert reply.refused == "push has the wrong size"
        assert core.totals.refusals == {"push has the wrong size": 1}
        assert core.leases.completed == 2
        assert view.leases[0] in reply.leases

    @pytest.mark.parametrize("change", NOT_LEASED.values(), ids=NOT_LEASED)
    def test_a_push_of_batches_it_does_not_hold(self, algorithm, optimizers, change):
        core, view, before = self.worn(algorithm, optimizers)
        change = {"earlier": (view.leases[0],)} if change == {"earlier": (0,)} else change
        reply = parameters(core.handle(0, push_on(view, request=4, **change), 2.0))
        assert arithmetic_of(core) == before
        assert reply.refused == "batch was not leased to this worker"
        assert core.leases.completed == 2
        assert not core.leases.holds(1, view.leases[0])

    def test_the_refused_push_repeated(self, algorithm, optimizers):
        """Its answer was lost. It is refused again, without another strike."""
        core, view, before = self.worn(algorithm, optimizers)
        for now in (2.0, 3.0, 4.0, 5.0):
            reply = parameters(core.handle(0, push_on(view, request=4, **UNSOUND["NaN"]), now))
            assert (reply.applied, reply.refused) == (False, "push is not finite")
        assert arithmetic_of(core) == before
        assert core.members[0].strikes == 1
        assert core.leases.completed == 3

    def test_and_the_run_goes_on(self, algorithm, optimizers):
        core, view, _ = self.worn(algorithm, optimizers)
        version = core.master.version
        reply = parameters(core.handle(0, push_on(view, request=4, **UNSOUND["NaN"]), 2.0))
        core.handle(0, push_on(reply, request=5), 3.0)
        other = parameters(core.handle(1, Pull(1, 1, 3), 3.0), 1)
        core.handle(1, push_on(other, worker=1, request=4), 3.0)
        assert core.master.version > version
