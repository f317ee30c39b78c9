"""A run on several machines, watched from outside: its processes, its files, and what must hold whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import live
import psutil
import torch
from namespaces import LAUNCHING, Namespaces

from danaz.server.snapshot import ResumeError
from danaz.serving.checkpoint import FOLDER, read_newest
from danaz.vectors.counts import Counts

SLOTS = {"a": 2, "b": 1, "c": 1}
SERVER_PORT = 7071
BATCHES_PER_EPOCH = 45  # batches per epoch in digits.yaml
RECOVERY_S = 120.0
RUN_S = 900.0
FLAT_BYTES = 64 << 20  # a server may grow by this much, for its allocator and its table of figures
DISK = "64m"  # size of the run folder's disk, which a fault fills
SUM_TOLERANCE = 1e-4  # float32 rounding between two fresh sums


class Broken(AssertionError):
    """Something that must hold did not."""


class WatchedRun:
    """One `danaz launch` over the machines, which ends with the ``with`` block."""

    def __init__(self, network: Namespaces, folder: Path, algorithm: str, insecure: bool, epochs: int):
        self.network, self.folder = network, folder
        folder.mkdir(mode=0o700)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)], check=True)
        hosts = ",".join(f"{name}:{slots}" for name, slots in SLOTS.items())
        schedule = [epochs // 2, epochs * 17 // 20]
        options = {"epochs": epochs, "lr_schedule.milestones": schedule, "lr_schedule.warmup_epochs": epochs // 30}
        settings = [part for key, value in options.items() for part in ("--set", f"{key}={json.dumps(value)}")]
        self.log = (folder.parent / f"{folder.name}.log").open("w+")
        self.process = network.danaz(
            *("launch", "configs/digits.yaml", "--algorithm", algorithm, "--hosts", hosts, "--out", str(folder)),
            *("--server-port", str(SERVER_PORT), "--max-restarts", "1000", "--checkpoint-seconds", "2", *settings),
            *(["--insecure"] if insecure else []),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        self.algorithm, self.epochs = algorithm, epochs
        self.hung: dict[str, int] = {}  # host -> its rank that was stopped for ever
        self.server_bytes: list[int] = []
        self.sums_checked = 0

    def __enter__(self) -> WatchedRun:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.over:
            self.process.send_signal(signal.SIGINT)
            self.process.wait()
        self.log.close()
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)

    # ---- what it consists of -------------------------------------------------------------------------------------

    @property
    def over(self) -> bool:
        return self.process.poll() is not None

    def updates(self) -> list[dict[str, Any]]:
        return live.read_updates(self.folder)

    @property
    def share_done(self) -> float:
        """Return the share of the run's updates that is done."""
        return len(self.updates()) / (self.epochs * BATCHES_PER_EPOCH)

    def well(self) -> list[int]:
        """Return the workers that have no hanging rank."""
        hung = [host for host, pid in self.hung.items() if psutil.pid_exists(pid)]
        return [worker for worker, host in enumerate(SLOTS) if host not in hung]

    def ranks(self, host: str) -> list[int]:
        return [pid for pid, line in self.network.processes(host).items() if " -m danaz work" in line]

    def servers(self) -> list[int]:
        return [pid for pid, line in self.network.processes(LAUNCHING).items() if " -m danaz serve" in line]

    def ssh(self, host: str) -> list[int]:
        processes = self.network.processes(LAUNCHING).items()
        return [pid for pid, line in processes if line.startswith("ssh ") and f" {host} " in line]

    def said(self) -> str:
        """Return the end of what `danaz launch` printed."""
        return "".join(Path(self.log.name).read_text().splitlines(keepends=True)[-40:])

    def require(self, condition: bool, what: str) -> None:
        if not condition:
            raise Broken(f"{what}\n--- the end of what danaz launch printed:\n{self.said()}")

    # ---- what must hold ------------------------------------------------------------------------------------------

    def await_updates(self) -> float:
        """Wait until every worker that does not hang has made two updates from now on; return the seconds it took."""
        began, version = time.monotonic(), len(self.updates())
        while not self.over:
            # A server that goes back cuts the file, and the count goes on from there.
            updates = self.updates()
            version = min(version, len(updates))
            seen = Counter(update["worker"] for update in updates[version:])
            if all(seen[worker] >= 2 for worker in self.well()):
                break
            waited_s = time.monotonic() - began
            self.require(waited_s < RECOVERY_S, f"after {RECOVERY_S:g} s only these made updates: {dict(seen)}")
            time.sleep(0.1)
        return time.monotonic() - began

    def check(self) -> None:
        """Check that versions have no hole, only the run's own processes run, and the server does not grow."""
        versions = [update["version"] for update in self.updates()]
        self.require(versions == list(range(1, len(versions) + 1)), "versions in updates.jsonl have a hole")
        self.check_sum()
        for host, slots in SLOTS.items():
            self.await_processes(lambda host=host: self.ranks(host), slots, f"ranks on {host}")
        self.await_processes(self.servers, 1, "server")
        with suppress(psutil.NoSuchProcess, IndexError):  # the run may just have ended
            self.server_bytes.append(psutil.Process(self.servers()[0]).memory_info().rss)
        growth = max(self.server_bytes, default=0) - min(self.server_bytes, default=0)
        self.require(growth < FLAT_BYTES, f"the server grew by {growth / 1e6:.0f} MB")

    def check_sum(self) -> None:
        """If the rule keeps R, check R = Σ ηⱼvⱼ over the workers that take part, in the newest checkpoint."""
        try:
            found = read_newest(self.folder / FOLDER)
        except (ResumeError, FileNotFoundError):  # both files are being replaced just now
            return
        if found is None or "shared.sum" not in found[0].tensors:
            return
        members, tensors = found[0].facts["members"], found[0].tensors
        taking_part = [member for member in members if member["alive"] and not member["left"]]
        total = torch.zeros_like(tensors["shared.sum"])
        for member in taking_part:
            velocity = tensors[f"member.{member['worker']}.velocity"]
            for start, stop, _, lr in Counts.from_lists(member["counts"]).runs(0, len(total)):
                total[start:stop] += lr * velocity[start:stop]
        off = float((total - tensors["shared.sum"]).abs().max())
        self.require(off < SUM_TOLERANCE, f"the sum of the velocities is off by {off}")
        self.sums_checked += 1

    def await_processes(self, find: Callable[[], list[int]], count: int, what: str) -> None:
        """Wait until exactly ``count`` processes are there, or until the run is over, because its ranks end first."""
        deadline = time.monotonic() + RECOVERY_S
        while not self.over and len(find()) != count:
            self.require(time.monotonic() < deadline, f"{len(find())} {what} instead of {count}")
            time.sleep(0.1)

    def finish(self) -> float:
        """Wait for the end, and return the test error in percent."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(RUN_S)
        self.require(self.process.poll() == 0, f"danaz launch ended with {self.process.poll()}")
        self.check()
        for host in (*SLOTS, LAUNCHING):
            left = self.network.processes(host)
            self.require(not left, f"left over on {host}: {left}")
        self.require(self.sums_checked > 0 or self.algorithm != "dana-zero", "no sum of velocities was ever seen")
        summary = json.loads((self.folder / "summary.json").read_text())
        self.require(summary["complete"] is True, f"not complete: {summary}")
        return float(summary["test_error_percent"])
