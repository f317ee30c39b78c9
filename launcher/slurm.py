"""Inside a Slurm allocation: its hosts and slots are the machines, and `srun` starts the agents on them.

    srun --nodelist host … python -m launcher.agent

As with ssh, the order reaches the agent through its stdin, and of the environment only what a login would set travels.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from launcher.hosts import Host, HostsError
from launcher.machine import is_loopback
from launcher.transport import local_agent_command

__all__ = ["Srun", "expand_nodes", "expand_tasks", "hosts_of_allocation", "is_in_allocation"]

OPTIONS = (
    "--nodes=1",
    "--ntasks=1",
    "--overlap",  # each agent has its whole machine; other steps of the job may be there
    "--cpu-bind=none",  # not one core for one task: the ranks share them all
    "--export=HOME,USER,LOGNAME,SHELL,LANG,PATH",
    "--chdir=/",  # holds no Python: `-m` imports from the working directory before all others
    "--unbuffered",
    "--quiet",
)


@dataclass(frozen=True)
class Srun:
    """How agents are started on the machines of the allocation."""

    python: str = sys.executable  # there

    def __call__(self, host: Host) -> Sequence[str]:
        if self.reaches_directly(host):
            return local_agent_command(host)
        return ["srun", *OPTIONS, f"--nodelist={host.name}", self.python, "-m", "launcher.agent"]

    def reaches_directly(self, host: Host) -> bool:
        """Only by its name of localhost: as a node of Slurm's, also this machine is used by a step of the job."""
        return is_loopback(host.name)


def is_in_allocation(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this process runs in a job of Slurm's."""
    return "SLURM_JOB_ID" in env


def hosts_of_allocation(env: Mapping[str, str] = os.environ) -> tuple[Host, ...]:
    """The machines of this job, with as many slots as Slurm has tasks for them. Raises HostsError outside of a job."""
    nodes = env.get("SLURM_JOB_NODELIST")
    if nodes is None:
        raise HostsError("--launcher slurm needs an allocation (sbatch or salloc); SLURM_JOB_NODELIST is not set")
    names = expand_nodes(nodes)
    # SLURM_TASKS_PER_NODE is always there; where nobody asked for tasks it says one a core, which nobody wished either.
    asked = "SLURM_NTASKS" in env or "SLURM_NTASKS_PER_NODE" in env
    tasks: list[int | None] = [*expand_tasks(env["SLURM_TASKS_PER_NODE"])] if asked else [None] * len(names)
    if len(tasks) != len(names):
        raise HostsError(f"SLURM_JOB_NODELIST={nodes} names {len(names)} machines, SLURM_TASKS_PER_NODE {len(tasks)}")
    return tuple(Host(name, slots) for name, slots in zip(names, tasks, strict=True))


def expand_nodes(text: str) -> list[str]:
    """`n[01-03,7],gpu1` -> n01, n02, n03, n7, gpu1. Raises HostsError."""
    names = [name for part in _split(text) for name in _expand(part, text)]
    if not names or len(set(names)) < len(names):
        raise HostsError(f"{text!r} is not a list of Slurm's nodes")
    return names


def expand_tasks(text: str) -> list[int]:
    """`4(x2),3` -> 4, 4, 3. Raises HostsError."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([1-9][0-9]{0,3})(?:\(x([1-9][0-9]{0,4})\))?", part)
        if match is None:
            raise HostsError(f"SLURM_TASKS_PER_NODE={text!r}; expected such as 4(x2),3")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    return re.findall(r"(?:[^,\[]|\[[^\]]*\]|\[)+", text)


def _expand(part: str, text: str) -> Iterator[str]:
    before, bracket, rest = part.partition("[")
    if not bracket:
        yield part
        return
    ranges, closed, after = rest.partition("]")
    if not closed:
        raise HostsError(f"{text!r} is not a list of Slurm's nodes: a bracket is not closed")
    for number in (number for each in ranges.split(",") for number in _numbers(each, text)):
        for tail in _expand(after, text):
            yield before + number + tail


def _numbers(each: str, text: str) -> list[str]:
    match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", each)
    if match is None:
        raise HostsError(f"{text!r} is not a list of Slurm's nodes: {each!r} is no number and no range")
    first, last = int(match[1]), int(match[2] or match[1])
    if not first <= last < first + 100_000:
        raise HostsError(f"{text!r} is not a list of Slurm's nodes: {each!r} is no range")
    return [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
