"""Decides which unit to restart, when, and when a run has failed: a state machine without a clock, process or socket.

A *unit* is a set of processes that fail and restart together: the ranks of one worker, or a service. The caller reports
events, with the time as a number, and gets decisions, each with a sentence for the reader:

    running ──failed──► ending ──gone──► waiting ──due──► starting ──up──► running
       └─────ended──► done   └──gone──► lost: it may not be started again
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import inf
from typing import Literal

__all__ = ["Decision", "OnFailure", "Policy", "Supervisor"]

OnFailure = Literal["continue", "stop", "restart"]
LONGEST_RETRY_S = 30.0  # between two attempts to reach a machine


@dataclass(frozen=True)
class Policy:
    """What to do when a worker fails. A service that can continue is restarted unless `on_failure` is `stop`."""

    on_failure: OnFailure = "stop"
    max_restarts: int = 3  # for each unit within `window_s`
    window_s: float = 3600.0
    backoff_s: float = 2.0  # before the first restart; it doubles with each further one
    longest_backoff_s: float = 60.0
    unreachable_s: float = 600.0  # a machine that cannot be reached for this long is given up
    early_s: float = 60.0  # if every worker fails by itself this early, the script is at fault: no restart helps


@dataclass(frozen=True)
class Decision:
    """`end` what is left of a unit, `start` it again, or `stop` the run."""

    do: Literal["end", "start", "stop"]
    unit: str
    reason: str


class _State(Enum):
    STARTING = "starting"
    RUNNING = "running"
    ENDING = "ending"
    WAITING = "waiting"
    DONE = "done"
    LOST = "lost"


@dataclass
class _Unit:
    name: str
    is_service: bool
    restartable: bool
    state: _State = _State.STARTING
    first_up_s: float | None = None
    due_s: float = inf  # when it may start again; inf: never
    lives: int = 0  # how many times it was up
    restarts_s: list[float] = field(default_factory=list)  # the times of its restarts within the window
    attempts: int = 0  # attempts to reach its machine since it was last up, all of them in vain
    lost_s: float = 0.0  # when it was last up
    failed_early: bool = False  # by itself, in its first life
    given_up: bool = False  # it did not end by itself when the run was over


class Supervisor:
    """Knows the state of every unit. The caller must report all events in the order in which they happen."""

    def __init__(
        self, workers: Iterable[str], services: Iterable[str], policy: Policy, unyielding: Iterable[str] = ()
    ) -> None:
        """`unyielding` services cannot continue from where they were, so they are not restarted."""
        self.policy = policy
        self.over = False  # a service ended well: there is nothing left to take part in
        self.begun = True  # False: training waits for all workers, and would wait for a lost one forever
        units = [_Unit(name, is_service=False, restartable=policy.on_failure == "restart") for name in workers]
        units += [_Unit(name, is_service=True, restartable=name not in {*unyielding}) for name in services]
        self._units = {unit.name: unit for unit in units}

    # Stimuli

    def up(self, name: str, now_s: float) -> None:
        """Note that all processes of a unit were started."""
        unit = self._units[name]
        unit.state, unit.attempts = _State.RUNNING, 0
        if unit.first_up_s is None:
            unit.first_up_s = now_s
        if unit.lives:
            unit.restarts_s.append(now_s)
        unit.lives += 1

    def ended(self, name: str) -> None:
        """Note that all processes of a unit ended well."""
        unit = self._units[name]
        unit.state = _State.DONE
        self.over = self.over or unit.is_service

    def failed(
        self,
        name: str,
        what: str,
        now_s: float,
        *,
        by_itself: bool = False,
        is_final: bool = False,
        reached: bool = True,
        settle_s: float = 0.0,
    ) -> list[Decision]:
        """Note that a process of a unit failed, or that the connection to it was lost. Return what to do.

        `by_itself`: it ended with an exit code of its own. `is_final`: it would fail again after a restart. `reached`:
        its machine could be reached. `settle_s`: how many seconds something of the unit may still run there.
        """
        unit = self._units[name]
        was, unit.state = unit.state, _State.ENDING
        if self.policy.on_failure == "stop" or unit.lives == 0:
            return [Decision("stop", name, "")]
        if was is _State.RUNNING:
            unit.lost_s = now_s
            early = unit.lives == 1 and now_s - (unit.first_up_s or 0.0) <= self.policy.early_s
            unit.failed_early = by_itself and early
        elif reached:
            unit.restarts_s.append(now_s)  # this restart failed, and counts
        unreachable = was is _State.STARTING and not reached
        if is_final and not unit.is_service:
            unit.due_s, then = inf, "the others go on"
        else:
            unit.due_s, then = self._what_next(unit, unreachable, now_s, settle_s)
        return [Decision("end", name, f"{what}; {then}"), *self._stop_if_hopeless(unit)]

    def give_up(self, name: str) -> None:
        """Note that the run is over, and that the caller ends what is left of a unit."""
        unit = self._units[name]
        unit.state, unit.due_s, unit.given_up = _State.ENDING, inf, True

    def cannot_go_on(self, name: str) -> None:
        """Note that a unit, whose failure is about to be reported, has said that a restart would not help."""
        self._units[name].restartable = False

    def gone(self, name: str) -> None:
        """Note that nothing is left of a unit's last life."""
        unit = self._units[name]
        unit.state = _State.WAITING if unit.due_s < inf else _State.LOST

    def take_due(self, now_s: float) -> list[Decision]:
        """Return the units to start now, as decisions. They count as starting."""
        waiting = [unit for unit in self._units.values() if unit.state is _State.WAITING]
        ready = [unit for unit in waiting if unit.due_s <= now_s or self.over]
        for unit in ready:
            unit.state = _State.LOST if self.over else _State.STARTING
        return [Decision("start", unit.name, "") for unit in ready if unit.state is _State.STARTING]

    # Questions

    @property
    def next_s(self) -> float:
        """When to call `take_due` again."""
        waiting = [unit.due_s for unit in self._units.values() if unit.state is _State.WAITING]
        return min(waiting, default=inf)

    def have_ended(self, names: Iterable[str]) -> bool:
        """Return whether none of these units runs now or will run again."""
        return all(self._units[name].state in (_State.DONE, _State.LOST) for name in names)

    def will_restart(self, name: str) -> bool:
        """Return whether a unit that is ending or waiting will be restarted."""
        return self._units[name].due_s < inf

    def report(self) -> list[str]:
        """Return a sentence for each unit that was restarted, was lost or did not end by itself."""
        lines = []
        for unit in self._units.values():
            if unit.lives > 1:
                times = "once" if unit.lives == 2 else f"{unit.lives - 1} times"
                lines.append(f"{unit.name} was restarted {times}")
            if unit.given_up:
                lines.append(f"{unit.name} did not end by itself")
            elif unit.state is _State.LOST:
                lines.append(f"{unit.name} was lost")
        return lines

    # Decisions

    def _what_next(self, unit: _Unit, unreachable: bool, now_s: float, settle_s: float) -> tuple[float, str]:
        """Return when a unit may start again (inf: never), and the words that say so."""
        policy = self.policy
        others = "the run ends" if unit.is_service else "the others go on"
        if self.over:
            return inf, "the run is over"
        if not unit.restartable:
            return inf, others
        if unreachable:
            return self._when_to_try_again(unit, now_s, others)
        unit.restarts_s = [at_s for at_s in unit.restarts_s if at_s > now_s - policy.window_s]
        count = len(unit.restarts_s)
        if count >= policy.max_restarts:
            window = f"{policy.window_s / 60:g} min"
            return inf, f"no more than {policy.max_restarts} restarts are made within {window}; {others}"
        wait_s = max(settle_s, min(policy.backoff_s * 2**count, policy.longest_backoff_s))
        return now_s + wait_s, f"restart {count + 1} of {policy.max_restarts} in {wait_s:g} s"

    def _when_to_try_again(self, unit: _Unit, now_s: float, others: str) -> tuple[float, str]:
        unit.attempts += 1
        wait_s = min(self.policy.backoff_s * 2**unit.attempts, LONGEST_RETRY_S)
        if now_s + wait_s > unit.lost_s + self.policy.unreachable_s:
            return inf, f"it was out of reach for {self.policy.unreachable_s:g} s; {others}"
        return now_s + wait_s, f"next try in {wait_s:g} s"

    def _stop_if_hopeless(self, unit: _Unit) -> Sequence[Decision]:
        given_up = unit.due_s == inf
        workers = [each for each in self._units.values() if not each.is_service]
        if given_up and unit.is_service:
            why = ""
        elif given_up and not self.begun:
            why = "training had not begun, and waits for all workers"
        elif all(each.failed_early for each in workers) and not self.over:
            why = "every worker failed by itself at once, which no restart would cure"
        elif all(_is_lost(each) for each in workers):
            why = "no worker is left"
        else:
            return []
        return [Decision("stop", unit.name, why)]


def _is_lost(unit: _Unit) -> bool:
    return unit.state is _State.LOST or (unit.state is _State.ENDING and unit.due_s == inf)
