"""Two real runs that are short enough for `make test`: Horovod ranks on this machine, and workers on two machines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import live
import pytest
from namespaces import Namespaces
from shipped import CONFIGS
from waiting import ended

from danaz.run.folder import read_summary
from danaz.serving.serve import replay_run

DIGITS = (str(CONFIGS / "digits.yaml"), "--algorithm", "dana", "--collective", "horovod", "--record")
EPOCHS, BATCHES = 2, 90
SHORT = ("--set", f"epochs={EPOCHS}", "--set", "lr_schedule.milestones=[]", "--set", "lr_schedule.warmup_epochs=0")

pytestmark = pytest.mark.timeout(300)


def check(folder: Path, workers: int, ranks_per_worker: int) -> dict[str, Any]:
    """Check that each batch was used once, the model learned, and the recording replays to the same bits."""
    summary, updates = read_summary(folder), live.read_updates(folder)
    assert (summary["workers"], summary["ranks_per_worker"]) == (workers, ranks_per_worker)
    assert (summary["collective"], summary["complete"]) == ("horovod", True)
    assert [update["version"] for update in updates] == list(range(1, BATCHES + 1))
    assert sorted(update["batch"] for update in updates) == list(range(BATCHES))
    assert {update["worker"] for update in updates} == set(range(workers))
    assert summary["test_error_percent"] < 50, "an untrained model errs on 90 %"
    assert replay_run(folder) == (BATCHES, True)
    return summary


@pytest.mark.slow  # test_live_optimizers.py has a shorter run of two such workers
def test_a_worker_of_two_horovod_ranks(tmp_path: Path) -> None:
    run = live.launch(*DIGITS, *SHORT, "--hosts", "localhost:2", "--workers-per-host", "1", out=tmp_path / "run")
    check(run.folder, workers=1, ranks_per_worker=2)


@pytest.mark.cluster
def test_a_worker_on_each_of_two_machines(network: Namespaces, tmp_path: Path) -> None:
    """They are reached by ssh. The server is on the launching machine, and Horovod is inside each worker."""
    folder = tmp_path / "run"
    arguments = (*DIGITS, *SHORT, "--hosts", "a:2,b:2", "--out", str(folder))
    process = network.danaz("launch", *arguments, env={**os.environ, "OMP_NUM_THREADS": "1"})
    output = ended(process)
    assert process.returncode == 0, output
    check(folder, workers=2, ranks_per_worker=2)
    assert {path.parent.name for path in folder.glob("logs/*/rank.*")} == {"a", "b"}
    assert network.is_idle()
