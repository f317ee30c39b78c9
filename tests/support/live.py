"""Real runs for tests: ``danaz launch`` in its own process, and what it left in its run folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from waiting import DEADLINE_S
from waiting import until as until  # so that tests of real runs need this one module

from danaz.run.folder import read_summary
from danaz.torch.data import Batching

ROOT = Path(__file__).parents[2]

# The loop over batches comes last, so that a test may add lines to it.
SMALL_SCRIPT = """\
import torch, danaz.torch as danaz
danaz.init()
model = torch.nn.Linear(2, 1)
optimizer = danaz.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), model)
data = torch.utils.data.TensorDataset(torch.randn(32, 2), torch.randn(32, 1))
loader = torch.utils.data.DataLoader(data, batch_size=8)
for epoch in danaz.epochs(1):
    for x, y in danaz.shard(loader, epoch):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
"""


# Four epochs of 50 samples in batches of 8, for any optimizer. Each rank saves its model in the folder that is named.
FIFTY_SAMPLES = """\
import sys, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import danaz.torch as danaz
danaz.init()
generator = torch.Generator().manual_seed(3)
x, y = torch.randn(50, 6, generator=generator), torch.randn(50, 2, generator=generator)
torch.manual_seed(danaz.rank())  # rank 0's parameters are everyone's
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
optimizer = danaz.DistributedOptimizer(OPTIMIZER, model)
for epoch in danaz.epochs(4):
    for a, b in danaz.shard(DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True), epoch):
        loss = nn.functional.mse_loss(model(a), b)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
torch.save(model.state_dict(), f"{sys.argv[1]}/model.{danaz.worker_id()}.{danaz.rank()}")
"""


def launch_fifty_samples(folder: Path, optimizer: str, *arguments: str) -> tuple[Run, list[dict[str, Tensor]]]:
    """Train FIFTY_SAMPLES with ``optimizer``, an expression; return the run and the model of each rank."""
    script = folder / "script.py"
    script.write_text(FIFTY_SAMPLES.replace("OPTIMIZER", optimizer))
    run = launch(*arguments, out=folder / "run", script=[str(script), str(folder)])
    return run, [torch.load(path) for path in sorted(folder.glob("model.*"))]


@dataclass(frozen=True)
class OneProcess:
    """FIFTY_SAMPLES as torch alone trains them in one process, which has all the batches of two workers."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float]


def fifty_samples_in_one_process(make: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]) -> OneProcess:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(50, 6, generator=generator), torch.randn(50, 2, generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer, losses = make(model.parameters()), []
    for batch in range(16):
        indices = Batching(50, 16).indices(batch)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x[indices]), y[indices])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return OneProcess(model, optimizer, losses)


@dataclass(frozen=True)
class Run:
    """A run that has ended."""

    folder: Path
    exit_code: int
    output: str  # both output streams of the launcher

    @property
    def summary(self) -> dict[str, Any]:
        return read_summary(self.folder)

    @property
    def updates(self) -> list[dict[str, Any]]:
        return read_updates(self.folder)


def read_updates(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of updates.jsonl so far, except a line that is being written; raise if another is not whole."""
    path = folder / "updates.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def start(
    *arguments: str, out: Path, script: Sequence[str] = (), env: Mapping[str, str] | None = None, **options: Any
) -> subprocess.Popen[str]:
    """Begin ``danaz launch``; ``script`` is what comes after ``--`` (with this Python in front)."""
    after = ["--", sys.executable, *script] if script else []
    # The run gets its own session, so that a signal to the test's process group does not reach the run.
    return subprocess.Popen(
        [sys.executable, "-m", "danaz", "launch", *arguments, "--out", str(out), *after],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    )


def finish(process: subprocess.Popen[str], folder: Path) -> Run:
    """Wait for a run to end. A run that does not end is terminated, and the test fails."""
    try:
        output, _ = process.communicate(timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher takes its processes along
        output, _ = process.communicate()
        raise AssertionError(f"the run did not end within {DEADLINE_S:.0f} s:\n{output}") from None
    return Run(folder, process.returncode, output)


def launch(*arguments: str, out: Path, succeeds: bool = True, **options: Any) -> Run:
    """Run ``danaz launch`` from beginning to end."""
    run = finish(start(*arguments, out=out, **options), out)
    assert (run.exit_code == 0) == succeeds, run.output
    return run


def processes_with(token: str) -> dict[int, dict[str, str]]:
    """Return pid -> environment of every process that inherited this word in its environment."""
    found = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            content = Path("/proc", entry, "environ").read_bytes().decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if token in content:
            found[int(entry)] = dict(item.split("=", 1) for item in content.split("\0") if "=" in item)
    return found


class Running:
    """A run under way. Its processes are found by a word that all its processes inherit."""

    def __init__(self, folder: Path, *arguments: str, script: Sequence[str] = ()):
        self.folder, self.token = folder, f"run-{uuid.uuid4()}"
        self.launcher = start(*arguments, out=folder, script=script, env={"MARK": self.token})

    @property
    def processes(self) -> dict[int, dict[str, str]]:
        return processes_with(self.token)

    @property
    def trains(self) -> bool:
        return len(read_updates(self.folder)) > 0

    def pid(self, who: str) -> int:
        if who == "launcher":
            return self.launcher.pid
        for pid, env in self.processes.items():
            words = Path("/proc", str(pid), "cmdline").read_bytes().decode().split("\0")
            if who == "server" and "serve" in words and "RANK" not in env:
                return pid
            if who == "rank" and "RANK" in env and env.get("DANAZ_WORKER") == "1":
                return pid
        raise AssertionError(f"no {who} among {self.processes.keys()}")

    def end(self) -> None:
        for pid in self.processes:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.launcher.wait()
        assert self.launcher.stdout is not None
        self.launcher.stdout.close()
