"""Real runs with Adam: workers of two Horovod ranks each, under a server and under all-reduce."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import live
import pytest
import torch
from shipped import CONFIGS
from torch import nn

from danaz.serving.serve import replay_run

Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
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


ADADELTA = "torch.optim.Adadelta(model.parameters(), lr=1.0)"  # danaz does not know this class
SSGD = ("--hosts", "localhost:4", "--workers-per-host", "2", "--algorithm", "ssgd", "--lr-scaling", "none")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "make"),
    [
        (ADADELTA, lambda parameters: torch.optim.Adadelta(parameters, lr=1.0)),
        (
            "torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)",
            lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
        ),
    ],
    ids=["own", "adamw"],
)
def test_the_replicas_of_ssgd_equal_one_process(optimizer: str, make: Make, tmp_path: Path) -> None:
    """Two workers of two ranks have batches of 2·8; the last has 2 samples for 4 ranks."""
    _, states = live.launch_fifty_samples(tmp_path, optimizer, *SSGD, "--warmup-epochs", "0")
    assert len(states) == 4
    for state in states:
        for name, p in live.fifty_samples_in_one_process(make).model.named_parameters():
            assert torch.equal(state[name], states[0][name])
            torch.testing.assert_close(state[name], p.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_class_that_danaz_does_not_know_makes_local_steps(tmp_path: Path) -> None:
    run, states = live.launch_fifty_samples(
        tmp_path,
        ADADELTA,
        *("--hosts", "localhost:4", "--workers-per-host", "2", "--algorithm", "easgd", "--sync-period", "2"),
    )
    assert run.summary["complete"]
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).state_dict()
    assert len(states) == 4
    for name, values in first.items():
        assert all(torch.equal(state[name], states[0][name]) for state in states), "all ranks end with the centre"
        assert states[0][name].isfinite().all()
        assert not torch.equal(states[0][name], values), "which has moved"


@pytest.mark.slow
def test_ssgd_takes_the_root_of_the_number_of_workers(tmp_path: Path) -> None:
    run = live.launch(*ADAMW, "--algorithm", "ssgd", out=tmp_path / "run")
    assert run.summary["complete"]
    assert run.summary["test_error_percent"] < 20
    [lr] = {update["lr"] for update in run.updates}
    assert lr == pytest.approx(1e-3 * 2**0.5)
