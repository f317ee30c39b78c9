"""Whole runs that do not end as they should: scripts never train, leave early, or have processes that hang."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import live
import pytest

from danaz.torch.ending import UNFINISHED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TWO_WORKERS = ("--hosts", "localhost:2", "--workers-per-host", "2", "--algorithm", "dana")
ONE_WORLD = ("--hosts", "localhost:2", "--algorithm", "ssgd")

# A script that trains. The tests leave out or change some of its lines.
LINES = {
    "import": "import os, pathlib, signal, sys, time, torch\nfrom torch.utils.data import DataLoader, TensorDataset\n"
    "import danaz.torch as danaz",
    "init": "danaz.init()",
    "model": "model = torch.nn.Linear(4, 2)\n"
    "optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)\n"
    "loader = DataLoader(TensorDataset(torch.ones(80, 4)), batch_size=4)",
    "optimizer": "optimizer = danaz.DistributedOptimizer(optimizer, model)",
    "epochs": "for epoch in danaz.epochs(2):",
    "shard": "    for step, [x] in enumerate(danaz.shard(loader, epoch)):",
    "early": "",
    "step": "        optimizer.zero_grad(); model(x).square().mean().backward(); optimizer.step()",
    "late": "",
}
LEAVES = "        if step == 3 and danaz.{who}: sys.exit(0)"


def write(folder: Path, **changes: str) -> list[str]:
    """Write a script in which some lines are replaced."""
    script = folder / "train.py"
    script.write_text("\n".join({**LINES, **changes}.values()))
    return [str(script)]


def test_the_script_as_it_is_ends_well(tmp_path: Path) -> None:
    run = live.launch(*TWO_WORKERS, out=tmp_path / "run", script=write(tmp_path))
    assert run.summary["complete"]
    assert "incomplete" not in run.output


UNTRAINED = {
    "true": ({"import": "raise SystemExit(0)"}, 1, "ended with exit code 0, but it never called danaz.init()"),
    "alone": (
        {"import": "import torch", **dict.fromkeys(("init", "model", "optimizer", "epochs", "shard", "step"), "")},
        1,
        "ended with exit code 0, but it never called danaz.init()",
    ),
    "init only": (
        dict.fromkeys(("model", "optimizer", "epochs", "shard", "step"), ""),
        UNFINISHED,
        "calls danaz.init(), but never came to danaz.DistributedOptimizer(optimizer, model), danaz.epochs(N)",
    ),
    "no shard": (
        {"shard": "    for step, [x] in enumerate(loader):", "step": "        pass"},
        1,
        "nothing was trained in it: iterate danaz.shard(loader, epoch) in place of the loader",
    ),
    "no epochs": (
        {"epochs": "danaz.epochs(2)", "shard": "", "step": ""},
        UNFINISHED,
        "calls danaz.init(), but never came to danaz.shard(loader, epoch)",
    ),
}


@pytest.mark.parametrize(("name", "where"), [*((name, TWO_WORKERS) for name in UNTRAINED), ("no shard", ONE_WORLD)])
def test_a_script_that_trains_nothing_is_told_what_is_missing(
    tmp_path: Path, name: str, where: tuple[str, ...]
) -> None:
    changes, code, missing = UNTRAINED[name]
    run = live.launch(*where, out=tmp_path / "run", script=write(tmp_path, **changes), succeeds=False)
    assert run.exit_code == code
    assert missing in run.output
    assert "the run is incomplete" in run.output


def test_a_worker_that_leaves_early_is_told_at_the_end(tmp_path: Path) -> None:
    """The worker may not have meant to. The run ends in good order, and its exit code says that it was cut short."""
    left = f"pathlib.Path({str(tmp_path / 'left')!r})"
    leaves = f"        if step == 3 and danaz.worker_id() == 1: {left}.touch(); sys.exit(0)\n"
    # Otherwise worker 0 could train all batches before a slow worker 1 reaches its fourth.
    stays = f"        while step == 3 and danaz.worker_id() == 0 and not {left}.exists(): time.sleep(0.01)"
    run = live.launch(*TWO_WORKERS, out=tmp_path / "run", script=write(tmp_path, early=leaves + stays), succeeds=False)
    assert run.exit_code == UNFINISHED
    assert run.summary["stopped"] == "the script left its loop in epoch 0 of 2"
    assert run.summary["updates"] < 40
    assert "rank 1 on localhost ended with exit code 64" in run.output
    assert "call danaz.stop(reason) in the loop" in run.output


def test_the_last_worker_that_leaves_early_ends_the_run(tmp_path: Path) -> None:
    script = write(tmp_path, early=LEAVES.format(who="worker_id() >= 0"))
    run = live.launch(*TWO_WORKERS, out=tmp_path / "run", script=script, succeeds=False)
    assert run.exit_code == UNFINISHED
    assert run.summary["stopped"] == "the script left its loop in epoch 0 of 2"
    assert "stopped early" in run.output.partition("everything is in")[0], "the table says so, too"


@pytest.mark.parametrize("rank", [0, 1])
def test_the_rank_that_leaves_early_is_blamed_and_not_the_one_that_needs_it(tmp_path: Path, rank: int) -> None:
    script = write(tmp_path, early=LEAVES.format(who=f"rank() == {rank}"))
    run = live.launch(*ONE_WORLD, out=tmp_path / "run", script=script, succeeds=False)
    assert run.exit_code == UNFINISHED
    assert f"rank {rank} on localhost ended with exit code 64" in run.output


def test_a_run_that_is_over_ends_though_a_rank_hangs(tmp_path: Path) -> None:
    """The server forgets the silent worker, and 30 s after the server has ended, the launcher ends what is left."""
    hangs = "        if step == 3 and danaz.worker_id() == 1: os.kill(os.getpid(), signal.SIGSTOP)"
    run = live.launch(*TWO_WORKERS, out=tmp_path / "run", script=write(tmp_path, early=hangs))
    assert run.summary["complete"]
    assert run.summary["updates"] == 40
    assert "danaz: worker 1 on localhost: rank 1 did not end within 30 s of the end of the run" in run.output


def test_a_reader_that_goes_away_changes_no_exit_code(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "danaz", "launch", "--hosts", "localhost:1", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        [*launch, "--", sys.executable, *write(tmp_path)],
        cwd=live.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(live.DEADLINE_S) == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["complete"]
