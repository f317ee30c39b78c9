"""Whole runs that go on: a worker comes back, a worker joins, and a run is resumed after its launcher was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import live
import pytest
import yaml

from danaz.protocol.messages import Heartbeat, Pull, Refusal
from danaz.serving.checkpoint import FOLDER, read_newest
from danaz.worker.link import DealerLink, ServerLostError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CONFIG = str(live.ROOT / "configs" / "quadratic.yaml")
TWO_WORKERS = ("--hosts", "localhost:2", "--workers-per-host", "2")
ADAMW = ("--set", "optimizer=adamw", "--set", "lr=0.002")


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., live.Running]]:
    runs: list[live.Running] = []

    def start(*arguments: str, epochs: int = 100_000) -> live.Running:
        runs.append(live.Running(tmp_path / "run", CONFIG, *TWO_WORKERS, "--set", f"epochs={epochs}", *arguments))
        live.until(lambda: runs[-1].trains or runs[-1].launcher.poll() is not None, "it trains")
        return runs[-1]

    yield start
    for run in runs:
        run.end()


def workers_since(folder: Path, version: int) -> set[int]:
    return {update["worker"] for update in live.read_updates(folder)[version:]}


@pytest.mark.parametrize("manner", [(), ("--pipeline", *ADAMW)], ids=["plain", "pipeline of adamw"])
def test_a_killed_rank_comes_back_and_pushes_again(begin: Callable[..., live.Running], manner: tuple[str, ...]) -> None:
    run = begin(*manner)
    os.kill(run.pid("rank"), signal.SIGKILL)
    killed_at = len(live.read_updates(run.folder))
    live.until(lambda: workers_since(run.folder, killed_at + 100) >= {0, 1}, "both workers push")
    run.launcher.send_signal(signal.SIGINT)
    output, _ = run.launcher.communicate()
    assert run.launcher.returncode == 130
    assert "danaz: worker 1 on localhost: rank 1 was killed by SIGKILL; restart 1 of 3 in 2 s\n" in output
    assert output.count("danaz: worker 1 on localhost: started again\n") == 1
    assert "danaz: worker 1 was restarted once\n" in output
    assert not run.processes


def test_a_worker_joins_a_run_and_leaves_it(begin: Callable[..., live.Running], tmp_path: Path) -> None:
    run = begin("--invite", "2")
    said = (run.folder / "logs/localhost/server/stdout").read_text()
    server = said.splitlines()[0].removeprefix("DANAZ_SERVER=tcp://")
    join = [sys.executable, "-m", "danaz", "work", "--join", server, "--slots", "2", "--out", str(tmp_path / "joined")]
    key = run.folder / "invitations" / "worker-3.json"
    joined = subprocess.Popen([*join, "--key", str(key)], cwd=live.ROOT, start_new_session=True)
    try:
        live.until(lambda: 3 in workers_since(run.folder, 0), "it takes part")
        joined.send_signal(signal.SIGINT)
        assert joined.wait(live.DEADLINE_S) == 130
    finally:
        joined.kill()
        joined.wait()
    found = read_newest(run.folder / FOLDER)  # written before the worker hears that it has left
    assert found is not None
    [guest] = [member for member in found[0].facts["members"] if member["worker"] == 3]
    assert guest["left"], "it did not just fall silent"
    left_at = len(live.read_updates(run.folder))
    live.until(lambda: len(live.read_updates(run.folder)) > left_at + 100, "the others go on")
    assert workers_since(run.folder, left_at + 100) <= {0, 1}
    assert {path.name for path in (tmp_path / "joined/logs/localhost").iterdir()} == {"rank.0", "rank.1"}


@pytest.mark.parametrize("optimizer", [(), ("--algorithm", "dana-zero", *ADAMW)], ids=["dana sgd", "dana-zero adamw"])
def test_a_run_goes_on_when_all_of_it_was_killed(
    begin: Callable[..., live.Running], optimizer: tuple[str, ...]
) -> None:
    run = begin("--checkpoint-seconds", "0.5", *optimizer, epochs=60)
    live.until(lambda: (run.folder / "checkpoints").is_dir() and len(live.read_updates(run.folder)) > 300, "enough")
    os.kill(run.launcher.pid, signal.SIGKILL)
    resumed = subprocess.run(
        [sys.executable, "-m", "danaz", "launch", "--resume", str(run.folder), "--hosts", "localhost:3"],
        cwd=live.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert resumed.returncode == 0, resumed.stdout
    total = 60 * 100
    assert [update["version"] for update in live.read_updates(run.folder)] == list(range(1, total + 1))
    summary = live.Run(run.folder, 0, "").summary
    assert (summary["updates"], summary["complete"], summary["diverged"]) == (total, True, False)
    assert yaml.safe_load((run.folder / "launch.yaml").read_text())["hosts"] == "localhost:3"


@pytest.mark.parametrize("manner", [(), ("--insecure",)], ids=["keys", "insecure"])
def test_who_has_no_key_gets_nothing_on_this_machine_either(
    begin: Callable[..., live.Running], manner: tuple[str, ...]
) -> None:
    """Another user of this machine can read the server's address and connect to it."""
    run = begin(*manner)
    server = (run.folder / "logs/localhost/server/stdout").read_text().splitlines()[0].removeprefix("DANAZ_SERVER=")
    link = DealerLink(server, Heartbeat(1, 1), give_up_s=live.DEADLINE_S if manner else 3.0)
    try:
        if manner:
            assert isinstance(link.exchange(Pull(1, 1, 1)), Refusal), "of another incarnation, but it was heard"
        else:
            with pytest.raises(ServerLostError, match="did not answer"):
                link.exchange(Pull(1, 1, 1))
    finally:
        link.close()
    assert run.launcher.poll() is None
