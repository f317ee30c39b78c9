"""A server that is started again after its run is complete refuses everything, and ends when no worker is left."""

from __future__ import annotations

from stimuli import JOIN

from danaz.protocol.messages import Bye, GoBack, Heartbeat, Refusal
from danaz.server.completed import CompletedRun

BYE = Bye(worker=0, incarnation=1, request=9)


def test_everything_is_refused_without_a_way_back() -> None:
    core = CompletedRun()
    for message in (BYE, JOIN, GoBack(worker=0, incarnation=1, request=-1)):
        [(route, refusal)] = core.stream(b"route", message, 0.0)
        assert route == b"route"
        assert refusal == Refusal(message.request, "the run is complete", rejoin=False)
        assert not core.takes(message)


def test_it_ends_when_nobody_was_heard_of_for_a_while() -> None:
    core = CompletedRun(quiet_s=10.0)
    core.stream_tick(100.0)
    core.stream_tick(109.0)
    assert not core.finished
    assert core.stream(b"route", Heartbeat(0, 1), 109.5) == []
    core.stream_tick(119.0)
    assert not core.finished, "a worker still waits"
    core.stream_tick(119.5)
    assert core.finished
