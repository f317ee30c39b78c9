"""Carries out a plan: starts its units, restarts those that fail, and ends every process whatever happens."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from secrets import token_hex

from launcher.agents import pump
from launcher.failure import Failure, has_failed
from launcher.life import Life, RunContext, Timeouts
from launcher.logs import Echo, Logs, Terminal
from launcher.plan import Plan, Unit
from launcher.signals import ENDING_SIGNALS, NotedSignals, noted_signals
from launcher.supervisor import Decision, Policy, Supervisor
from launcher.transport import AgentCommand, local_agent_command

__all__ = ["Failure", "Outcome", "Tell", "Timeouts", "run"]

Tell = Callable[[str], None]  # called with one sentence per event
CANNOT_GO_ON = 2  # the exit code of a service that no restart would help


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    # 0 if all went well; the exit code of the first process that failed (128 + signal if it was killed); 130 after
    # Ctrl-C; 1 if a process ended with 0 too early, or if a returned file could not be kept
    exit_code: int
    failure: Failure | None = None
    signum: signal.Signals | None = None  # the signal to the launcher that ended the run
    events: tuple[str, ...] = ()  # what it survived: restarts, lost workers, and output that could not be kept


def run(
    plan: Plan,
    run_folder: str | Path,
    *,
    policy: Policy | None = None,
    echo: Echo | None = None,
    tell: Tell | None = None,
    agent_command: AgentCommand = local_agent_command,
    timeouts: Timeouts | None = None,
) -> Outcome:
    """Start every process of `plan`, and return when none of them is left.

    `policy` says what to do after a failure; by default, the first failure ends the run. `echo` shows a line of output;
    the default is `Terminal()`, which shows every line with its process in front. `tell` is called with a sentence for
    each failure that the run survives. SIGINT, SIGTERM and SIGHUP end the run; a second such signal ends it without
    grace. Call this from the main thread, because only that gets signals; otherwise it raises ValueError. Raises
    OSError when the run folder cannot be written at the start; later, `tell` hears what could not be kept, and the run
    goes on.
    """
    plan = replace(plan, run_id=plan.run_id or f"launcher-{token_hex(8)}")
    around = RunContext(plan, Logs(run_folder, echo or Terminal()), agent_command, timeouts or Timeouts())
    with noted_signals(*ENDING_SIGNALS) as signals:
        return _Run(around, policy or Policy(), tell or (lambda _: None), signals).execute()


class _Failed(Exception):
    def __init__(self, failure: Failure) -> None:
        self.failure = failure


class _Interrupted(Exception):
    """A signal ended the run."""


class _Run:
    """One run; `execute` plays it from start to end. The supervisor decides what to do after a failure."""

    def __init__(self, around: RunContext, policy: Policy, tell: Tell, signals: NotedSignals) -> None:
        self.around, self.tell, self.signals = around, tell, signals
        self.units = {unit.name: unit for unit in around.plan.units}
        self.workers = [unit.name for unit in self.units.values() if unit.world is not None]
        self.services = [unit.name for unit in self.units.values() if unit.world is None]
        unyielding = [process.group for process in around.plan.services if not process.again]
        self.supervisor = Supervisor(self.workers, self.services, policy, unyielding)
        self.concludes = around.plan.concludes
        self.begins = {process.begins for process in around.plan.services if process.begins}
        self.supervisor.begun = not self.begins
        self.lives: dict[str, Life] = {}  # the current life of each unit, by unit name
        self.numbers = dict.fromkeys(self.units, 0)  # how many lives each unit has had
        self.failures: list[tuple[str, Failure]] = []  # unit name and failure, in order of time
        self.over_s = inf  # when a process that concludes the run ended well
        self.early: Failure | None = None  # the first process that ended with 0 before the run was over

    def execute(self) -> Outcome:
        try:
            for unit in self.units.values():
                self._begin(unit)
            while not self.supervisor.have_ended(self.workers):
                self._turn()
            self._let_services_finish()
        except _Failed as failed:
            return Outcome(failed.failure.exit_code, failed.failure, events=self._events())
        except _Interrupted:
            signum = self.signals.received[0]
            return Outcome(128 + signum, signum=signum, events=self._events())
        finally:
            self._end()
        failure = self.early or self._unkept()
        return Outcome(0 if failure is None else failure.exit_code, failure, events=self._events())

    # The story

    def _begin(self, unit: Unit) -> None:
        self.numbers[unit.name] += 1
        self.lives[unit.name] = Life(unit, self.around, self.numbers[unit.name])

    def _let_services_finish(self) -> None:
        """Give services time to write their results. Stop one that does not end by itself; that is no failure."""
        now_s = time.monotonic()
        deadline = min(now_s + self.around.timeouts.finish_s, max(now_s, self._overtime_ends_s))
        while not self.supervisor.have_ended(self.services) and time.monotonic() < deadline:
            self._turn(deadline)
        for life in [life for life in self.lives.values() if not (life.ended or life.ending)]:
            self.tell(f"{life.unit.label} did not end by itself after the ranks, and is ended")

    def _turn(self, until_s: float = inf) -> None:
        """Do all that can be done now, then wait until something happens.

        Raises _Failed when a failure ends the run, _Interrupted on a signal.
        """
        if self.signals.received:
            raise _Interrupted
        now_s = time.monotonic()
        went_on = [self._look_at(life, now_s) for life in list(self.lives.values())]
        self.around.everybody_answered |= all(life.answered for life in self.lives.values())
        starts = self.supervisor.take_due(now_s)
        for decision in starts:
            self._begin(self.units[decision.unit])
        self._tell_news()
        if not any(went_on) and not starts:
            until_s = min(until_s, self._overtime_ends_s) if now_s < self._overtime_ends_s else until_s
            next_s = min([until_s, self.supervisor.next_s, *(life.next_s for life in self.lives.values())])
            pump([life.agents for life in self.lives.values()], self.signals, max(0.0, next_s - now_s))

    def _look_at(self, life: Life, now_s: float) -> bool:
        """Act on what has become of a life. Return whether something has changed."""
        name = life.unit.name
        if life.is_gone(now_s):
            self._close(life, now_s)
            self.supervisor.gone(name)
            return True
        failure = life.judge(now_s)
        if failure is not None:
            self._fail(life, failure, now_s)
            return True
        if now_s >= self._overtime_ends_s and life.unit.world is not None and not (life.ended or life.ending):
            self._give_up(life, now_s)
            return True
        was_up, went_on = life.up, life.advance(now_s)
        if life.up and not was_up:
            self._note_start(life, now_s)
        if self.begins <= life.agents.announced.keys():
            self.supervisor.begun = True
        if any(not has_failed(life.agents, each) for each in self.concludes & life.agents.exits.keys()):
            self.over_s = min(self.over_s, now_s)
        if life.ended and went_on:
            self.supervisor.ended(name)
        return went_on

    @property
    def _overtime_ends_s(self) -> float:
        return self.over_s + self.around.timeouts.overtime_s

    def _note_start(self, life: Life, now_s: float) -> None:
        self.supervisor.up(life.unit.name, now_s)
        if life.number > 1:
            self.tell(f"{life.unit.label}: started again")

    # Failures

    def _fail(self, life: Life, failure: Failure, now_s: float) -> None:
        name = life.unit.name
        # If only the connection broke, the agent at the other end needs time to end its process tree.
        settle_s = self.around.timeouts.grace_s + 1 if failure.process is None else 0.0
        self.failures.append((name, failure))
        if failure.is_final:
            self.early = self.early or failure
        if life.unit.world is None:
            self.over_s = inf  # the run is not over until the service has come back and ended well
        if life.unit.world is None and failure.by_itself and failure.exit_code == CANNOT_GO_ON:
            self.supervisor.cannot_go_on(name)
        decisions = self.supervisor.failed(
            name,
            failure.sentence,
            now_s,
            by_itself=failure.by_itself,
            is_final=failure.is_final,
            reached=failure.process is not None,
            settle_s=settle_s,
        )
        for decision in decisions:
            self._carry_out(decision, life, now_s)

    def _give_up(self, life: Life, now_s: float) -> None:
        """End the ranks that still run after the end of the run: they hang, or came back too late to find a server."""
        left = ", ".join(process.name.replace(".", " ") for process in life.agents.running())
        late = f"did not end within {self.around.timeouts.overtime_s:g} s of the end of the run"
        self.tell(f"{life.unit.label}: {left} {late}, and what is left of it is ended")
        self.supervisor.give_up(life.unit.name)
        life.end(now_s, self.around.timeouts.grace_s)

    def _carry_out(self, decision: Decision, life: Life, now_s: float) -> None:
        if decision.do == "end":
            self.tell(f"{life.unit.label}: {decision.reason}")
            life.end(now_s, self.around.timeouts.grace_s, keep_files=self.supervisor.will_restart(life.unit.name))
            return
        if decision.reason:
            self.tell(decision.reason)
        kind = self.services if decision.unit in self.services else self.workers
        failures = [failure for name, failure in self.failures if name in kind]
        # For a service, report the last failure: it survived the earlier ones by restarts. For workers, report the
        # first: one worker's failure can make the others fail.
        raise _Failed(failures[-1] if kind is self.services else failures[0])

    def _events(self) -> tuple[str, ...]:
        missing = self.around.logs.missing_output
        return (*self.supervisor.report(), *([missing] if missing else []))

    def _unkept(self) -> Failure | None:
        """Return the failure to report if returned files could not be kept on this machine, or None."""
        logs = self.around.logs
        if not logs.lost_files:
            return None
        return Failure("", None, f"{logs.run_folder} lacks what could not be kept: {', '.join(logs.lost_files)}", 1)

    def _tell_news(self) -> None:
        for sentence in self.around.logs.take_news():
            self.tell(sentence)

    # The end

    def _end(self) -> None:
        """End every process of the run, and wait until they have ended. A second signal ends them without grace."""
        heeded = -1
        try:
            while self.lives:
                now_s = time.monotonic()
                if heeded < len(self.signals.received):
                    heeded = len(self.signals.received)
                    for life in self.lives.values():
                        life.end(now_s, self.around.timeouts.grace_s if heeded < 2 else 0.0)
                for life in [life for life in self.lives.values() if life.is_gone(now_s)]:
                    self._close(life, now_s)
                self._tell_news()
                if self.lives:
                    deadline_s = min(life.next_s for life in self.lives.values())
                    pump([life.agents for life in self.lives.values()], self.signals, max(0.0, deadline_s - now_s))
        finally:
            for life in list(self.lives.values()):
                self._close(life, time.monotonic())
            self._tell_news()

    def _close(self, life: Life, now_s: float) -> None:
        del self.lives[life.unit.name]
        life.close(now_s)
        for sentence in life.agents.refused:
            self.tell(sentence)
