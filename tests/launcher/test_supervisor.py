"""Which units are restarted, and when: tests the state machine alone, with the time as a number."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from launcher.supervisor import Decision, Policy, Supervisor

RESTART = Policy("restart", max_restarts=3, window_s=1000.0, backoff_s=2.0, longest_backoff_s=5.0, unreachable_s=100.0)
DIED = "rank 0 was killed by SIGKILL"


def running(policy: Policy = RESTART, workers: int = 2) -> Supervisor:
    supervisor = Supervisor([f"worker {number}" for number in range(workers)], ["server"], policy)
    for name in ("server", *(f"worker {number}" for number in range(workers))):
        supervisor.up(name, 0.0)
    return supervisor


def done(decisions: list[Decision]) -> list[str]:
    return [decision.do for decision in decisions]


def fail(supervisor: Supervisor, name: str, now_s: float, **how: bool) -> str:
    """Let a unit fail and be gone; return the sentence about it."""
    [decision] = supervisor.failed(name, DIED, now_s, **how)  # type: ignore[arg-type]
    assert (decision.do, decision.unit) == ("end", name)
    assert supervisor.take_due(inf) == [], "something of it is still there"
    supervisor.gone(name)
    return decision.reason


def start(supervisor: Supervisor, name: str) -> float:
    """Return the time at which a unit is started again."""
    now_s = supervisor.next_s
    assert supervisor.take_due(now_s - 0.01) == []
    assert [(decision.do, decision.unit) for decision in supervisor.take_due(now_s)] == [("start", name)]
    assert supervisor.take_due(now_s) == [], "once"
    supervisor.up(name, now_s)
    return now_s


def test_the_wait_doubles_up_to_the_longest() -> None:
    supervisor, now_s = running(), 10.0
    waits = []
    for number in (1, 2, 3):
        assert fail(supervisor, "worker 1", now_s) == f"{DIED}; restart {number} of 3 in {(2, 4, 5)[number - 1]} s"
        restarted_s = start(supervisor, "worker 1")
        waits.append(restarted_s - now_s)
        now_s = restarted_s
    assert waits == [2.0, 4.0, 5.0]


def test_a_service_that_cannot_go_on_is_not_started_again() -> None:
    supervisor = running()
    supervisor.cannot_go_on("server")
    decisions = supervisor.failed("server", "server ended with exit code 2", 10.0, by_itself=True)
    assert [(decision.do, decision.unit) for decision in decisions] == [("end", "server"), ("stop", "server")]
    assert decisions[0].reason == "server ended with exit code 2; the run ends"
    assert not supervisor.will_restart("server")


def test_the_limit_is_one_of_restarts_within_the_window() -> None:
    supervisor = running()
    for _ in range(3):
        fail(supervisor, "worker 1", 10.0)
        start(supervisor, "worker 1")
    last = supervisor.failed("worker 1", DIED, 20.0)
    assert last[0].reason.endswith("; no more than 3 restarts are made within 16.6667 min; the others go on")
    assert done(last) == ["end"]
    supervisor.gone("worker 1")
    assert supervisor.next_s == inf
    assert supervisor.report() == ["worker 1 was restarted 3 times", "worker 1 was lost"]


def test_restarts_of_long_ago_do_not_count() -> None:
    supervisor, now_s = running(), 0.0
    for _ in range(20):
        assert "restart 1 of 3 in 2 s" in fail(supervisor, "worker 1", now_s)
        now_s = start(supervisor, "worker 1") + RESTART.window_s


def test_each_unit_has_restarts_of_its_own() -> None:
    supervisor = running()
    for name in ("worker 0", "worker 1", "server"):
        assert "restart 1 of 3" in fail(supervisor, name, 10.0)
        start(supervisor, name)


def test_a_machine_that_cannot_be_reached_uses_up_no_restarts() -> None:
    supervisor = running()
    fail(supervisor, "worker 1", 10.0)
    now_s, waits = supervisor.next_s, []
    for _ in range(4):
        assert done(supervisor.take_due(now_s)) == ["start"]
        assert "; next try in " in fail(supervisor, "worker 1", now_s, reached=False)
        waits.append(supervisor.next_s - now_s)
        now_s = supervisor.next_s
    assert waits == [4.0, 8.0, 16.0, 30.0]
    start(supervisor, "worker 1")
    assert "restart 2 of 3 in 4 s" in fail(supervisor, "worker 1", now_s + 1)


def test_a_start_that_fails_uses_up_a_restart() -> None:
    supervisor = running()
    fail(supervisor, "server", 10.0)
    for number in (2, 3):
        supervisor.take_due(supervisor.next_s)
        assert f"restart {number} of 3" in fail(supervisor, "server", 20.0)
    supervisor.take_due(supervisor.next_s)
    assert done(supervisor.failed("server", DIED, 30.0)) == ["end", "stop"]


def test_a_machine_that_cannot_be_reached_for_long_is_given_up() -> None:
    supervisor = running()
    fail(supervisor, "worker 1", 10.0)
    supervisor.take_due(supervisor.next_s)
    [decision] = supervisor.failed("worker 1", "Connection refused", 107.0, reached=False)
    assert decision.reason == "Connection refused; it was out of reach for 100 s; the others go on"
    supervisor.gone("worker 1")
    assert supervisor.have_ended(["worker 1"])


def test_what_may_still_be_there_is_waited_for() -> None:
    supervisor = running()
    [decision] = supervisor.failed("worker 1", "the agent ended", 10.0, settle_s=6.0)
    assert decision.reason == "the agent ended; restart 1 of 3 in 6 s"


@pytest.mark.parametrize("on_failure", ["continue", "restart"])
def test_the_server_comes_back_unless_all_is_to_stop(on_failure: str) -> None:
    supervisor = running(Policy(on_failure))  # type: ignore[arg-type]
    assert "restart 1 of 3" in fail(supervisor, "server", 10.0)
    assert done(running(Policy("stop")).failed("server", DIED, 10.0)) == ["stop"]


def test_a_server_that_cannot_go_on_is_the_end() -> None:
    supervisor = Supervisor(["worker 0"], ["server"], RESTART, unyielding=["server"])
    supervisor.up("server", 0.0)
    supervisor.up("worker 0", 0.0)
    assert done(supervisor.failed("server", DIED, 100.0)) == ["end", "stop"]


def test_continue_until_nobody_is_left() -> None:
    supervisor = running(Policy("continue"))
    assert done(supervisor.failed("worker 1", DIED, 10.0)) == ["end"]
    assert done(supervisor.failed("worker 0", DIED, 20.0)) == ["end", "stop"]


def test_who_ended_well_is_no_loss() -> None:
    supervisor = running(Policy("continue"))
    supervisor.ended("worker 0")
    assert done(supervisor.failed("worker 1", DIED, 20.0)) == ["end"]
    supervisor.gone("worker 1")
    assert supervisor.have_ended(["worker 0", "worker 1"])


def test_a_failure_before_anything_ran_is_the_end() -> None:
    supervisor = Supervisor(["worker 0", "worker 1"], ["server"], RESTART)
    assert done(supervisor.failed("worker 1", "Connection refused", 1.0)) == ["stop"]


def test_before_training_began_nobody_can_be_spared() -> None:
    supervisor = running(Policy("continue"))
    supervisor.begun = False
    assert done(supervisor.failed("worker 1", DIED, 10.0)) == ["end", "stop"]
    supervisor = running()
    supervisor.begun = False
    assert done(supervisor.failed("worker 1", DIED, 10.0)) == ["end"], "it comes back"


def test_a_script_that_fails_everywhere_at_once_is_not_tried_again() -> None:
    supervisor = running()
    assert done(supervisor.failed("worker 0", "exit code 1", 10.0, by_itself=True)) == ["end"]
    assert done(supervisor.failed("worker 1", "exit code 1", 11.0, by_itself=True)) == ["end", "stop"]


@pytest.mark.parametrize(("by_itself", "now_s"), [(False, 10.0), (True, 61.0)])
def test_what_may_be_the_clusters_fault_is_tried_again(by_itself: bool, now_s: float) -> None:
    supervisor = running()
    for name in ("worker 0", "worker 1"):
        assert done(supervisor.failed(name, "it ended", now_s, by_itself=by_itself)) == ["end"]


def test_behind_the_end_nobody_comes_back() -> None:
    supervisor = running()
    fail(supervisor, "worker 1", 10.0)
    supervisor.ended("server")
    assert supervisor.take_due(inf) == []
    assert supervisor.have_ended(["worker 1"])
    [decision] = supervisor.failed("worker 0", DIED, 20.0)[:1]
    assert decision.reason == f"{DIED}; the run is over"


def test_what_no_restart_would_change_is_not_tried_again() -> None:
    supervisor = running()
    assert fail(supervisor, "worker 1", 500.0, by_itself=True, is_final=True) == f"{DIED}; the others go on"
    assert supervisor.next_s == inf
    assert done(supervisor.failed("worker 0", DIED, 600.0, is_final=True)) == ["end", "stop"], "nobody is left"
    supervisor = running()
    supervisor.begun = False
    assert done(supervisor.failed("worker 1", DIED, 10.0, is_final=True)) == ["end", "stop"]


def test_who_hangs_when_all_is_over_is_given_up_without_a_failure() -> None:
    supervisor = running()
    supervisor.ended("server")
    for name in ("worker 0", "worker 1"):
        supervisor.give_up(name)
        assert not supervisor.have_ended([name]), "something of it is still there"
        supervisor.gone(name)
    assert supervisor.have_ended(["worker 0", "worker 1"])
    assert supervisor.report() == ["worker 0 did not end by itself", "worker 1 did not end by itself"]


def test_nobody_waits_for_a_pause_to_pass_when_all_is_over() -> None:
    supervisor = running(Policy("restart", backoff_s=600.0, longest_backoff_s=600.0))
    fail(supervisor, "worker 1", 10.0)
    supervisor.ended("server")
    assert supervisor.take_due(11.0) == []
    assert supervisor.have_ended(["worker 1"])


class Anything(RuleBasedStateMachine):
    """Events in any order. A unit is never started twice, nor while something of its last life is left."""

    def __init__(self) -> None:
        super().__init__()
        self.supervisor = running()
        self.now_s = 100.0
        self.there = {"worker 0": "up", "worker 1": "up", "server": "up"}
        self.starts_s: dict[str, list[float]] = {name: [] for name in self.there}
        self.stopped = False

    @precondition(lambda self: not self.stopped)
    @rule(name=st.sampled_from(["worker 0", "worker 1", "server"]), by_itself=st.booleans(), reached=st.booleans())
    def fail(self, name: str, by_itself: bool, reached: bool) -> None:
        if self.there[name] in ("up", "starting"):
            decisions = self.supervisor.failed(name, DIED, self.now_s, by_itself=by_itself, reached=reached)
            assert done(decisions) in (["end"], ["end", "stop"])
            self.stopped = "stop" in done(decisions)
            self.there[name] = "ending"

    @rule(name=st.sampled_from(["worker 0", "worker 1", "server"]))
    def vanish(self, name: str) -> None:
        if self.there[name] == "ending":
            self.supervisor.gone(name)
            self.there[name] = "gone"

    @rule(name=st.sampled_from(["worker 0", "worker 1", "server"]))
    def come_up(self, name: str) -> None:
        if self.there[name] == "starting":
            self.supervisor.up(name, self.now_s)
            self.there[name] = "up"
            self.starts_s[name].append(self.now_s)

    @rule(later_s=st.floats(0.0, 50.0))
    def wait(self, later_s: float) -> None:
        self.now_s += later_s
        for decision in self.supervisor.take_due(self.now_s):
            assert self.there[decision.unit] == "gone"
            self.there[decision.unit] = "starting"

    @invariant()
    def no_more_restarts_than_allowed(self) -> None:
        for starts_s in self.starts_s.values():
            recent = [at_s for at_s in starts_s if at_s > self.now_s - RESTART.window_s]
            assert len(recent) <= RESTART.max_restarts


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
