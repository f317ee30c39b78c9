"""The states of a WorkerCore, and which request or reply leads from which to which."""

from __future__ import annotations

from enum import Enum

from danaz.protocol.transitions import Transitions


class WorkerState(Enum):
    """How far a worker's conversation with the server has come. In a state that ends in -ing, it waits for a reply."""

    NEW = "new"
    JOINING = "joining"
    JOINED = "joined"  # it has a view and may compute
    REJOINING = "rejoining"  # like JOINING, but the worker was in the run before
    PUSHING = "pushing"
    PULLING = "pulling"
    FETCHING = "fetching"
    LEAVING = "leaving"
    LEFT = "left"
    REPORTING = "reporting"
    ENDING = "ending"
    GONE = "gone"


class WorkerEvent(Enum):
    """A request that the worker makes, a step that it takes alone, or a reply that it receives."""

    JOIN = "join"
    LOCAL_STEP = "local step"
    PUSH = "push"
    PULL = "pull"
    FETCH = "fetch"
    LEAVE = "leave"
    REPORT = "report"
    BYE = "bye"
    # Replies:
    VIEW = "view"
    FETCHED = "fetched"
    FINAL = "final"
    NOTED = "noted"
    REFUSAL = "refusal"


_S, _E = WorkerState, WorkerEvent

WORKER_TRANSITIONS: Transitions[WorkerState, WorkerEvent] = Transitions(
    "worker",
    begins={_S.NEW: "the process starts"},
    table={
        # A server that was restarted, or that gave the worker up, asks a joined worker to join again.
        _E.JOIN: {_S.NEW: _S.JOINING, _S.JOINED: _S.REJOINING},
        _E.LOCAL_STEP: {_S.JOINED: _S.JOINED},
        _E.PUSH: {_S.JOINED: _S.PUSHING},
        _E.PULL: {_S.JOINED: _S.PULLING},
        _E.FETCH: {_S.JOINED: _S.FETCHING},
        _E.LEAVE: {_S.JOINED: _S.LEAVING},
        _E.REPORT: {_S.LEFT: _S.REPORTING},
        _E.BYE: {_S.LEFT: _S.ENDING},
        _E.VIEW: {
            _S.JOINING: _S.JOINED,
            _S.REJOINING: _S.JOINED,
            _S.PUSHING: _S.JOINED,
            _S.PULLING: _S.JOINED,
        },
        _E.FETCHED: {_S.FETCHING: _S.JOINED},
        # If a server restarted just as a worker left, it sends the trained model when that worker joins again.
        _E.FINAL: {_S.LEAVING: _S.LEFT, _S.JOINING: _S.LEFT, _S.REJOINING: _S.LEFT},
        _E.NOTED: {_S.REPORTING: _S.LEFT, _S.ENDING: _S.GONE},
        # A refusal brings the worker back to where it was before it asked.
        _E.REFUSAL: {
            _S.JOINING: _S.NEW,
            _S.REJOINING: _S.JOINED,
            _S.PUSHING: _S.JOINED,
            _S.PULLING: _S.JOINED,
            _S.FETCHING: _S.JOINED,
            _S.LEAVING: _S.JOINED,
            _S.REPORTING: _S.LEFT,
            _S.ENDING: _S.LEFT,
        },
    },
)
