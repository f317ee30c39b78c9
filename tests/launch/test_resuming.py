"""How a run is resumed from its folder, and which options may change."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from danaz.cli.main import app
from danaz.launch.begin import prepare, prepared
from danaz.launch.options import LaunchOptions
from danaz.launch.prepare import Launch, execute, write_folder
from danaz.launch.resume import ResumeError, check_checkpoints
from danaz.server.snapshot import Snapshot
from danaz.serving.checkpoint import write_checkpoint
from launcher.run import Outcome

CONFIG = str(Path(__file__).parents[2] / "configs" / "quadratic.yaml")
SECRET = "a value that is nobody's business"


def launch(*arguments: str, command: list[str] | None = None) -> Result:
    return CliRunner().invoke(app, ["launch", *arguments], obj=command or [])


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """Return the folder of a run that began and was killed."""
    options = {"hosts": "localhost:2", "workers_per_host": 2, "variables": [f"TOKEN={SECRET}"], "server_port": 4711}
    return begin(tmp_path / "run", config=Path(CONFIG), **options)


def begin(run: Path, command: Sequence[str] = (), **options: Any) -> Path:
    with prepared(LaunchOptions(**options, out=run), [], command) as (ready, _):
        write_folder(ready)
    return run


def resume(run: Path, **options: Any) -> Launch:
    named = ["resume", "variables", *options]
    ready, _ = prepare(LaunchOptions(resume=run, variables=["TOKEN=again"], **options), named, [])
    return ready


def test_the_same_run_on_the_same_machines(begun: Path) -> None:
    ready = resume(begun)
    assert (ready.run, ready.plan.workers, len(ready.plan.ranks)) == (begun, 2, 2)
    [server] = ready.plan.services
    assert server.argv[3:] == ("serve", "--bind", "tcp://127.0.0.1:4711", "--resume")
    assert ready.plan.env["TOKEN"] == "again"
    assert ready.plan.env["DANAZ_RUN"] == str(begun)
    first = begin(begun.parent / "other", config=Path(CONFIG))
    assert resume(first).plan.run_id != ready.plan.run_id == resume(begun).plan.run_id


def test_the_same_run_elsewhere(begun: Path) -> None:
    """The number of machines changes; the configuration under which the checkpoint was made stays."""
    ready = resume(begun, hosts="localhost:6", workers_per_host=4)
    assert (ready.plan.workers, len(ready.plan.ranks)) == (4, 6)
    assert json.loads(ready.plan.env["DANAZ_CONFIG"])["workers"] == 2
    assert json.loads(ready.plan.env["DANAZ_SETTINGS"])["workers"] == 2
    write_folder(ready)
    assert resume(begun).plan.workers == 4, "the next resume knows where it ran last"


def test_no_secret_is_kept(begun: Path) -> None:
    kept = [path for path in begun.rglob("*") if path.is_file() and SECRET in path.read_text()]
    assert kept == []
    said = launch("--resume", str(begun), "--dry-run")
    assert said.exit_code == 2
    assert "variables whose values are not kept; give them again: -x TOKEN" in " ".join(said.output.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "lr=1"], "--set"),
        (["--algorithm", "asgd"], "--algorithm"),
        (["--seed", "1"], "--seed"),
        (["--out", "elsewhere"], "--out"),
        ([CONFIG], "the CONFIG"),
    ],
)
def test_what_it_trains_cannot_be_changed(begun: Path, arguments: list[str], words: str) -> None:
    said = launch("--resume", str(begun), *arguments)
    assert said.exit_code == 2
    assert f"goes on with what the run began; leave out {words}" in " ".join(said.output.split())


def test_with_as_many_shards_as_it_began(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", config=Path(CONFIG), server_shards=2)
    services = resume(run, server_shards=2).plan.services
    assert [service.argv[-1] for service in services] == ["--resume"] * 2
    said = launch("--resume", str(run), "--server-shards", "3")
    assert said.exit_code == 2
    assert "hold 2 slices, which cannot be cut again" in " ".join(said.output.split())


def test_a_complete_run_keeps_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even those of a shard that was stopped before it heard of the end."""

    def play(complete: bool) -> list[str]:
        def run(plan: object, folder: Path, **options: object) -> Outcome:
            write_checkpoint(folder / "checkpoints.1", 3, Snapshot({}, {}))
            (folder / "summary.json").write_text(json.dumps({"complete": complete}))
            return Outcome(0)

        monkeypatch.setattr("danaz.launch.prepare.run", run)
        options = {"config": Path(CONFIG), "server_shards": 2, "out": tmp_path / f"run-{complete}"}
        with prepared(LaunchOptions(**options), [], []) as (ready, _):
            execute(ready)
        return [path.name for path in ready.run.glob("checkpoints*")]

    assert play(complete=False) == ["checkpoints.1"]
    assert play(complete=True) == []


