"""What users touch: the functions of danaz.torch in a lone process, and the words of the danaz command."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

import danaz.torch as danaz
from danaz.cli.main import main
from danaz.launch.begin import prepare
from danaz.launch.options import LaunchOptions
from danaz.run.config import load_config
from danaz.server.core import ServerCore
from danaz.torch.session import NotInitializedError

ROOT = Path(__file__).parents[2]
QUADRATIC = str(ROOT / "configs/quadratic.yaml")
DIGITS = str(ROOT / "configs/digits.yaml")

# ---- danaz.torch ----------------------------------------------------------------------------------------------------


def loader(samples: int = 12) -> DataLoader[tuple[torch.Tensor, ...]]:
    x = torch.linspace(-1, 1, samples).unsqueeze(1)
    return DataLoader(TensorDataset(x, 2 * x + 1), batch_size=4, shuffle=True)


def make_sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)


def test_all_names_what_there_is() -> None:
    own = {name for name, value in vars(danaz).items() if inspect.isfunction(value) and not name.startswith("_")}
    assert set(danaz.__all__) == own - {"replace", "from_environment"} | {
        "NotInitializedError",
        "LoopError",
        "DifferentCallsError",
        "EvaluationError",
        "Saved",
        "SavedFileError",
    }
    assert danaz.__all__ == sorted(danaz.__all__)
    assert all(inspect.getdoc(getattr(danaz, name)) for name in danaz.__all__)


@pytest.mark.parametrize(
    "call",
    [
        danaz.rank,
        danaz.size,
        danaz.worker_id,
        danaz.num_workers,
        danaz.metrics,
        danaz.progress,
        danaz.finish,
        lambda: danaz.report(accuracy=1.0),
        lambda: next(danaz.epochs(1)),
        lambda: next(danaz.shard(loader(), 0)),
        lambda: danaz.DistributedOptimizer(make_sgd(model := nn.Linear(1, 1)), model),
    ],
)
def test_without_init(alone: None, call: Callable[[], object]) -> None:
    with pytest.raises(NotInitializedError, match=r"call danaz\.init\(\) first"):
        call()


def wrap() -> danaz.DistributedOptimizer:
    model = nn.Linear(1, 1)
    return danaz.DistributedOptimizer(make_sgd(model), model)


def step_without_shard() -> None:
    optimizer = wrap()
    optimizer.step()


@pytest.mark.parametrize(
    ("mistake", "error", "words"),
    [
        (
            step_without_shard,
            RuntimeError,
            r"was called outside of danaz\.shard.* write `for epoch in danaz\.epochs\(N\):`",
        ),
        (lambda: next(danaz.shard(range(3), 0)), TypeError, r"takes a torch\.utils\.data\.DataLoader, not range"),
        (lambda: next(danaz.shard(loader(), 0, range(3))), TypeError, "DataLoader, not range"),
        (
            lambda: danaz.DistributedOptimizer(nn.Linear(1, 1), make_sgd(nn.Linear(1, 1))),
            TypeError,
            "the optimizer first",
        ),
        (lambda: danaz.DistributedOptimizer(wrap(), nn.Linear(1, 1)), TypeError, "wrapped before"),
    ],
)
def test_the_commonest_mistakes_are_explained(
    alone: None, mistake: Callable[[], object], error: type[Exception], words: str
) -> None:
    danaz.init()
    with pytest.raises(error, match=words):
        mistake()


def test_a_script_alone(alone: None, servers: list[ServerCore]) -> None:
    danaz.init()
    danaz.init()  # a second call changes nothing
    assert (danaz.rank(), danaz.size(), danaz.worker_id(), danaz.num_workers()) == (0, 1, 0, 1)
    model = nn.Linear(1, 1).to(danaz.device())
    optimizer = danaz.DistributedOptimizer(make_sgd(model), model)
    with pytest.raises(NotInitializedError, match="it begins with the first batch"):
        danaz.metrics()
    seen = []
    for epoch in danaz.epochs(8):
        for x, y in danaz.shard(loader(), epoch):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step(loss=loss)
            seen.append((epoch, danaz.metrics().version, danaz.progress()))
        with pytest.raises(NotInitializedError, match="comes after the loop"):
            danaz.report(accuracy=1.0)
    assert seen == [(step // 3, step + 1, (step + 1) / 3) for step in range(24)]
    assert loss < 0.1
    danaz.finish()  # epochs() has done it already
    danaz.report(test_error_percent=12.5, remark="fine")
    [server] = servers
    summary = server.summary()
    assert summary["reported"]["test_error_percent"] == 12.5
    assert summary["reported"]["remark"] == "fine"
    assert summary["updates"] == 24
    assert summary["final_train_loss"] == pytest.approx(loss.item())
    assert danaz.metrics().gap is None, "there is no run folder to record it in, so it is not measured"


def test_a_schedule_that_moves_with_every_step(alone: None) -> None:
    danaz.init()
    model = nn.Linear(1, 1)
    optimizer = danaz.DistributedOptimizer(make_sgd(model), model)
    scheduler = LambdaLR(optimizer, lambda _: 1 - danaz.progress() / 2)
    rates = []
    for epoch in danaz.epochs(2):
        for x, y in danaz.shard(loader(), epoch):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
            scheduler.step()
    assert rates == pytest.approx([0.1 * (1 - step / 6) for step in range(6)])


def test_leaving_the_loop_over_epochs_and_finishing_by_hand(alone: None, servers: list[ServerCore]) -> None:
    danaz.init()
    model = nn.Linear(1, 1)
    optimizer = danaz.DistributedOptimizer(make_sgd(model), model)
    for epoch in danaz.epochs(100):
        for x, y in danaz.shard(loader(), epoch):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        if epoch == 2:
            break
    danaz.finish()
    danaz.report(epochs_used=epoch + 1)
    [server] = servers
    assert torch.equal(torch.cat([model.weight.detach().flatten(), model.bias.detach()]), server.master.params)


@pytest.mark.slow
def test_the_example_runs_with_plain_python(tmp_path: Path) -> None:
    script = ROOT / "examples/train_digits.py"
    assert len(script.read_text().splitlines()) < 60
    saved = tmp_path / "digits.pt"
    done = subprocess.run(
        [sys.executable, str(script), "--epochs", "4", "--save", str(saved)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    match = re.search(r"test accuracy ([\d.]+)%", done.stdout)
    assert match is not None
    assert float(match[1]) > 95
    assert saved.exists()
    assert sorted(tmp_path.iterdir()) == [saved], "a process alone writes no run folder"


# ---- the danaz command ----------------------------------------------------------------------------------------------


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str]]:
    """Run ``danaz`` with these words in an empty folder; return its exit code, and all its output on one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["danaz", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return code, " ".join((said.out + said.err).split())

    return run


SCRIPT = ["--", "python", "train.py"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["launch", QUADRATIC, *SCRIPT], "give either a CONFIG or, after --, a command"),
        (["launch"], "give either a CONFIG or, after --, a command"),
        (["launch", "--set", "lr=1", *SCRIPT], "--set changes a config, and a script has none"),
        (["launch", QUADRATIC, "--seed", "1"], "use --set lr_schedule.warmup_epochs=… and --set seed=…"),
        (["launch", QUADRATIC, "--algorithm", "dama"], "unknown algorithm 'dama'. Did you mean 'dana'?"),
        (["launch", "--algorithm", "dama", *SCRIPT], "unknown algorithm 'dama'. Did you mean 'dana'?"),
        (["simulate", QUADRATIC, "--algorithm", "dama"], "unknown algorithm 'dama'. Did you mean 'dana'?"),
        (["launch", QUADRATIC, "--set", "lrr=1"], "unknown key 'lrr' (= 1); did you mean 'lr'?"),
        (["launch", QUADRATIC, "--set", "lr"], "expected key=value"),
        (["launch", QUADRATIC, "--set", "momentum=2"], "momentum = 2"),
        (["launch", "nowhere.yaml"], "nowhere.yaml: no such config file"),
        (
            ["launch", QUADRATIC, "-a", "baseline", "-H", "localhost:2", "--workers-per-host", "2"],
            "baseline trains on 1 worker, 2 were asked for",
        ),
        (["simulate", QUADRATIC, "-a", "baseline", "-n", "2"], "baseline trains on 1 worker, 2 were asked for"),
        (["launch", QUADRATIC, "--hosts", "localhost:0"], "zero slots"),
        (["launch", QUADRATIC, "--collective", "mpi"], "unknown collective 'mpi': give auto, horovod or torch"),
        (["replay", "nowhere"], "nowhere"),
        (
            ["launch", "-a", "async-diloco", "--hyperparameter", "outer=adam", *SCRIPT],
            "async-diloco: outer = 'adam', expected one of asgd, nag-asgd, delayed-nesterov, dana",
        ),
        (
            ["simulate", QUADRATIC, "-a", "diloco", "--hyperparameter", "outer_lr"],
            "--hyperparameter outer_lr: expected key=value, for example --hyperparameter outer=dana",
        ),
        (["simulate", QUADRATIC, "--hyperparameter", "a=[1]"], "--hyperparameter a=[1]: the value should be a number"),
    ],
)
def test_what_cannot_be_done_is_said_and_leaves_nothing(
    command: Callable[..., tuple[int, str]], words: list[str], complaint: str, tmp_path: Path
) -> None:
    code, said = command(*words)
    assert complaint in said
    assert code == 2
    assert "Traceback" not in said
    assert list(tmp_path.rglob("*.y*ml")) == [], "a run folder was begun"


