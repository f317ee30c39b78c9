"""Reports the failure of a unit: finds the process that failed first, and shows its last lines."""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.agents import Agents, Exit
from launcher.logs import Logs, printable
from launcher.plan import Process
from launcher.ssh import cure
from launcher.transport import AgentLink

__all__ = ["Failure", "agent_failure", "failure_of", "has_failed", "is_settled", "process_failure", "signs_of_trouble"]

USAGE = 64  # EX_USAGE of sysexits.h: the command itself is wrong
RECENT_S = 30.0  # a process did not die of a traceback that is older than this
SHOWN_LINES = 20
TRACEBACK = "Traceback (most recent call last)"
ERROR_CHARACTERS = 200


@dataclass(frozen=True)
class Failure:
    """The failure of the first process that failed, not of those it pulled along. `str()` tells everything."""

    host: str
    process: Process | None  # None: the agent or the machine itself
    reason: str
    exit_code: int
    last_lines: tuple[str, ...] = ()  # from its stderr, or from its stdout if stderr is empty
    log_folder: Path | None = None
    by_itself: bool = False  # it ended with an exit code of its own, and was not killed
    is_final: bool = False  # it left the run of its own accord, and would do so again
    is_cause: bool = False  # no failure of another process can have caused it
    advice: str | None = None

    def __str__(self) -> str:
        lines = [self.reason, *([self.advice] if self.advice else [])]
        if self.log_folder is not None:
            lines.append(f"its whole output is in {self.log_folder}")
        if self.last_lines:
            whose = "its last lines" if self.process is None else f"the last lines of {_full_name(self.process)}"
            lines += [f"{whose}:", *(f"  | {line}" for line in self.last_lines)]
        return "\n".join(lines)

    @property
    def sentence(self) -> str:
        """The reason without the machine, for a line that already names it.

        With the error that ended a process, or the last line of ssh, if there is one.
        """
        reason = self.reason.replace(f" on {self.host} ", " ", 1)
        why = self.error or (self.last_lines[-1].strip() if self.process is None and self.last_lines else "")
        return f"{reason} ({why})" if why else reason

    @property
    def error(self) -> str:
        """The line of a traceback with the error that ended it, such as ValueError: no; empty if there is none."""
        begins = [number for number, line in enumerate(self.last_lines) if line.startswith(TRACEBACK)]
        if not begins or self.exit_code > 128:
            return ""
        after = self.last_lines[begins[-1] + 1 :]
        return next((line for line in after if line and not line[0].isspace()), "")[:ERROR_CHARACTERS]


def failure_of(agents: Agents) -> Failure | None:
    """Return the failure that caused the others in a unit, as far as we know; None if nothing has failed.

    A process that failed by itself takes precedence over one whose neighbours may have made it fail, in whatever order
    we hear of them: a rank that leaves breaks the collectives of the others, and their tracebacks may arrive before its
    exit code. Among equals, we blame the process whose trouble began first.
    """
    if agents.lost is not None:
        return agent_failure(agents.lost.link, agents.lost.reason)
    failed = [agents.processes[name] for name in agents.exits if has_failed(agents, name)]
    if not failed:
        return None
    first = min(
        failed,
        key=lambda process: (not _is_cause(agents.exits[process.name]), _trouble_began_s(agents, process)),
    )
    end = agents.exits[first.name]
    exit_code = 128 - end.status if end.status < 0 else end.status or 1
    failure = process_failure(agents.logs, first, end.error or _describe(end), exit_code)
    return replace(
        failure,
        by_itself=end.status >= 0,
        is_final=end.missing is not None or end.status == USAGE,
        is_cause=_is_cause(end),
        advice=_advice(first, end),
    )


def is_settled(failure: Failure, agents: Agents, now_s: float) -> bool:
    """Return whether no running process and no report on its way can change which process is to blame.

    A process may have ended with an exit code of its own, or by abort() as C++ libraries do, because another process
    failed that has not ended yet, or whose end has not been reported yet. A process that still runs and has printed a
    traceback may have been in trouble before all others.
    """
    running = agents.running()
    if agents.lost is not None or failure.is_cause or not running:
        return True
    was_aborted = failure.exit_code == 128 + signal.SIGABRT
    may_be_pulled_along = (failure.by_itself and not failure.is_final) or was_aborted
    return not may_be_pulled_along and not any(_tracebacks_s(agents.logs, process, now_s) for process in running)