def test_a_script_keeps_its_command(tmp_path: Path) -> None:
    run = tmp_path / "run"
    begin(run, ["python", "train.py", "--my", "x y"], hosts="localhost:1")
    said = launch("--resume", str(run), "--dry-run")
    assert said.exit_code == 0, said.output
    assert "[localhost:0] python train.py --my 'x y'" in said.output
    kept = yaml.safe_load((run / "config.yaml").read_text())
    assert (kept["command"], kept["algorithm"]) == (["python", "train.py", "--my", "x y"], "dana")
    assert launch("--resume", str(run), command=["python", "other.py"]).exit_code == 2


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    said = launch("--resume", str(tmp_path))
    assert said.exit_code == 2
    assert "there is no run of `danaz launch`" in " ".join(said.output.split())


def test_a_complete_run(begun: Path) -> None:
    (begun / "summary.json").write_text('{"complete": true}')
    said = launch("--resume", str(begun), "-x", "TOKEN=again")
    assert said.exit_code == 2
    assert "this run is complete" in said.output


@pytest.mark.parametrize(
    ("earlier", "now", "here", "has_them", "message"),
    [
        (None, None, True, True, None),
        (None, None, True, False, None),  # the server died before its first checkpoint: training begins afresh
        ("b", "b", False, False, None),
        ("b", "localhost", True, True, None),
        ("b", "b", False, True, "are on this machine; let its server run here: --server-host localhost"),
        (None, "b", False, True, "are on this machine"),
        ("b", "c", False, False, "ran on b, and its checkpoints are there; leave it there: --server-host b"),
        ("b", None, True, False, "ran on b, and its checkpoints are there"),
    ],
)
def test_the_server_must_find_its_checkpoints(
    tmp_path: Path, earlier: str | None, now: str | None, here: bool, has_them: bool, message: str | None
) -> None:
    if has_them:
        (tmp_path / "checkpoints").mkdir()
    check(tmp_path, earlier, now, [] if here else [0], message)


@pytest.mark.parametrize(
    ("earlier", "now", "elsewhere", "found", "message"),
    [
        ("a,b", "a,b", [0, 1], [], None),
        ("localhost,b", "localhost,b", [1], ["checkpoints"], None),
        ("localhost,b", "localhost,b", [1], ["checkpoints", "checkpoints.1"], "are on this machine"),
        ("a,b", "localhost", [], ["checkpoints", "checkpoints.1"], None),
        ("a,b", "localhost", [], [], "ran on a,b, and its checkpoints are there; leave it there: --server-host a,b"),
        ("a,b", "b,a", [0, 1], [], "ran on a,b"),
    ],
)
def test_its_shards_must_find_theirs(
    tmp_path: Path, earlier: str, now: str, elsewhere: list[int], found: list[str], message: str | None
) -> None:
    for name in found:
        (tmp_path / name).mkdir()
    check(tmp_path, earlier, now, elsewhere, message)


def check(run: Path, earlier: str | None, now: str | None, elsewhere: list[int], message: str | None) -> None:
    if message is None:
        check_checkpoints(run, earlier, now, elsewhere)
    else:
        with pytest.raises(ResumeError, match=message):
            check_checkpoints(run, earlier, now, elsewhere)