def test_a_host_too_small_for_its_workers(command: Callable[..., tuple[int, str]]) -> None:
    code, said = command("launch", QUADRATIC, "--hosts", "localhost:2", "--workers-per-host", "3")
    assert code == 2
    assert "localhost has 2 slots, too few for 3 workers" in said


@pytest.mark.parametrize("name", ["updates.jsonl", "summary.json"])
def test_a_folder_that_holds_a_run_is_not_written_over(
    command: Callable[..., tuple[int, str]], name: str, tmp_path: Path
) -> None:
    out = tmp_path / "old"
    out.mkdir()
    (out / name).write_text("")
    for words in (["launch", QUADRATIC], ["simulate", QUADRATIC], ["launch", "--out", str(out), *SCRIPT]):
        extra = [] if "--out" in words else ["--out", str(out)]
        code, said = command(*words, *extra)
        assert code == 2
        assert "already holds a run" in said
    assert [path.name for path in out.iterdir()] == [name]


def test_a_dry_run_names_every_process_and_starts_none(command: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a process was started"))
        words = ["launch", DIGITS, "-H", "localhost:4", "--workers-per-host", "2", "--dry-run", "--out", out]
        code, said = command(*words)
    assert code == 0
    assert "danaz serve" in said
    assert said.count("HOROVOD_RANK=") == 4
    assert "DANAZ_WORKER=1" in said
    assert not (tmp_path / "run/updates.jsonl").exists()


def test_a_hyperparameter_may_be_given_to_a_script_and_to_a_config(
    command: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    chosen = ["outer=dana", "outer_lr=1e-1"]
    for config, script in ((None, ["python", "train.py"]), (Path(QUADRATIC), [])):
        asked = LaunchOptions(collective="torch", config=config, algorithm="async-diloco", hyperparameter=chosen)
        launch, _ = prepare(asked, [], script)
        assert launch.settings["hyperparameters"] == {"outer": "dana", "outer_lr": 0.1}
    out = tmp_path / "run"
    sets = ("--set", "epochs=1", "--set", "hyperparameters.outer_momentum=0.5", "--out", str(out))
    flags = [word for each in chosen for word in ("--hyperparameter", each)]
    assert command("simulate", QUADRATIC, "-n", "2", "-a", "async-diloco", *flags, *sets)[0] == 0
    assert load_config(out / "config.yaml").hyperparameters == {"outer": "dana", "outer_lr": 0.1, "outer_momentum": 0.5}


@pytest.mark.parametrize("name", ["launch", "simulate", "compare", "replay", "horovod install", "horovod check"])
def test_help_shows_examples(command: Callable[..., tuple[int, str]], name: str) -> None:
    code, said = command(*name.split(), "--help")
    assert code == 0
    assert re.search(rf"Examples?\b.* danaz {name}", said)


def test_help_names_all_commands(command: Callable[..., tuple[int, str]]) -> None:
    code, said = command("--help")
    assert code == 0
    for name in ("launch", "simulate", "compare", "horovod", "serve", "work", "replay"):
        assert f" {name} " in said


def test_algorithms_are_listed(command: Callable[..., tuple[int, str]]) -> None:
    code, said = command("algorithms")
    assert code == 0
    for name in ("baseline", "asgd", "nag-asgd", "multi-asgd", "dana-zero", "dana", "ssgd"):
        assert f" {name} " in f" {said} "
    assert "outer delayed-nesterov (or asgd, nag-asgd, dana)" in said
    assert re.search(r"async-diloco +asgd +0 .* nag-asgd +1 .* delayed-nesterov +2 .* dana +N ", said)
