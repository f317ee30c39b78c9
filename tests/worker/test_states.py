"""The table of a worker's states: each state can be reached, and only the last is a dead end."""

from __future__ import annotations

from danaz.worker.states import WORKER_TRANSITIONS, WorkerEvent, WorkerState


def test_every_event_is_in_the_table() -> None:
    assert set(WORKER_TRANSITIONS.table) == set(WorkerEvent)


def test_every_state_can_be_reached() -> None:
    reached = set(WORKER_TRANSITIONS.begins)
    for _ in WorkerState:
        reached |= {after for moves in WORKER_TRANSITIONS.table.values() for b, after in moves.items() if b in reached}
    assert reached == set(WorkerState)


def test_only_the_last_state_is_a_dead_end() -> None:
    left = {before for moves in WORKER_TRANSITIONS.table.values() for before in moves}
    assert set(WorkerState) - left == {WorkerState.GONE}


def test_a_worker_that_waits_can_be_refused_and_asks_nothing() -> None:
    waiting = {state for state in WorkerState if state.value.endswith("ing")}
    assert set(WORKER_TRANSITIONS.table[WorkerEvent.REFUSAL]) == waiting
    requests = ("JOIN", "LOCAL_STEP", "PUSH", "PULL", "FETCH", "LEAVE", "REPORT", "BYE")
    assert not any(WORKER_TRANSITIONS.allows(state, WorkerEvent[name]) for state in waiting for name in requests)
