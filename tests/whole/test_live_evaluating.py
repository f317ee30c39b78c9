"""Live runs whose script looks at its model, writes its own checkpoint, or raises an error in mid-run."""

from __future__ import annotations

from pathlib import Path

import live
import pytest
import torch

SCRIPT = """\
import sys, torch, danaz.torch as danaz
out, manner = sys.argv[1:]
danaz.init()
torch.manual_seed(danaz.rank())
model = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 1))
optimizer = danaz.DistributedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), model)
data = torch.utils.data.TensorDataset(torch.randn(64, 2), torch.randn(64, 1))
loader = torch.utils.data.DataLoader(data, batch_size=8)
steps = 0
for epoch in danaz.epochs(4):
    for x, y in danaz.shard(loader, epoch):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        steps += 1
        if manner == "error" and steps == 3 and danaz.rank() == danaz.size() - 1:
            raise ValueError("the last rank has seen enough")
    ranks = danaz.allreduce(1, "sum")
    assert [len(each) for each in danaz.allgather(torch.ones(danaz.rank()))] == list(range(ranks))
    own = danaz.allgather(model[1].running_mean)
    if danaz.is_main():
        with danaz.evaluating(model, at="server"):
            assert torch.allclose(model[1].running_mean, sum(own) / ranks)
            loss = torch.nn.functional.mse_loss(model(data.tensors[0]), data.tensors[1])
        danaz.save(out, loss=float(loss), ranks=ranks)
    assert torch.equal(model[1].running_mean, own[danaz.rank()])
    assert danaz.broadcast(epoch if danaz.rank() == 0 else None) == epoch
danaz.barrier()
"""


def launch(tmp_path: Path, *arguments: str, manner: str = "well", succeeds: bool = True) -> live.Run:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    words = [str(script), str(tmp_path / "saved.pt"), manner]
    return live.launch(*arguments, out=tmp_path / "run", script=words, succeeds=succeeds)


@pytest.mark.parametrize(
    "options",
    [
        ["--algorithm", "dana", "--server-shards", "2", "--pipeline"],
        pytest.param(["--algorithm", "ssgd", "--collective", "torch"], marks=pytest.mark.slow),
        pytest.param(["--algorithm", "easgd", "--sync-period", "2"], marks=pytest.mark.slow),
    ],
)
def test_the_main_process_evaluates_and_saves_in_mid_run(options: list[str], tmp_path: Path) -> None:
    run = launch(tmp_path, "--hosts", "localhost:4", "--workers-per-host", "2", *options)
    assert run.summary["complete"]
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    assert saved["extra"]["ranks"] == (4 if "ssgd" in options else 2)
    assert saved["danaz"]["algorithm"] == options[1]
    assert saved["danaz"]["has_optimizer_state"]
    model = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 1))
    model.load_state_dict(saved["model"])
    torch.optim.AdamW(model.parameters()).load_state_dict(saved["optimizer"])


@pytest.mark.parametrize(
    "options",
    [
        ["--algorithm", "ssgd", "--hosts", "localhost:2"],
        pytest.param(
            ["--algorithm", "dana", "--hosts", "localhost:4", "--workers-per-host", "2"], marks=pytest.mark.slow
        ),
    ],
)
def test_the_error_of_the_script_is_the_last_that_is_shown(options: list[str], tmp_path: Path) -> None:
    run = launch(tmp_path, *options, manner="error", succeeds=False)
    *_, traceback = run.output.partition("the last lines of rank ")
    assert traceback.startswith(("1 (worker 0) on localhost:\n", "3 (worker 1) on localhost:\n"))
    assert "raise ValueError" in traceback
    assert run.output.endswith("  | ValueError: the last rank has seen enough\n")
