"""Run folders and a checkpoint that an earlier version wrote (tests/fixtures/before_layout) are still read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from live import read_updates
from safetensors.torch import load_file

from danaz.protocol.messages import Join, Parameters, Push
from danaz.run.config import load_config
from danaz.run.folder import read_summary
from danaz.run.settings import Settings
from danaz.server.core import ServerCore
from danaz.serving.checkpoint import complete_numbers, folder_of, read_newest
from danaz.serving.journal import RunWriter
from danaz.serving.keeper import RunKeeper
from danaz.serving.serve import replay_run

EARLIER = Path(__file__).parents[1] / "fixtures" / "before_layout"
REQUEST = 1000  # larger than the numbers of the earlier run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Return a copy of the earlier folders, beside the module that holds their model and data."""
    return Path(shutil.copytree(EARLIER, tmp_path / "runs"))


def danaz(folder: Path, *words: str) -> str:
    """Run a command in ``folder``, and return what it prints. It must succeed."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "danaz", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


class TestFinished:
    def test_its_summary_and_its_journal_are_read(self, runs: Path) -> None:
        summary = read_summary(runs / "finished")
        assert summary["complete"]
        assert summary["updates"] == 60
        assert summary["final_train_loss"] == pytest.approx(0.2852, abs=1e-4)
        updates = RunWriter(runs / "finished", {}).read_journal(after=0)
        assert [update.version for update in updates] == [*range(1, 61)]
        assert {update.worker for update in updates} == {0, 1}

    def test_its_recording_is_replayed_bit_for_bit(self, runs: Path) -> None:
        assert replay_run(runs / "finished") == (60, True)

    def test_its_settings_have_the_same_digest(self, runs: Path) -> None:
        """Server, workers and checkpoints compare it, so a new key of the config must not change it."""
        facts = json.loads((runs / "interrupted" / "checkpoints" / "000003.json").read_text())["facts"]
        assert load_config(runs / "interrupted" / "config.yaml").digest() == facts["digest"]


def test_a_comparison_goes_on_where_it_was_and_is_reported(runs: Path) -> None:
    command = ["compare", "tiny.yaml", "--algorithms", "dana,asgd", "--workers", "2", "--set", "epochs=2"]
    assert "finished before: 2 of 2" in danaz(runs, *command, "--out", "comparison")
    assert "0.3887" in (runs / "comparison" / "report.md").read_text()


# ---- a checkpoint ----------------------------------------------------------------------------------------------------


def resumed(run: Path) -> RunKeeper:
    config = load_config(run / "config.yaml")
    settings = Settings.of(config, schedule="live", collective="torch").for_server()
    keeper = RunKeeper(RunWriter(run, {}), settings)
    assert keeper.resume() is keeper.core
    return keeper


def rejoin(core: ServerCore, *workers: int) -> dict[int, Parameters]:
    """Let the processes of the earlier run join again. Each gets its view when the last one has joined."""
    job, digest = core.job, core.settings.digest
    views = {}
    for worker in workers:
        request = Join(
            worker, incarnation(core, worker), REQUEST, digest, job.optimizers, job.layout, job.plan, ahead=1
        )
        for route, reply in core.handle(worker, request, time.monotonic()):
            assert isinstance(reply, Parameters)
            assert isinstance(route, int)
            views[route] = reply
    return views


def incarnation(core: ServerCore, worker: int) -> int:
    return core.members[worker].incarnation


class TestCheckpoint:
    def test_the_newest_is_read(self, runs: Path) -> None:
        folder = folder_of(runs / "interrupted")
        assert complete_numbers(folder) == [2, 3]
        found = read_newest(folder)
        assert found is not None
        state, damaged = found
        assert not damaged
        assert torch.equal(state.tensors["params"], load_file(folder / "000003.safetensors")["params"])

    def test_a_server_goes_on_from_it(self, runs: Path) -> None:
        run = runs / "interrupted"
        core = resumed(run).core
        version = core.master.version
        assert version == 93
        state = read_newest(folder_of(run))
        assert state is not None
        assert torch.equal(core.master.params, state[0].tensors["params"])
        view = rejoin(core, 0, 1)[0]
        before = core.master.params.clone()
        gradient = torch.ones(core.job.layout.size)
        push = Push(
            0,
            incarnation(core, 0),
            REQUEST + 1,
            view.version,
            (0.05,),
            4,
            0.5,
            view.leases[0],
            gradient,
            life=view.life,
        )
        [answer] = [reply for route, reply in core.handle(0, push, time.monotonic()) if route == 0]
        assert isinstance(answer, Parameters)
        assert answer.applied, answer.refused
        assert core.master.version == version + 1
        velocity = 0.9 * state[0].tensors["member.0.velocity"] + gradient
        assert torch.allclose(core.master.params, before - 0.05 * velocity)
        assert read_updates(run)[-1]["version"] == version + 1

    def test_one_that_another_version_wrote_is_refused(self, runs: Path) -> None:
        """A server with any other settings refuses it."""
        config = load_config(runs / "interrupted" / "config.yaml")
        settings = replace(Settings.of(config, schedule="live", collective="torch"), digest="another")
        keeper = RunKeeper(RunWriter(runs / "interrupted", {}), settings.for_server())
        with pytest.raises(ValueError, match="config"):
            keeper.resume()

    @pytest.mark.slow
    def test_the_run_is_resumed(self, runs: Path) -> None:
        """It is launched again as it was, but in another folder."""
        options = runs / "interrupted" / "launch.yaml"
        options.write_text(options.read_text().replace("chdir: /tmp/oldrun", f"chdir: {runs}"))
        danaz(runs, "launch", "--resume", "interrupted")
        summary = read_summary(runs / "interrupted")
        assert summary["complete"]
        assert summary["restarts"] == 1
        lines = read_updates(runs / "interrupted")
        assert [line["version"] for line in lines] == [*range(1, summary["updates"] + 1)]
