"""Two shards on two machines keep their checkpoints there. Whatever is killed, both go on from one generation."""

from __future__ import annotations

import json
import os
import re
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from live import read_updates
from namespaces import Namespaces
from waiting import until

from danaz.launch.prepare import run_id_of

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(400)]

EPOCHS = 25
TRAINING_S = 300.0
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


class Run:
    """A run on digits with shard 0 and a worker on a, and shard 1 and a worker on b."""

    def __init__(self, network: Namespaces, folder: Path):
        self.network, self.folder = network, folder
        training = ["configs/digits.yaml", "--set", f"epochs={EPOCHS}", "--collective", "torch", "--hosts", "a:1,b:1"]
        servers = ["--server-host", "a,b", "--server-shards", "2", "--checkpoint-seconds", "0.5"]
        self.launcher = network.danaz("launch", *training, *servers, "--out", str(folder), env=ENV)

    @property
    def kept(self) -> list[Path]:
        """Return the folders of this run on a and b, which share their temporary files."""
        return sorted(Path(tempfile.gettempdir()).glob(f"{run_id_of(self.folder)}-*"))

    def trains(self) -> bool:
        """Return whether both shards have kept a generation that shard 0 began while training went on."""
        newest = [max(folder.glob("checkpoints*/*.json"), default=Path("0")).stem for folder in self.kept]
        return self.launcher.poll() is not None or (len(newest) == 2 and min(map(int, newest)) > 3)

    def shard(self, name: str) -> int:
        [pid] = [pid for pid, line in self.network.processes(name).items() if "danaz serve" in line]
        return pid

    def output(self) -> str:
        return self.launcher.communicate(timeout=TRAINING_S)[0]

    def resume(self, *options: str) -> None:
        self.launcher = self.network.danaz("launch", "--resume", str(self.folder), *options, env=ENV)

    def check_end(self, output: str, restarts: int) -> None:
        assert self.launcher.returncode == 0, output
        summary, updates = json.loads((self.folder / "summary.json").read_text()), read_updates(self.folder)
        assert (summary["complete"], summary["restarts"]) == (True, restarts)
        assert summary["test_error_percent"] < 6
        assert [update["version"] for update in updates] == list(range(1, EPOCHS * 45 + 1))
        assert sorted(update["batch"] for update in updates) == list(range(EPOCHS * 45))
        assert (self.folder / "parameters.safetensors").exists()
        assert not [*self.folder.glob("checkpoints*")]
        assert self.kept == []
        assert self.network.is_idle()


@pytest.fixture
def run(network: Namespaces, tmp_path: Path) -> Iterator[Run]:
    run = Run(network, tmp_path / "run")
    until(run.trains, "both shards keep checkpoints", TRAINING_S)
    yield run
    run.launcher.kill()
    run.launcher.communicate()
    until(run.network.is_idle, "everything has ended with its launcher")


@pytest.mark.parametrize(("host", "name"), [("a", "server"), ("b", "server.1")])
def test_one_is_killed_and_all_go_on(run: Run, host: str, name: str) -> None:
    os.kill(run.shard(host), signal.SIGKILL)
    output = run.output()
    assert f"server: {name} was killed by SIGKILL; restart 1 of 3 in 2 s" in output, output
    lead, other = re.search(r"server restarted.* version (\d+)", output), re.search(r"shard 1 .* version (\d+)", output)
    assert lead
    assert other
    assert abs(int(lead[1]) - int(other[1])) <= 2, "a push or two more or less"
    run.check_end(output, restarts=1)


def test_what_was_interrupted_is_resumed_here(run: Run) -> None:
    run.launcher.send_signal(signal.SIGINT)
    assert (
        f"to go on from its last checkpoint: danaz launch --resume {run.folder} --server-host localhost" in run.output()
    )
    assert run.kept == []
    assert all([*(run.folder / name).glob("*.json")] for name in ("checkpoints", "checkpoints.1"))
    run.resume()
    assert "are on this machine; let its server run here: --server-host localhost" in " ".join(run.output().split())
    run.resume("--server-host", "localhost")
    run.check_end(run.output(), restarts=1)


def test_what_died_with_its_launcher_is_resumed_there(run: Run) -> None:
    run.launcher.kill()
    run.launcher.communicate()
    until(run.network.is_idle, "everything has ended with its launcher")
    assert len(run.kept) == 2
    run.resume("--server-host", "localhost")
    assert "ran on a,b, and its checkpoints are there" in " ".join(run.output().split())
    run.resume()
    run.check_end(run.output(), restarts=1)
