"""Loops as people write them, run by danaz: each gives the same result as torch alone, on any number of ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import any_loop
import pytest
import torch
from any_loop import (
    COMMUTING,
    CURVED,
    CURVED_ADAMW,
    EDITS,
    FLAT,
    LOOPS,
    Loop,
    Problem,
    difference,
    train_with_danaz,
    train_with_torch,
)

from danaz.run.settings import RankInfo, Settings
from danaz.torch.session import Session

TOLERANCE = 1e-5
ROOT = Path(__file__).parents[2]
DEADLINE_S = 400.0

# Each rank of each worker runs every loop, one after the other, in one world that the launcher made.
SCRIPT = """
import sys
from any_loop import run_all
run_all(sys.argv[1], int(sys.argv[2]))
"""

LAUNCHER = """
import os, sys
from launcher.hosts import parse_hosts
from launcher.logs import quiet
from launcher.plan import Workers, plan
from launcher.run import run

out, mode, workers, ranks, script = sys.argv[1:]
laid = plan(
    parse_hosts(f"localhost:{int(workers) * int(ranks)}"),
    Workers([sys.executable, "-c", script, out, workers], 1 if mode == "ssgd" else int(workers), mode == "ssgd"),
    env={**os.environ, "MODE": mode}, cwd=out, prefix="DANAZ_",
)
outcome = run(laid, out, echo=quiet)
print(outcome.failure or "")
sys.exit(outcome.exit_code)
"""


def run_everywhere(out: Path, mode: str, workers: int, ranks: int, collective: str) -> None:
    """Run all loops on ``workers`` of ``ranks`` each, with real processes and, if the rule has one, a real server."""
    path = os.pathsep.join([str(ROOT / "tests/support"), str(ROOT)])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "COLLECTIVE": collective}
    arguments = [str(out), mode, str(workers), str(ranks), SCRIPT]
    ended = subprocess.run(
        [sys.executable, "-c", LAUNCHER, *arguments], env=env, timeout=DEADLINE_S, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def check(loop: Loop, problem: Problem, out: Path, ranks: int) -> None:
    """Assert that all ranks have the same model, and that it is torch's."""
    theirs = train_with_torch(loop, problem)
    for rank in range(ranks):
        result = torch.load(out / f"{loop.__name__}.{rank}")
        ours = problem.model()
        ours.load_state_dict(result["model"])
        assert difference(ours, theirs.model) < TOLERANCE, f"{loop.__name__} on rank {rank}"
        if problem is CURVED:
            assert result["seen"] == pytest.approx(theirs.seen, rel=1e-3, abs=1e-5), f"{loop.__name__} on rank {rank}"
        first = torch.load(out / f"{loop.__name__}.0")["model"]
        assert all(torch.equal(tensor, first[name]) for name, tensor in result["model"].items())


@pytest.mark.parametrize(
    ("algorithm", "problem"),
    [
        *(pytest.param(name, CURVED, id=name) for name in ("baseline", "dana", "dana-zero", "nag-asgd", "ssgd")),
        pytest.param("ssgd", CURVED_ADAMW, id="ssgd-adamw"),  # the others look ahead along the momentum of Adam
    ],
)
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_one_rank_equals_torch(loop: Loop, algorithm: str, problem: Problem) -> None:
    session = Session(Settings(algorithm=algorithm), RankInfo())
    ours, theirs = train_with_danaz(loop, problem, session), train_with_torch(loop, problem)
    assert difference(ours.model, theirs.model) < TOLERANCE
    assert ours.seen == pytest.approx(theirs.seen, rel=1e-3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(DEADLINE_S)
@pytest.mark.parametrize("collective", ["horovod", "torch"])
@pytest.mark.parametrize(
    ("mode", "workers", "ranks", "loops", "problem"),
    [
        pytest.param("ssgd", 1, 3, LOOPS, CURVED, id="three ranks of an all-reduce world"),
        pytest.param("dana", 1, 2, LOOPS, CURVED, id="one worker of two ranks and a server"),
        pytest.param("dana", 2, 2, COMMUTING, FLAT, id="two workers of two ranks, whose updates commute"),
    ],
)
def test_several_ranks_equal_torch(
    collective: str, mode: str, workers: int, ranks: int, loops: list[Loop], problem: Problem, tmp_path: Path
) -> None:
    run_everywhere(tmp_path, mode, workers, ranks, collective)
    for loop in loops:
        check(loop, problem, tmp_path, workers * ranks)


@pytest.mark.slow
@pytest.mark.timeout(DEADLINE_S)
def test_gradients_that_cannot_carry_an_edit_refuse_it(tmp_path: Path) -> None:
    """If workers push gradients, an edit raises an error that names the cure, and is not lost silently."""
    run_everywhere(tmp_path, "dana-zero", 1, 1, "torch")
    for loop in LOOPS:
        if loop in EDITS and loop is not any_loop.edit_at_the_end:  # a worker that leaves can still carry an edit
            error = torch.load(tmp_path / f"{loop.__name__}.0")["error"]
            assert "parameters were changed outside of optimizer.step()" in error
        else:
            check(loop, CURVED, tmp_path, 1)
