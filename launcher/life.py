"""One life of a unit: from connecting to its machines until nothing of it is left on them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import NamedTuple

from launcher.agents import Agents
from launcher.failure import Failure, agent_failure, failure_of, is_settled, process_failure, signs_of_trouble
from launcher.gate import Gate
from launcher.logs import Logs
from launcher.plan import ANNOUNCED, Plan, Process, Unit
from launcher.transport import AgentCommand, TransportError

__all__ = ["Life", "RunContext", "Timeouts"]

# When trouble began, the process that caused it may not have been reported yet. Wait for it…
SETTLE_S = 3.0  # …until this long after the last sign of trouble…
LONGEST_SETTLE_S = 20.0  # …but no longer than this after the first sign
AGENT_END_S = 15.0  # time after the grace for SIGKILL to work, the pipes to empty and the agent to end…
SLOWEST_BYTES_PER_S = 1 << 16  # …plus the time that the returned files take at this rate


@dataclass(frozen=True)
class Timeouts:
    """How long a run waits, in seconds."""

    grace_s: float = 5.0  # between SIGTERM and SIGKILL
    start_s: float = 60.0  # for an agent to answer, and for a service to announce itself
    finish_s: float = 75.0  # for the services to end after the last rank has ended well
    overtime_s: float = 30.0  # for all processes to end after one of `Plan.concludes` has ended well


@dataclass
class RunContext:
    """What all lives of a run share."""

    plan: Plan
    logs: Logs
    agent_command: AgentCommand
    timeouts: Timeouts
    gate: Gate = field(default_factory=Gate)
    announced: dict[str, str] = field(default_factory=dict)  # what services announced, for the ranks' environment
    everybody_answered: bool = False  # until this is True, no process is started
    last_incarnation: int = 0

    def next_incarnation(self) -> int:
        """Return a number above all earlier ones, even those of an earlier launcher of this run: the clock's time.

        If the earlier launcher's clock was ahead of ours, the server says so, and the worker takes the next number
        itself.
        """
        self.last_incarnation = max(self.last_incarnation + 1, time.time_ns() // 1_000_000)
        return self.last_incarnation


class _Wait(NamedTuple):
    """The life goes on when the condition holds, and fails if it does not hold in time."""

    condition: Callable[[], bool]
    timeout_s: float = inf
    failure: Callable[[], Failure] | None = None


class Life:
    """One life. `advance` takes it one step further; `judge` says why it cannot go on; `end` ends it at any time."""

    def __init__(self, unit: Unit, around: RunContext, number: int) -> None:
        """`number` counts the lives of the unit from 1."""
        self.unit, self.around, self.number = unit, around, number
        self.agents = Agents(unit.processes, around.logs, around.gate, around.plan.prefix)
        self.up = False  # all its processes were started
        self.ended = False  # all of them ended well
        self.ending = False
        self._next_s = inf
        self._story = self._tell()
        self._wait: _Wait | None = None
        self._wait_until_s = inf
        self._overdue: Failure | None = None
        self._trouble_s = inf  # when the failure was first seen
        self._signs: set[str] = set()  # the signs of trouble so far…
        self._quiet_since_s = -inf  # …and when the last of them came
        self._end_by_s = inf

    # The story

    def _tell(self) -> Iterator[_Wait]:
        unit, agents, start_s = self.unit, self.agents, self.around.timeouts.start_s
        yield from self._connect()
        yield _Wait(lambda: self.around.everybody_answered)
        if unit.world is not None:
            agents.open_world(unit.world)
            rendezvous = agents.links[unit.world.host.name]
            yield _Wait(lambda: bool(agents.ports), start_s, lambda: agent_failure(rendezvous, "opened no rendezvous"))
            plan = self.around.plan
            awaited = {service.announces for service in plan.services if service.announces}
            yield _Wait(lambda: awaited <= self.around.announced.keys())
        self._start()
        for process in unit.processes:
            if process.announces:
                yield _Wait(partial(self._has_announced, process), start_s, partial(self._unannounced, process))
        self.around.announced.update(agents.announced)
        self.up = True
        yield _Wait(lambda: agents.have_ended(unit.processes))
        self.ended = True

    def _connect(self) -> Iterator[_Wait]:
        timeouts = self.around.timeouts
        for host in self.unit.hosts:
            try:
                self.agents.connect(host, self.around.agent_command(host), timeouts.grace_s)
            except TransportError as error:
                failure = Failure(host.name, None, str(error), 1)
                yield _Wait(lambda: False, 0.0, lambda: failure)  # noqa: B023
        yield _Wait(lambda: self.answered, timeouts.start_s, self._silent)

    def _start(self) -> None:
        plan, unit = self.around.plan, self.unit
        ports = {} if unit.world is None else self.agents.ports[unit.world.index]
        found = {}
        if unit.world is not None:
            incarnation = {f"{plan.prefix}INCARNATION": str(self.around.next_incarnation())}
            found = {**self.around.announced, **ports, **incarnation}
        for process in unit.processes:
            env = {**plan.env, **process.env, **found}
            folder = self._folder(process) if process.returns else ""
            self.agents.start(process, env, plan.cwd, self._command(process), folder)

    def _folder(self, process: Process) -> str:
        """Return the name of the folder for returned files: one for each group and machine.

        The machine's number is part of it, because two machines may share their temporary files.
        """
        name = f"{self.around.plan.run_id}-{process.group or process.name}"
        number = self.unit.hosts.index(process.host)
        return f"{name}.{number}" if number else name

    def _command(self, process: Process) -> tuple[str, ...]:
        if self.number == 1 or not process.again:
            return process.argv
        announced = self.around.announced.get(process.announces or "", "")
        return tuple(announced if word == ANNOUNCED else word for word in process.again)

    @property
    def answered(self) -> bool:
        """Whether the agent on each of its machines has answered."""
        links = self.agents.links
        return len(links) == len(self.unit.hosts) and all(link.said_hello for link in links.values())

    def _silent(self) -> Failure:
        silent = next(link for link in self.agents.links.values() if not link.said_hello)
        return agent_failure(silent, f"did not answer within {self.around.timeouts.start_s:g} s")

    def _has_announced(self, process: Process) -> bool:
        return process.announces in self.agents.announced

    def _unannounced(self, process: Process) -> Failure:
        what = f"did not print {process.announces}=… within {self.around.timeouts.start_s:g} s"
        return process_failure(self.around.logs, process, what, 1)

    # What becomes of it

    @property
    def next_s(self) -> float:
        """When to look at it again even if nothing was heard.

        Once it is ending, that is when its time is over. Returned files extend the time, because a model may be large.
        """
        return self._end_by_s + self.agents.returned_bytes / SLOWEST_BYTES_PER_S if self.ending else self._next_s

    def advance(self, now_s: float) -> bool:
        """Take the next step if the condition that it waits for holds. Return whether it did."""
        if self.ended or self.ending:
            return False
        if self._wait is not None and not self._wait.condition():
            if now_s >= self._wait_until_s and self._wait.failure is not None:
                self._overdue = self._wait.failure()
            return False
        self._wait = next(self._story, None)
        self._wait_until_s = self._next_s = inf if self._wait is None else now_s + self._wait.timeout_s
        return True

    def judge(self, now_s: float) -> Failure | None:
        """Return why it cannot go on; None until the cause is clear, or no further sign of trouble came for a while."""
        failure = failure_of(self.agents) or self._overdue
        if failure is None or self.ending or self.ended:
            return None
        signs = signs_of_trouble(self.agents, now_s)
        if signs - self._signs:
            self._signs, self._quiet_since_s = self._signs | signs, now_s
        self._trouble_s = min(self._trouble_s, now_s)
        self._next_s = min(self._quiet_since_s + SETTLE_S, self._trouble_s + LONGEST_SETTLE_S)
        return failure if now_s >= self._next_s or is_settled(failure, self.agents, now_s) else None

    # The end

    def end(self, now_s: float, grace_s: float, keep_files: bool = False) -> None:
        """End all its processes. A second call can only bring the end forward."""
        self._end_by_s = min(self._end_by_s, now_s + grace_s + AGENT_END_S)
        self.ending = True
        self.agents.stop(grace_s, keep_files)

    def is_gone(self, now_s: float) -> bool:
        """Return whether nothing of it is left, or its time is over.

        When the time is over, the caller cuts the connection, and the agent notices that.
        """
        return self.ending and (not self.agents.busy_links() or now_s >= self.next_s)

    def close(self, now_s: float) -> None:
        """Close the connections to its agents, which makes them end if they have not yet."""
        for process in self.agents.running():
            self.around.logs.close(process)
        deadline = max(now_s, min(self._end_by_s, now_s + AGENT_END_S))
        self.agents.close(deadline, forget_silent=self._overdue is not None)
