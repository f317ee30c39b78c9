"""Real runs with Adam: workers of two Horovod ranks each, under a server and under all-reduce."""

from __future__ import annotations

from pathlib import Path

import live
import pytest
from shipped import CONFIGS

from danaz.serving.serve import replay_run

pytestmark = pytest.mark.timeout(300)
ADAMW = (
    str(CONFIGS / "digits-adam.yaml"),
    *("--set", "optimizer=adamw", "--set", "weight_decay=0.01", "--set", "epochs=3"),
    *("--set", "optimizer_options.betas=[0.9, 0.99]", "--collective", "horovod"),
    *("--hosts", "localhost:4", "--workers-per-host", "2"),
)


@pytest.mark.parametrize("algorithm", ["dana", pytest.param("dana-zero", marks=pytest.mark.slow)])
def test_two_workers_of_two_ranks_learn_under_a_server(algorithm: str, tmp_path: Path) -> None:
    run = live.launch(*ADAMW, "--algorithm", algorithm, "--record", out=tmp_path / "run")
    assert (run.summary["complete"], run.summary["workers"], run.summary["updates"]) == (True, 2, 135)
    assert sorted(update["batch"] for update in run.updates) == list(range(135))
    assert run.summary["test_error_percent"] < 20, "an untrained model errs on 90 %"
    assert replay_run(run.folder) == (135, True)


@pytest.mark.slow
def test_ssgd_takes_the_root_of_the_number_of_workers(tmp_path: Path) -> None:
    run = live.launch(*ADAMW, "--algorithm", "ssgd", out=tmp_path / "run")
    assert run.summary["complete"]
    assert run.summary["test_error_percent"] < 20
    [lr] = {update["lr"] for update in run.updates}
    assert lr == pytest.approx(1e-3 * 2**0.5)
