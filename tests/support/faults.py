"""What can happen to a run: ranks, machines, links and the server fail, and strangers talk to it.

A fault is injected at a host of the run. If it lasts a while, its function undoes it before it returns.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from namespaces import LAUNCHING
from watched import SERVER_PORT, WatchedRun

CUT_S = (2.0, 15.0)  # the longest cut lasts longer than the wait before a request's first repetition
SLOW_S = 4.0
LATE = 0.7
SLOW_LINK = ("tbf", "rate", "2mbit", "burst", "16kbit", "latency", "400ms")
GARBAGE = Path(__file__).with_name("garbage.py")

Fault = Callable[[WatchedRun, str, random.Random], None]


def kill_a_rank(run: WatchedRun, host: str, chance: random.Random) -> None:
    _signal(signal.SIGKILL, run.ranks(host)[:1])


def kill_a_worker(run: WatchedRun, host: str, chance: random.Random) -> None:
    """Kill all of danaz on a machine: agent, guardian and ranks."""
    _signal(signal.SIGKILL, run.network.processes(host))


def kill_the_server(run: WatchedRun, host: str, chance: random.Random) -> None:
    _signal(signal.SIGKILL, run.servers())


def kill_ssh(run: WatchedRun, host: str, chance: random.Random) -> None:
    _signal(signal.SIGKILL, run.ssh(host))


def freeze_a_rank(run: WatchedRun, host: str, chance: random.Random) -> None:
    """Freeze a rank for a while. It must not hold up the others."""
    pids = run.ranks(host)[:1]
    _signal(signal.SIGSTOP, pids)
    try:
        time.sleep(SLOW_S)
    finally:
        _signal(signal.SIGCONT, pids)


def hang_a_rank_for_ever(run: WatchedRun, host: str, chance: random.Random) -> None:
    """Make a rank hang for ever. The others go on without its worker, and the run still ends."""
    for pid in run.ranks(host)[:1]:
        run.hung[host] = pid
        _signal(signal.SIGSTOP, [pid])


def fill_the_disk(run: WatchedRun, host: str, chance: random.Random) -> None:
    """Fill the run folder's disk to the last byte for a while, but leave room again before the results are written."""
    if run.share_done > LATE:
        return
    filler = run.folder / "filler"
    try:
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16) if shutil.disk_usage(run.folder).free > 1 << 16 else b"0")
        time.sleep(SLOW_S)
    finally:
        filler.unlink()


def cut_the_link(run: WatchedRun, host: str, chance: random.Random) -> None:
    run.network.link(host, "down")
    try:
        time.sleep(chance.uniform(*CUT_S))
    finally:
        run.network.link(host, "up")


def slow_the_link(run: WatchedRun, host: str, chance: random.Random) -> None:
    device = ["dev", f"to-{host}", "root"]
    tc = ["ip", "netns", "exec", run.network[LAUNCHING].namespace, "tc", "qdisc"]
    subprocess.run([*tc, "add", *device, *SLOW_LINK], check=True)
    try:
        time.sleep(SLOW_S)
    finally:
        subprocess.run([*tc, "del", *device], check=True)


def send_garbage(run: WatchedRun, host: str, chance: random.Random) -> None:
    """Send garbage from a machine of the run, because such a machine need not be a friend."""
    address = f"{run.network[LAUNCHING].address}:{SERVER_PORT}"
    sender = run.network.popen([sys.executable, str(GARBAGE), address, str(chance.randrange(1 << 30))], on=host)
    said = sender.communicate()[0]
    run.require(sender.returncode == 0, f"the sender of garbage failed: {said}")


FAULTS: dict[str, Fault] = {
    fault.__name__.replace("_", " "): fault
    for fault in (
        kill_a_rank,
        kill_a_worker,
        kill_the_server,
        kill_ssh,
        freeze_a_rank,
        hang_a_rank_for_ever,
        fill_the_disk,
        cut_the_link,
        slow_the_link,
        send_garbage,
    )
}


def _signal(number: signal.Signals, pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
