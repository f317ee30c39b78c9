"""Plays a plan: agents, services, worlds, ranks, and the end of all of them, whatever comes in between."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launcher.cluster import Cluster
from launcher.logs import Echo, Logs, Terminal
from launcher.plan import Plan, Process
from launcher.signals import ENDING_SIGNALS, NotedSignals, noted_signals
from launcher.ssh import cure
from launcher.transport import AgentCommand, AgentLink, TransportError, local_agent_command

__all__ = ["Failure", "Outcome", "run"]

SETTLE_S = 2.0  # after a first exit: for a rank that raised before it to end too
RECENT_S = 30.0  # a traceback older than this was not what a process died of
AGENT_END_S = 15.0  # after the grace: for SIGKILL to work, the pipes to empty and the agent to end
SHOWN_LINES = 20
TRACEBACK = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Failure:
    """The process with which it began, not those it pulled along. `str()` tells the whole story."""

    host: str
    process: Process | None  # None: the agent or the machine itself
    reason: str
    exit_code: int
    last_lines: tuple[str, ...] = ()  # of its stderr; of its stdout if that is empty
    log_folder: Path | None = None

    def __str__(self) -> str:
        lines = [self.reason]
        if self.last_lines:
            lines += ["its last lines:", *(f"  | {line}" for line in self.last_lines)]
        if self.log_folder is not None:
            lines.append(f"its whole output is in {self.log_folder}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    exit_code: int  # 0; that of the first process that failed (128 + signal if it was killed); 130 after Ctrl-C
    failure: Failure | None = None
    signum: signal.Signals | None = None  # the signal to the launcher that ended the run


def run(
    plan: Plan,
    run_folder: str | Path,
    *,
    echo: Echo | None = None,
    agent_command: AgentCommand = local_agent_command,
    grace_s: float = 5.0,
    start_timeout_s: float = 60.0,
    finish_timeout_s: float = 60.0,
) -> Outcome:
    """Start every process of `plan`, and return when none of them is left.

    `echo` shows a line of output; by default `Terminal()`, all of it with its process in front. `start_timeout_s` is
    how long an agent may take to answer and a service to announce itself, `finish_timeout_s` how long services may go
    on after the last rank has ended well, `grace_s` the time between SIGTERM and SIGKILL. SIGINT, SIGTERM and SIGHUP
    end the run; a second one ends it without grace. To be called from the main thread, which alone gets signals (else
    ValueError). Raises OSError when the run folder cannot be written.
    """
    timeouts = _Timeouts(grace_s, start_timeout_s, finish_timeout_s)
    with noted_signals(*ENDING_SIGNALS) as signals:
        return _Run(plan, Logs(run_folder, echo or Terminal()), agent_command, timeouts, signals).execute()


@dataclass(frozen=True)
class _Timeouts:
    grace_s: float
    start_s: float
    finish_s: float


class _Failed(Exception):
    def __init__(self, failure: Failure) -> None:
        self.failure = failure


class _Interrupted(Exception):
    """A signal ended the run."""


class _Run:
    """One run; `execute` is its story."""

    def __init__(
        self, plan: Plan, logs: Logs, agent_command: AgentCommand, timeouts: _Timeouts, signals: NotedSignals
    ) -> None:
        self.plan, self.logs, self.agent_command = plan, logs, agent_command
        self.timeouts, self.signals = timeouts, signals
        self.cluster = Cluster((*plan.services, *plan.ranks), logs, signals)

    def execute(self) -> Outcome:
        try:
            self._start_agents()
            self._start_services()
            self._open_worlds()
            self._start_ranks()
            self._wait(lambda: self.cluster.have_ended(self.plan.ranks))
            self._let_services_finish()
        except _Failed as failed:
            return Outcome(failed.failure.exit_code, failed.failure)
        except _Interrupted:
            signum = self.signals.received[0]
            return Outcome(128 + signum, signum=signum)
        finally:
            self._end()
        return Outcome(0)

    # The story

    def _start_agents(self) -> None:
        for host in self.plan.hosts:
            try:
                self.cluster.connect(host, self.agent_command(host), self.timeouts.grace_s)
            except TransportError as error:
                raise _Failed(Failure(host.name, None, str(error), 1)) from error
        links = self.cluster.links.values()
        if not self._wait(lambda: all(link.said_hello for link in links), self.timeouts.start_s):
            silent = next(link for link in links if not link.said_hello)
            raise _Failed(_agent_failure(silent, f"did not answer within {self.timeouts.start_s:g} s"))

    def _start_services(self) -> None:
        for service in self.plan.services:
            self._start(service, {})
        awaited = {service.announces: service for service in self.plan.services if service.announces}
        announced = self.cluster.announced
        if not self._wait(lambda: awaited.keys() <= announced.keys(), self.timeouts.start_s):
            silent = next(service for name, service in awaited.items() if name not in announced)
            reason = f"did not print {silent.announces}=… within {self.timeouts.start_s:g} s"
            raise _Failed(self._process_failure(silent, reason, 1))

    def _open_worlds(self) -> None:
        for world in self.plan.worlds:
            self.cluster.open_world(world)
        if not self._wait(lambda: len(self.cluster.ports) == len(self.plan.worlds), self.timeouts.start_s):
            silent = next(world for world in self.plan.worlds if world.index not in self.cluster.ports)
            raise _Failed(_agent_failure(self.cluster.links[silent.host.name], "opened no rendezvous"))

    def _start_ranks(self) -> None:
        for rank in self.plan.ranks:
            assert rank.world is not None
            self._start(rank, {**self.cluster.announced, **self.cluster.ports[rank.world]})

    def _let_services_finish(self) -> None:
        """They may have something to write; one that does not end by itself is stopped, which is no failure."""
        self._wait(lambda: self.cluster.have_ended(self.plan.services), self.timeouts.finish_s)

    def _end(self) -> None:
        """End every process of the run, and wait until they have ended. A second signal asks for haste."""
        deadline = time.monotonic() + self.timeouts.grace_s + AGENT_END_S
        heeded = -1
        try:
            while self.cluster.busy_links() and time.monotonic() < deadline:
                if heeded < len(self.signals.received):
                    heeded = len(self.signals.received)
                    self.cluster.stop(self.timeouts.grace_s if heeded < 2 else 0.0)
                self.cluster.pump(deadline - time.monotonic())
            for process in self.cluster.running():
                self.logs.close(process)
        finally:
            self.cluster.close(deadline)

    def _start(self, process: Process, found: dict[str, str]) -> None:
        self.cluster.start(process, {**self.plan.env, **process.env, **found}, self.plan.cwd)

    # Waiting

    def _wait(self, condition: Callable[[], bool], timeout_s: float = math.inf) -> bool:
        """Wait until the condition holds; False when the time is over. Raises on a failure or a signal."""
        deadline = time.monotonic() + timeout_s
        while True:
            if self.signals.received:
                raise _Interrupted
            if self._first_failure() is not None:
                raise _Failed(self._settle())
            if condition():
                return True
            if time.monotonic() >= deadline:
                return False
            self.cluster.pump(deadline - time.monotonic())

    def _settle(self) -> Failure:
        """The failure with which it began: a rank that raises often ends after those it pulls along."""
        deadline = time.monotonic() + SETTLE_S
        while self._somebody_is_failing() and time.monotonic() < deadline and not self.signals.received:
            self.cluster.pump(deadline - time.monotonic())
        failure = self._first_failure()
        assert failure is not None
        return failure

    def _somebody_is_failing(self) -> bool:
        now_s = time.monotonic()
        return self.cluster.lost is None and any(self._tracebacks_s(rank, now_s) for rank in self.cluster.running())

    # Failures

    def _first_failure(self) -> Failure | None:
        if self.cluster.lost is not None:
            return _agent_failure(self.cluster.lost.link, self.cluster.lost.reason)
        failed = [self.cluster.processes[name] for name in self.cluster.exits if self._has_failed(name)]
        if not failed:
            return None
        first = min(failed, key=self._trouble_began_s)
        end = self.cluster.exits[first.name]
        exit_code = 128 - end.status if end.status < 0 else end.status or 1
        return self._process_failure(first, end.error or _describe(end.status), exit_code)

    def _has_failed(self, name: str) -> bool:
        # A service may end well before the ranks do, when the workers have left it, but not without an announcement.
        announces = self.cluster.processes[name].announces
        unannounced = announces is not None and announces not in self.cluster.announced
        return self.cluster.exits[name].status != 0 or unannounced

    def _trouble_began_s(self, process: Process) -> float:
        """When it died, or began to print the traceback of which it then died."""
        died_s = self.cluster.exits[process.name].at_s
        return min([died_s, *self._tracebacks_s(process, died_s)])

    def _tracebacks_s(self, process: Process, now_s: float) -> list[float]:
        lines = self.logs.tail(process, "stderr")
        return [line.at_s for line in lines if line.text.startswith(TRACEBACK) and line.at_s > now_s - RECENT_S]

    def _process_failure(self, process: Process, what: str, exit_code: int) -> Failure:
        lines = self.logs.tail(process, "stderr") or self.logs.tail(process, "stdout")
        last_lines = tuple(line.text for line in lines[-SHOWN_LINES:])
        name = process.name if process.rank is None else f"rank {process.rank}"
        reason = f"{name} on {process.host.name} {what}"
        return Failure(process.host.name, process, reason, exit_code, last_lines, self.logs.folder(process))


def _agent_failure(link: AgentLink, what: str) -> Failure:
    name = link.host.name
    advice = None if link.said_hello else cure(link)
    reason = f"the agent on {name} {what}" + (f": {advice}" if advice else "")
    return Failure(name, None, reason, 1, tuple(link.last_words))


def _describe(status: int) -> str:
    if status == 0:
        return "ended before it was of use"
    if status > 0:
        return f"ended with exit code {status}"
    names = {signum.value: signum.name for signum in signal.Signals}
    return f"was killed by {names.get(-status, f'signal {-status}')}"
