"""Every batch of a run is completed once, whichever workers die meanwhile."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danaz.protocol.messages import Plan
from danaz.server.leases import Leases


def test_batches_go_out_in_order():
    leases = Leases(Plan(batches_per_epoch=2, epochs=2))
    assert leases.lease_up_to(0, 2) == (0, 1)
    assert leases.lease_up_to(1, 1) == (2,)
    assert leases.lease_up_to(0, 2) == (0, 1), "it holds enough already"
    leases.complete(0, 0)
    assert leases.lease_up_to(0, 3) == (1, 3)
    assert leases.lease_up_to(1, 9) == (2,), "none are left"


def test_what_a_lost_worker_held_comes_before_anything_new():
    leases = Leases(Plan(10, 1))
    leases.lease_up_to(0, 3)
    leases.lease_up_to(1, 1)
    leases.give_up(0)
    assert not leases.holds(0, 0)
    assert leases.lease_up_to(1, 5) == (3, 0, 1, 2, 4)


def test_a_batch_put_back_is_for_whoever_comes_first():
    leases = Leases(Plan(10, 1))
    leases.lease_up_to(0, 2)
    leases.put_back(0, 0)
    assert not leases.holds(0, 0)
    assert leases.lease_up_to(1, 2) == (0, 2)


def test_the_epoch_counts_what_is_completed():
    leases = Leases(Plan(batches_per_epoch=4, epochs=2))
    leases.lease_up_to(0, 3)
    assert leases.epoch == 0.0
    leases.complete(0, 1)
    assert leases.epoch == 0.25


def test_done_when_the_last_is_completed():
    leases = Leases(Plan(1, 2))
    leases.lease_up_to(0, 2)
    leases.complete(0, 0)
    assert not leases.done
    leases.complete(0, 1)
    assert leases.done


def test_after_closing_nothing_is_leased_or_waited_for():
    leases = Leases(Plan(10, 1))
    leases.lease_up_to(0, 2)
    leases.put_back(0, 1)
    leases.close()
    assert leases.done
    assert leases.lease_up_to(1, 5) == ()
    assert not leases.holds(0, 0)


def test_completing_what_one_does_not_hold_is_an_error():
    leases = Leases(Plan(10, 1))
    leases.lease_up_to(0, 1)
    leases.lease_up_to(1, 1)
    with pytest.raises(ValueError, match="not in list"):
        leases.complete(0, 1)


def test_the_first_worker_to_speak_decides_the_order_of_an_epoch():
    leases = Leases(Plan(10, 3))
    assert leases.hear_order(4, 77)
    assert leases.hear_order(9, 77)
    assert not leases.hear_order(0, 78)
    assert leases.hear_order(0, 0), "0 says nothing"
    assert leases.hear_order(10, 78), "another epoch"
    restored = Leases.restored(leases.plan, json.loads(json.dumps(leases.facts())))
    assert (restored.hear_order(3, 77), restored.hear_order(3, 78)) == (True, False)
    earlier = {name: value for name, value in leases.facts().items() if name != "orders"}
    assert Leases.restored(leases.plan, earlier).hear_order(3, 78)


@given(
    plan=st.builds(Plan, st.integers(1, 7), st.integers(1, 3)),
    ahead=st.integers(1, 4),
    events=st.lists(st.tuples(st.sampled_from(["complete", "put_back", "give_up", "lease_up_to"]), st.integers(0, 3))),
)
@settings(max_examples=200, deadline=None)
def test_whatever_happens_each_batch_is_completed_once(plan, ahead, events):
    leases = Leases(plan)
    held: dict[int, tuple[int, ...]] = {}
    completed = []
    finish = [
        (what, worker) for _ in range(plan.batches) for worker in range(4) for what in ("lease_up_to", "complete")
    ]
    for what, worker in [*events, *finish]:
        mine = held.get(worker, ())
        if what == "lease_up_to":
            held[worker] = leases.lease_up_to(worker, ahead)
            assert held[worker][: len(mine)] == mine
        elif what == "give_up":
            leases.give_up(worker)
            held[worker] = ()
        elif mine:
            getattr(leases, what)(worker, mine[-1])
            held[worker] = mine[:-1]
            completed += [mine[-1]] * (what == "complete")
        everything = [batch for batches in held.values() for batch in batches] + completed
        assert len(everything) == len(set(everything)), "a batch is leased to two workers"
    assert sorted(completed) == list(range(plan.batches))
    assert leases.done
    assert leases.completed == plan.batches
