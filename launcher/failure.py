"""What is said of a unit that failed: which of its processes it began with, and that one's last lines."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

from launcher.cluster import Cluster
from launcher.logs import Logs
from launcher.plan import Process
from launcher.ssh import cure
from launcher.transport import AgentLink

__all__ = ["Failure", "agent_failure", "failure_of", "process_failure", "somebody_is_failing"]

RECENT_S = 30.0  # a traceback older than this was not what a process died of
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
    by_itself: bool = False  # it ended with an exit code of its own, and was not killed

    def __str__(self) -> str:
        lines = [self.reason]
        if self.last_lines:
            lines += ["its last lines:", *(f"  | {line}" for line in self.last_lines)]
        if self.log_folder is not None:
            lines.append(f"its whole output is in {self.log_folder}")
        return "\n".join(lines)

    @property
    def sentence(self) -> str:
        """The reason without the machine, for a line that names it already; for an agent with what ssh said."""
        reason = self.reason.replace(f" on {self.host} ", " ", 1)
        return f"{reason} ({self.last_lines[-1].strip()})" if self.process is None and self.last_lines else reason


def failure_of(cluster: Cluster) -> Failure | None:
    """With what the failure of a unit began, if it has failed."""
    if cluster.lost is not None:
        return agent_failure(cluster.lost.link, cluster.lost.reason)
    failed = [cluster.processes[name] for name in cluster.exits if _has_failed(cluster, name)]
    if not failed:
        return None
    first = min(failed, key=lambda process: _trouble_began_s(cluster, process))
    end = cluster.exits[first.name]
    exit_code = 128 - end.status if end.status < 0 else end.status or 1
    what = end.error or _describe(end.status)
    return process_failure(cluster.logs, first, what, exit_code, by_itself=end.status > 0)


def somebody_is_failing(cluster: Cluster, now_s: float) -> bool:
    """Whether a process that still runs has begun to say what it is about to die of."""
    running = cluster.running()
    return cluster.lost is None and any(_tracebacks_s(cluster.logs, process, now_s) for process in running)


def agent_failure(link: AgentLink, what: str) -> Failure:
    name = link.host.name
    advice = None if link.said_hello else cure(link)
    noise = "" if link.said_hello or not link.noise else f", but sent something else than an answer: {link.noise}"
    reason = f"the agent on {name} {what}{noise}" + (f": {advice}" if advice else "")
    return Failure(name, None, reason, 1, tuple(link.last_words))


def process_failure(logs: Logs, process: Process, what: str, exit_code: int, by_itself: bool = False) -> Failure:
    lines = logs.tail(process, "stderr") or logs.tail(process, "stdout")
    last_lines = tuple(line.text for line in lines[-SHOWN_LINES:])
    name = process.name if process.rank is None else f"rank {process.rank}"
    reason = f"{name} on {process.host.name} {what}"
    return Failure(process.host.name, process, reason, exit_code, last_lines, logs.folder(process), by_itself)


def _has_failed(cluster: Cluster, name: str) -> bool:
    # A service may end well before the ranks do, when the workers have left it, but not without an announcement.
    announces = cluster.processes[name].announces
    unannounced = announces is not None and announces not in cluster.announced
    return cluster.exits[name].status != 0 or unannounced


def _trouble_began_s(cluster: Cluster, process: Process) -> float:
    """When it died, or began to print the traceback of which it then died."""
    died_s = cluster.exits[process.name].at_s
    return min([died_s, *_tracebacks_s(cluster.logs, process, died_s)])


def _tracebacks_s(logs: Logs, process: Process, now_s: float) -> list[float]:
    lines = logs.tail(process, "stderr")
    return [line.at_s for line in lines if line.text.startswith(TRACEBACK) and line.at_s > now_s - RECENT_S]


def _describe(status: int) -> str:
    if status == 0:
        return "ended before it was of use"
    if status > 0:
        return f"ended with exit code {status}"
    names = {signum.value: signum.name for signum in signal.Signals}
    return f"was killed by {names.get(-status, f'signal {-status}')}"
