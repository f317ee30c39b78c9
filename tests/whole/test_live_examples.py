"""The scripts of examples/ under the launcher: asynchronous and synchronous, on two workers of two ranks each."""

from __future__ import annotations

from pathlib import Path

import live
import pytest

from examples import EXAMPLES, Example

LAUNCHED = [each for each in EXAMPLES if each.script != "train_digits.py"]  # test_live.py launches that one
pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]


@pytest.mark.parametrize("algorithm", ["dana", "ssgd"])
@pytest.mark.parametrize("example", LAUNCHED, ids=lambda example: example.script)
def test_it_learns_on_two_workers_of_two_ranks(example: Example, algorithm: str, tmp_path: Path) -> None:
    saves = ["--save", str(tmp_path / "model.pt")] if "--save" in example.path.read_text() else []
    run = live.launch(
        *("--hosts", "localhost:4", "--workers-per-host", "2", "--algorithm", algorithm, "--collective", "horovod"),
        out=tmp_path / "run",
        script=[str(example.path), *example.arguments, *saves],
    )
    assert run.summary["complete"]
    assert (run.summary["workers"], run.summary["ranks_per_worker"]) == (2, 2)
    example.check(run.summary["reported"])
    assert "warning" not in run.output.lower()
    if example.script == "train_gpt.py":
        rates = [max(update["lr"]) for update in run.updates]  # of both parameter groups
        assert min(rates[-5:]) < max(rates) / 5, "the schedule follows the cluster to its end"
