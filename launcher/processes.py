"""Ends whole process trees by the means of Linux: parent-death signals, sub-reapers and /proc."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterable, Iterator

__all__ = ["adopt_orphans", "count_memory_kills", "descendants", "die_with_parent", "reap", "send_signal"]

# <linux/prctl.h>
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

VMSTAT = "/proc/vmstat"

# Load it here, once, because die_with_parent runs between fork and exec, where nothing may wait for a lock.
_prctl = ctypes.CDLL(None, use_errno=True).prctl


def die_with_parent(signum: int) -> None:
    """Make the kernel send `signum` to this process when the thread that started it ends.

    The setting survives exec, but not fork.
    """
    _check(_prctl(PR_SET_PDEATHSIG, signum, 0, 0, 0))


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies, so that no double fork escapes from the tree."""
    _check(_prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def descendants(root: int | None = None) -> set[int]:
    """Return the pids of all processes below `root` (default: this one), including zombies."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        parent = _parent(entry) if entry.isdigit() else None
        if parent is not None:
            children.setdefault(parent, []).append(int(entry))
    found: set[int] = set()
    queue = [os.getpid() if root is None else root]
    while queue:
        below = children.get(queue.pop(), [])
        found.update(below)
        queue.extend(below)
    return found


def _parent(pid: str) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except (FileNotFoundError, ProcessLookupError):  # it ended while we looked
        return None
    # "pid (name) state ppid …", and the name may hold spaces and parentheses itself
    return int(stat.rpartition(b")")[2].split()[1])


def send_signal(pids: Iterable[int], signum: signal.Signals) -> None:
    """Signal every process that still exists. Skip those that we may not signal, because they changed their user."""
    for pid in pids:
        try:
            os.kill(pid, signum)
        except (ProcessLookupError, PermissionError):
            continue


def count_memory_kills() -> int:
    """Return how many processes this machine's kernel has killed because memory ran out; 0 if it does not say."""
    try:
        with open(VMSTAT, "rb") as file:
            lines = file.read().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(b"oom_kill "))


def reap() -> Iterator[tuple[int, int]]:
    """Wait for all children that have ended. Yield (pid, exit status, or minus the signal that ended it)."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, os.waitstatus_to_exitcode(status)
