"""A run folder belongs to one run, which claims it first and holds its lock to the end."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import live
import pytest
import yaml
from typer.testing import CliRunner

from danaz.cli.main import app
from danaz.launch.begin import prepared
from danaz.launch.options import LaunchOptions
from danaz.launch.prepare import write_folder
from danaz.run import lock as run_lock
from danaz.run.lock import (
    RunFolderError,
    RunLockedError,
    check_server_begins,
    claimed_run_folder,
    free_run_folder,
    lock_server,
    locked_run_folder,
)

CONFIG = live.ROOT / "configs" / "quadratic.yaml"
LEFT_BY_RUNS = ["config.yaml", "launch.yaml", "updates.jsonl", "summary.json", "parameters.safetensors", "logs"]
LEFT_BY_RUNS += ["checkpoints", "checkpoints.2", "recording.bin", "recording.until-restart.bin", "invitations"]
LEFT_BY_RUNS += ["comparison.yaml", "cells", "curves.json"]
HOLD = """
import sys
from pathlib import Path
from danaz.run.lock import claimed_run_folder
with claimed_run_folder(Path(sys.argv[1]), ""):
    print(flush=True)
    sys.stdin.read()
"""


class TestClaim:
    @pytest.mark.parametrize("name", LEFT_BY_RUNS)
    def test_a_folder_with_anything_of_a_run_is_refused(self, name: str, tmp_path: Path) -> None:
        (tmp_path / name).mkdir()
        for use in (lambda: claimed_run_folder(tmp_path, "x").__enter__(), lambda: free_run_folder(tmp_path, "x")):
            with pytest.raises(RunFolderError, match=f"already holds a run .{name}."):
                use()

    def test_a_folder_with_other_things_will_do(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").touch()
        with claimed_run_folder(tmp_path, "x") as run:
            assert run == tmp_path
        assert (tmp_path / "thesis.tex").exists()

    def test_a_new_folder_is_closed_to_others_and_an_old_one_keeps_its_mode(self, tmp_path: Path) -> None:
        (old := tmp_path / "old").mkdir(0o755)
        for folder, mode in ((tmp_path / "new" / "run", 0o700), (old, 0o755)):
            with claimed_run_folder(folder, "x"):
                (folder / "config.yaml").touch()
            assert stat.S_IMODE(folder.stat().st_mode) == mode

    def test_a_new_folder_that_stays_empty_is_removed(self, tmp_path: Path) -> None:
        (old := tmp_path / "old").mkdir()
        for folder in (tmp_path / "new", old):
            with pytest.raises(ZeroDivisionError), claimed_run_folder(folder, "x"):
                raise ZeroDivisionError
        assert not (tmp_path / "new").exists()
        assert old.exists()

    def test_two_names_from_one_second_differ(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(run_lock.time, "strftime", lambda form: "now")
        with claimed_run_folder(None, "digits dana") as a, claimed_run_folder(None, "digits dana") as b:
            assert (str(a), str(b)) == ("runs/now-digits-dana", "runs/now-digits-dana-1")
        with claimed_run_folder(None, "x" * 5000) as long:
            assert len(long.name) < 255

    def test_another_process_is_refused_and_told_who_holds_the_folder_until_that_one_ends(self, tmp_path: Path) -> None:
        run = tmp_path / "run"
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with holder:
            assert holder.stdout is not None
            holder.stdout.readline()
            with pytest.raises(RunLockedError, match=f"a run is going on in {run} .process {holder.pid} on"):
                claimed_run_folder(run, "x").__enter__()
            with pytest.raises(RunLockedError), locked_run_folder(run):
                pass
            check_server_begins(run)
            holder.kill()
        with claimed_run_folder(run, "x"):
            pass

    def test_a_lock_whose_file_was_deleted_holds_nothing(self, tmp_path: Path) -> None:
        """The next process makes a new file; a lock on the old one must not count as a lock on the new one."""
        first = lock_server(tmp_path, 0.0)
        (tmp_path / run_lock.SERVER_LOCK).unlink()
        second = lock_server(tmp_path, 0.0)
        os.close(first)
        with pytest.raises(RunLockedError):
            lock_server(tmp_path, 0.0)
        os.close(second)


class TestServer:
    def test_a_server_begins_in_its_launchers_folder_and_in_an_empty_one(self, tmp_path: Path) -> None:
        check_server_begins(tmp_path)
        with locked_run_folder(tmp_path):
            (tmp_path / "config.yaml").touch()
            (tmp_path / "logs").mkdir()
            check_server_begins(tmp_path)
            (tmp_path / "updates.jsonl").touch()
            check_server_begins(tmp_path, shard=1)
            with pytest.raises(RunFolderError, match=r"already holds a run .updates\.jsonl."):
                check_server_begins(tmp_path)

    def test_a_server_does_not_begin_in_a_run_that_nobody_holds(self, tmp_path: Path) -> None:
        (tmp_path / "config.yaml").touch()
        with pytest.raises(RunFolderError, match=r"already holds a run .config\.yaml."):
            check_server_begins(tmp_path)


def start(*words: str | Path, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "danaz", *map(str, words)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(live.ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ends(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    outputs = [process.communicate(timeout=live.DEADLINE_S)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def check_whole(run: Path) -> int:
    """Check that all files of a run folder come from one run. Returns the seed of that run."""
    summary = json.loads((run / "summary.json").read_text())
    assert [update["version"] for update in live.read_updates(run)] == list(range(1, summary["updates"] + 1))
    assert yaml.safe_load((run / "config.yaml").read_text())["seed"] == summary["seed"]
    seed: int = summary["seed"]
    return seed


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_runs_that_start_at_the_same_time_get_a_folder_each(tmp_path: Path) -> None:
    seeds = range(6)
    sweep = [start("simulate", CONFIG, "-n", "2", "--set", f"seed={seed}", cwd=tmp_path) for seed in seeds]
    assert [code for code, _ in ends(sweep)] == [0] * len(seeds)
    assert sorted(map(check_whole, (tmp_path / "runs").iterdir())) == [*seeds]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_of_several_runs_gets_the_folder_that_all_want(tmp_path: Path) -> None:
    run = tmp_path / "run"
    many = [start("simulate", CONFIG, "--set", f"seed={seed}", "--out", run, cwd=tmp_path) for seed in range(4)]
    many.append(start("launch", CONFIG, "--set", "seed=4", "--out", run, cwd=tmp_path))
    many.append(start("launch", CONFIG, "--set", "seed=5", "--out", run, cwd=tmp_path))
    ended = ends(many)
    assert sorted(code for code, _ in ended) == [0, 2, 2, 2, 2, 2]
    winner = [code for code, _ in ended].index(0)
    assert check_whole(run) == winner
    for number, (_, output) in enumerate(ended):
        assert number == winner or "a run is going on in" in output or "already holds a run" in output


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_live_run_is_not_touched_by_a_second_resume(tmp_path: Path) -> None:
    run = live.Running(tmp_path / "run", str(CONFIG), "--invite", "2", "--record", "--set", "epochs=100000")
    try:
        live.until(lambda: run.trains or run.launcher.poll() is not None, "it trains")
        left = {path.name for path in run.folder.iterdir() if not path.name.startswith(".")}
        assert left <= {*LEFT_BY_RUNS}, "every file that a run leaves is recognized as a run's"
        kept = ["config.yaml", "launch.yaml", *(f"invitations/worker-{number}.json" for number in (1, 2))]
        before = {name: (run.folder / name).read_bytes() for name in [*kept, run_lock.LOCK]}
        for words in (["--resume", run.folder], ["--resume", run.folder, "--hosts", "localhost:3"]):
            [(code, said)] = ends([start("launch", *words, cwd=tmp_path)])
            assert code == 2, said
            assert f"a run is going on in {run.folder} (process {run.launcher.pid} on" in " ".join(said.split())
        assert {name: (run.folder / name).read_bytes() for name in before} == before
        begun = len(live.read_updates(run.folder))
        live.until(lambda: len(live.read_updates(run.folder)) > begun + 100, "it trains on")
        run.launcher.send_signal(signal.SIGINT)
        output, _ = run.launcher.communicate()
        assert "restart" not in output
    finally:
        run.end()


def test_a_later_launch_never_runs_the_script_of_a_failed_one(tmp_path: Path) -> None:
    """The folder of the failed launch is refused, and --resume continues with the script of that launch."""
    run = tmp_path / "run"
    with prepared(LaunchOptions(out=run), [], ["python", "first.py"]) as (ready, _):
        write_folder(ready)
    assert CliRunner().invoke(app, ["launch", "--out", str(run)], obj=["python", "second.py"]).exit_code == 2
    said = CliRunner().invoke(app, ["launch", "--resume", str(run), "--dry-run"], obj=[])
    assert said.exit_code == 0, said.output
    assert "python first.py" in said.output
    (other := tmp_path / "other").mkdir()
    with prepared(LaunchOptions(out=other), [], ["python", "second.py"]) as (ready, _):
        (other / "config.yaml").write_text("command: [python, first.py]\n")
        write_folder(ready)
    assert yaml.safe_load((other / "config.yaml").read_text())["command"] == ["python", "second.py"]


def test_a_dry_run_claims_nothing(tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["launch", str(CONFIG), "--dry-run", "--out", str(tmp_path / "run")], obj=[])
    assert said.exit_code == 0, said.output
    assert not (tmp_path / "run").exists()