def signs_of_trouble(agents: Agents, now_s: float) -> set[str]:
    """Return the signs of trouble: ended processes, and tracebacks of running ones. While new ones appear, wait."""
    raising = [process.name for process in agents.running() if _tracebacks_s(agents.logs, process, now_s)]
    return {*(f"{name} ended" for name in agents.exits), *(f"{name} raises" for name in raising)}


def agent_failure(link: AgentLink, what: str) -> Failure:
    name = link.host.name
    advice = None if link.said_hello else cure(link)
    noise = "" if link.said_hello or not link.noise else f", but sent something else than an answer: {link.noise}"
    reason = f"the agent on {name} {what}{printable(noise)}" + (f": {advice}" if advice else "")
    return Failure(name, None, reason, 1, tuple(map(printable, link.last_words)))


def process_failure(logs: Logs, process: Process, what: str, exit_code: int) -> Failure:
    lines = logs.tail(process, "stderr") or logs.tail(process, "stdout")
    raised = [number for number, line in enumerate(lines) if line.text.startswith(TRACEBACK) and exit_code <= 128]
    begins = raised[0] if raised else -SHOWN_LINES
    last_lines = tuple(line.text for line in lines[begins:])
    name = process.name if process.rank is None else f"rank {process.rank}"
    reason = f"{name} on {process.host.name} {what}"
    return Failure(process.host.name, process, reason, exit_code, last_lines, logs.folder(process))


def _full_name(process: Process) -> str:
    worker = "" if process.worker is None else f" (worker {process.worker})"
    name = process.name if process.rank is None else f"rank {process.rank}{worker}"
    return f"{name} on {process.host.name}"


def has_failed(agents: Agents, name: str) -> bool:
    """Return whether a process that ended has failed."""
    # A service may end well before the ranks do, after the workers have left it, but it must have announced itself.
    announces, end = agents.processes[name].announces, agents.exits[name]
    unannounced = announces is not None and announces not in agents.announced
    return end.status != 0 or end.missing is not None or unannounced


def _is_cause(end: Exit) -> bool:
    """Return whether a process ended in a way that a failing neighbour cannot cause.

    Either its exit code USAGE says that it left a run that goes on, or it was killed by SIGKILL, or it ended with exit
    code 0 too early and without reporting that it leaves.
    """
    left_in_silence = end.missing is not None and not end.said_that_it_leaves
    return end.status in (USAGE, -signal.SIGKILL) or left_in_silence


def _trouble_began_s(agents: Agents, process: Process) -> float:
    """Return when it died, or when it began to print the traceback of the error that ended it."""
    died_s = agents.exits[process.name].at_s
    return min([died_s, *_tracebacks_s(agents.logs, process, died_s)])


def _tracebacks_s(logs: Logs, process: Process, now_s: float) -> list[float]:
    lines = logs.tail(process, "stderr")
    return [line.at_s for line in lines if line.text.startswith(TRACEBACK) and line.at_s > now_s - RECENT_S]


def _describe(end: Exit) -> str:
    status = end.status
    if end.missing is not None:
        return f"ended with exit code 0, but {end.missing}"
    if status == 0:
        return "ended before it announced itself"
    if status > 0:
        return f"ended with exit code {status}"
    names = {signum.value: signum.name for signum in signal.Signals}
    return f"was killed by {names.get(-status, f'signal {-status}')}" + ", out of memory" * _ran_out_of_memory(end)


def _ran_out_of_memory(end: Exit) -> bool:
    return end.status == -signal.SIGKILL and end.out_of_memory


def _advice(process: Process, end: Exit) -> str | None:
    """Say what a SIGKILL may mean, because a process that gets one cannot print a reason."""
    if end.status != -signal.SIGKILL:
        return None
    if end.out_of_memory:
        return f"the kernel of {process.host.name} kills processes when memory runs out: use less of it, or fewer ranks"
    return (
        f"if nobody did that, the kernel of {process.host.name} may have run out of memory (`dmesg` there says so), "
        "or a batch system enforced a limit"
    )
