"""Ranks of Horovod and torch.distributed find each other by what the launcher gives them, and all-reduce for real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

DEADLINE_S = 60.0

LAUNCHER = """
import json, os, sys
from launcher.hosts import parse_hosts
from launcher.logs import quiet
from launcher.plan import Workers, plan
from launcher.run import run

folder, hosts, one_world, workers_per_host, script = sys.argv[1:]
workers = Workers([sys.executable, "-c", script], int(workers_per_host), one_world == "yes")
laid = plan(parse_hosts(hosts), workers, env=dict(os.environ), cwd=folder)
outcome = run(laid, folder, echo=quiet)
print(json.dumps({"exit_code": outcome.exit_code, "failure": str(outcome.failure)}))
"""

HOROVOD = """
import json, os
import torch
import torch.distributed as dist
import horovod.torch as hvd
hvd.init()
value = float(os.environ["BASE"]) * 10 ** int(os.environ["LAUNCHER_WORKER"]) * (hvd.rank() + 1)
total = hvd.allreduce(torch.full((1000,), value), op=hvd.Sum)
names = hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size(), hvd.cross_rank(), hvd.cross_size()
hvd.shutdown()
hvd.init()
again = hvd.allreduce(torch.ones(1), op=hvd.Sum)
hvd.shutdown()
dist.init_process_group("gloo")
other = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(other)
dist.destroy_process_group()
print(json.dumps([total.unique().tolist(), names, again.item(), other.item()]))
"""

ONE_RAISES = """
import os
import torch
import horovod.torch as hvd
hvd.init()
hvd.allreduce(torch.ones(1), name="first")
if hvd.rank() == 1: raise RuntimeError("the cause")
hvd.allreduce(torch.ones(1), name="second")
"""


def start(
    folder: Path, script: str, hosts: str, *, one_world: bool, workers_per_host: int = 1, base: int = 1
) -> subprocess.Popen[bytes]:
    folder.mkdir()
    arguments = [str(folder), hosts, "yes" if one_world else "no", str(workers_per_host), script]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "BASE": str(base)}
    return subprocess.Popen([sys.executable, "-c", LAUNCHER, *arguments], env=env, stdout=subprocess.PIPE)


def outcome(launched: subprocess.Popen[bytes]) -> dict[str, object]:
    try:
        output, _ = launched.communicate(timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        launched.send_signal(signal.SIGINT)
        launched.communicate(timeout=DEADLINE_S)
        raise
    result: dict[str, object] = json.loads(output)
    return result


def said(folder: Path, host: str, rank: int) -> object:
    return json.loads((folder / "logs" / host / f"rank.{rank}" / "stdout").read_text())


ENDED_WELL = {"exit_code": 0, "failure": "None"}


def test_a_world_per_worker_all_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert outcome(start(folder, HOROVOD, "localhost:4", one_world=False, workers_per_host=2)) == ENDED_WELL
    for rank in range(4):
        worker, place = divmod(rank, 2)
        total = [3.0 * 10**worker]
        assert said(folder, "localhost", rank) == [total, [place, 2, place, 2, 0, 1], 2.0, 3.0]


@pytest.mark.slow  # test_launcher_kill.py has two runs at once, without Horovod
def test_two_runs_at_once_each_a_world_over_two_hosts(tmp_path: Path) -> None:
    runs = [
        start(tmp_path / f"{base}", HOROVOD, "localhost:1,127.0.0.1:1", one_world=True, base=base) for base in (1, 100)
    ]
    assert [outcome(run) for run in runs] == [ENDED_WELL, ENDED_WELL]
    for base in (1, 100):
        total = [base + 10.0 * base * 2]
        assert said(tmp_path / f"{base}", "localhost", 0) == [total, [0, 2, 0, 1, 0, 2], 2.0, 3.0]
        assert said(tmp_path / f"{base}", "127.0.0.1", 1) == [total, [1, 2, 0, 1, 1, 2], 2.0, 3.0]


def test_the_rank_that_raised_is_blamed_not_those_that_waited_for_it(tmp_path: Path) -> None:
    result = outcome(start(tmp_path / "run", ONE_RAISES, "localhost:2", one_world=True))
    assert result["exit_code"] == 1
    assert str(result["failure"]).startswith("rank 1 on localhost ended with exit code 1\n")
    assert "RuntimeError: the cause" in str(result["failure"])
