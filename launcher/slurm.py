"""Runs inside a Slurm allocation: takes the hosts and slots from it, and starts the agents by `srun`.

    srun --nodelist host … python -m launcher.agent

As with ssh, the orders reach the agent through its stdin. From the environment, only the variables that a login would
set are passed on.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from launcher.hosts import NAME, Host, HostsError
from launcher.machine import is_loopback
from launcher.transport import local_agent_command

__all__ = ["Srun", "expand_nodes", "expand_tasks", "hosts_of_allocation", "is_in_allocation"]

MOST_NODES = 65536  # nodes in a job
MOST_BRACKETS = 16  # brackets in the name of a node
OPTIONS = (
    "--nodes=1",
    "--ntasks=1",
    "--overlap",  # each agent may use its whole machine, even if other steps of the job run there
    "--cpu-bind=none",  # do not bind the task to one core: the ranks share all cores
    "--export=HOME,USER,LOGNAME,SHELL,LANG,PATH",
    "--chdir=/",  # `-m` imports from the working directory first; / holds no Python files
    "--unbuffered",
    "--quiet",
)


@dataclass(frozen=True)
class Srun:
    """Starts agents on the machines of the allocation."""

    python: str = sys.executable  # path of Python on those machines

    def __call__(self, host: Host) -> Sequence[str]:
        if self.reaches_directly(host):
            return local_agent_command(host)
        return ["srun", *OPTIONS, f"--nodelist={host.name}", self.python, "-m", "launcher.agent"]

    def reaches_directly(self, host: Host) -> bool:
        """Return whether the host is named as loopback. Under its node name, even this machine gets a job step."""
        return is_loopback(host.name)


def is_in_allocation(env: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process runs in a Slurm job."""
    return bool(env.get("SLURM_JOB_ID"))


def hosts_of_allocation(env: Mapping[str, str] = os.environ) -> tuple[Host, ...]:
    """Return the machines of this job, each with one slot per Slurm task. Raises HostsError outside of a job."""
    nodes = env.get("SLURM_JOB_NODELIST")
    if not nodes and is_in_allocation(env):
        raise HostsError(
            f"SLURM_JOB_ID={env['SLURM_JOB_ID']} says that this is a job of Slurm's, but SLURM_JOB_NODELIST, which "
            "names its machines, is not set; name them by --hosts, or say --launcher local for this machine alone"
        )
    if not nodes:
        raise HostsError("--launcher slurm needs an allocation (sbatch or salloc); SLURM_JOB_NODELIST is not set")
    names = expand_nodes(nodes)
    return tuple(Host(name, slots) for name, slots in zip(names, _tasks(len(names), env), strict=True))


def _tasks(nodes: int, env: Mapping[str, str]) -> list[int] | list[None]:
    """Return how many tasks each node has; None for each if the user asked for no tasks. Raises HostsError.

    Without such a request, SLURM_TASKS_PER_NODE says one task per core, which the user did not ask for.
    """
    asked = {name: env[name] for name in ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE") if env.get(name)}
    if not asked:
        return [None] * nodes
    per_node = env.get("SLURM_TASKS_PER_NODE") or asked.get("SLURM_NTASKS_PER_NODE")
    if per_node is None and nodes > 1:
        raise HostsError(
            f"SLURM_NTASKS={asked['SLURM_NTASKS']} is set, but not SLURM_TASKS_PER_NODE, so the number on each of "
            f"the {nodes} machines is unknown; name the machines by --hosts, with their slots"
        )
    tasks = expand_tasks(per_node or asked["SLURM_NTASKS"])
    if len(tasks) == 1 and not env.get("SLURM_TASKS_PER_NODE"):
        return tasks * nodes
    if len(tasks) != nodes:
        raise HostsError(f"SLURM_JOB_NODELIST names {nodes} machines, SLURM_TASKS_PER_NODE {len(tasks)}")
    return tasks


def expand_nodes(text: str) -> list[str]:
    """Expand `n[01-03,7],gpu1` to n01, n02, n03, n7, gpu1. Raises HostsError."""
    parts = _split(text)
    if any(part.count("[") > MOST_BRACKETS for part in parts):
        raise HostsError(f"{text[:80]!r} is not a list of Slurm's nodes: a name holds too many brackets")
    names = list(islice((name for part in parts for name in _expand(part, text)), MOST_NODES + 1))
    if not names or len(set(names)) < len(names) or not all(map(NAME.fullmatch, names)):
        raise HostsError(f"{text!r} is not a list of Slurm's nodes")
    if len(names) > MOST_NODES:
        raise HostsError(f"{text!r} names more than {MOST_NODES} machines")
    return names


def expand_tasks(text: str) -> list[int]:
    """Expand `4(x2),3` to 4, 4, 3. Raises HostsError."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([1-9][0-9]{0,3})(?:\(x([1-9][0-9]{0,4})\))?", part)
        if match is None:
            raise HostsError(f"Slurm's tasks per node are {text!r}; expected such as 4(x2),3")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _split(text: str) -> list[str]:
    """Split at the commas outside brackets."""
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
