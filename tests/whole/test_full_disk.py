"""The disk is full, or the run folder is deleted: training goes on where it can, and the end says what is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import live
import pytest
import torch
from cluster import Cluster

from danaz.files.atomic import write_atomically
from danaz.run.config import load_config
from danaz.run.settings import Settings
from danaz.server.snapshot import Snapshot
from danaz.serving import journal as run_journal
from danaz.serving.checkpoint import read_newest, write_checkpoint
from danaz.serving.journal import Journal
from danaz.serving.keeper import Checkpoints
from danaz.serving.recording import Recorder

CONFIG = live.ROOT / "configs" / "quadratic.yaml"
NO_SPACE = "No space left on device"
Mount = Callable[[str], Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mount a small disk."""
    mounted: list[Path] = []

    def make(size: str, options: str = "rw") -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size},{options}", "danaz-test", str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
        if made.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {made.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Fill the rest of a disk; return the file to delete."""
    filler = disk / "filler"
    try:
        with filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError:
        return filler


def danaz(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "danaz", *map(str, words)],
        cwd=live.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def state(floats: int) -> Snapshot:
    return Snapshot({"master": {"version": 1}}, {"params": torch.zeros(floats)})


# ---- the parts ---------------------------------------------------------------------------------------------------


class TestJournal:
    LINE = b'{"version": 1, "worker": 0}\n'

    def test_lines_wait_until_there_is_room(self, mount: Mount) -> None:
        disk, said = mount("64k"), []
        journal = Journal(disk / "updates.jsonl", said.append)
        journal.add(self.LINE)
        filler = fill(disk)
        for _ in range(1000):
            journal.add(self.LINE)
        assert [sentence.count(NO_SPACE) for sentence in said] == [1]
        filler.unlink()
        journal.add(self.LINE)
        assert said[1:] == [f"{journal.path} can be written again, and is whole"]
        assert journal.close() == 0
        assert journal.path.read_bytes() == self.LINE * 1002

    def test_what_does_not_fit_to_the_end_is_counted_and_no_line_is_torn(self, mount: Mount) -> None:
        disk = mount("16k")
        journal = Journal(disk / "updates.jsonl", lambda sentence: None)
        for _ in range(1000):
            journal.add(self.LINE)
        missing = journal.close()
        assert 0 < missing < 1000
        assert journal.path.read_bytes() == self.LINE * (1000 - missing)

    def test_memory_has_an_end(self, mount: Mount, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(run_journal, "MOST_WAITING_BYTES", 10 * len(self.LINE))
        disk, said = mount("16k"), []
        journal = Journal(disk / "updates.jsonl", said.append)
        for _ in range(1000):
            journal.add(self.LINE)
        written = journal.path.read_bytes().count(b"\n")
        assert "will lack all further updates" in said[-1]
        (disk / "other").touch()
        journal.add(self.LINE)
        assert journal.close() == 1001 - written
        assert journal.path.read_bytes() == self.LINE * written, "nothing follows a hole"

    def test_one_that_is_deleted_is_lost_and_that_is_said(self, tmp_path: Path) -> None:
        said: list[str] = []
        journal = Journal(tmp_path / "run" / "updates.jsonl", said.append)
        journal.path.parent.mkdir()
        for _ in range(3):
            journal.add(self.LINE)
        shutil.rmtree(journal.path.parent)
        for _ in range(3):
            journal.add(self.LINE)
        assert len(said) == 1
        assert "was deleted" in said[0]
        assert journal.close() == 6


def test_a_checkpoint_that_does_not_fit_leaves_nothing_and_the_one_before(mount: Mount) -> None:
    disk = mount("256k")
    write_checkpoint(disk / "checkpoints", 1, state(10_000))
    with pytest.raises(OSError, match=NO_SPACE):
        write_checkpoint(disk / "checkpoints", 2, state(100_000), keep=[1])
    assert {path.stem for path in (disk / "checkpoints").iterdir()} == {"000001"}
    found = read_newest(disk / "checkpoints")
    assert found is not None
    assert found[1] == []


def test_checkpoints_that_do_not_fit_are_told_once_and_so_is_that_they_fit_again(
    mount: Mount, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = mount("256k")
    core = Cluster("asgd", 1, torch.zeros(4)).server
    checkpoints = Checkpoints(disk, core)
    monkeypatch.setattr(core, "snapshot", lambda reuse=None: state(10_000))
    filler = fill(disk)
    for number in (1, 2, 3):
        checkpoints.write(number)
    checkpoints.wait()
    said = capsys.readouterr().err
    assert said.count(NO_SPACE) == said.count("Training goes on") == 1
    filler.unlink()
    checkpoints.write(4)
    checkpoints.wait()
    assert "checkpoints can be written again: 4 is" in capsys.readouterr().err
    assert core.state.kept == (4,)


def test_a_file_that_does_not_fit_is_as_before_and_leaves_no_part(mount: Mount) -> None:
    disk = mount("16k")
    write_atomically(disk / "summary.json", b"before")
    with pytest.raises(OSError, match=NO_SPACE) as caught:
        write_atomically(disk / "summary.json", bytes(100_000))
    assert caught.value.filename == str(disk / "summary.json")
    assert [(path.name, path.read_bytes()) for path in disk.iterdir()] == [("summary.json", b"before")]


def test_a_recording_that_does_not_fit_ends_and_says_so_once(mount: Mount) -> None:
    disk, said = mount("16k"), []
    recorder = Recorder(disk / "recording.bin", "{}", said.append)
    for _ in range(100):
        recorder.record(1.0, b"route", [bytes(1000)])
    recorder.close()
    assert len(said) == 1
    assert NO_SPACE in said[0]


# ---- commands ----------------------------------------------------------------------------------------------------


def ends_in_a_sentence(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode not in (0, 1), result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    said = " ".join(result.stderr.split())
    assert all(word in said for word in words), result.stderr


@pytest.mark.slow
def test_a_simulation_trains_to_its_end_and_says_what_could_not_be_written(mount: Mount) -> None:
    disk = mount("128k")
    result = danaz("simulate", CONFIG, "-n", "2", "--set", "epochs=10", "--out", disk / "run")
    ends_in_a_sentence(result, "the results of the run in", NO_SPACE, "parameters.safetensors")
    assert "100%" in result.stdout + result.stderr
    assert result.stderr.count("Training goes on") == 1
    assert not (disk / "run" / "summary.json").exists()
    assert not [*(disk / "run").glob(".*.part")]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_comparison_names_the_cell_that_did_not_fit_and_runs_it_again(mount: Mount) -> None:
    disk = mount("192k")
    words = ("compare", CONFIG, "-a", "dana", "-n", "2", "-j", "1", "--set", "epochs=10", "--out", disk / "c")
    result = danaz(*words)
    assert result.returncode in (1, 2), result.stderr
    assert NO_SPACE in " ".join((result.stdout + result.stderr).split())
    assert "Traceback" not in result.stdout + result.stderr
    assert not [*(disk / "c" / "cells").glob("*/summary.json")]
    subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
    assert danaz(*words).returncode == 0
    assert len([*(disk / "c" / "cells").glob("*/summary.json")]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("command", ["launch", "simulate", "compare"])
def test_a_folder_that_cannot_be_made_is_named(command: str, mount: Mount, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    full = mount("4k")
    fill(full)
    folders = {
        mount("4k", "ro") / "run": "Read-only file system",
        tmp_path / "file": "",
        tmp_path / "file" / "run": "",
        tmp_path / ("x" * 300): "File name too long",
        full / "run": NO_SPACE,
    }
    for folder, reason in folders.items():
        result = danaz(command, CONFIG, "--out", folder)
        ends_in_a_sentence(result, reason)
        assert str(folder)[:60] in result.stderr.replace("\n", "")
        assert len(result.stderr.strip().splitlines()) <= 2


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("algorithm", ["dana", "ssgd"])
def test_a_launch_on_a_disk_that_fills_up_ends_with_a_sentence(algorithm: str, mount: Mount) -> None:
    disk = mount("512k")
    run = disk / "run"
    process = live.start(str(CONFIG), "--hosts", "localhost:1", "-a", algorithm, "--set", "epochs=60", out=run)
    live.until(lambda: live.read_updates(run) or process.poll() is not None, "it trains")
    fill(disk)
    ended = live.finish(process, run)
    assert ended.exit_code != 0
    assert NO_SPACE in ended.output
    assert "Traceback" not in ended.output
    assert "restart" not in ended.output, "which would begin afresh, for want of a checkpoint"
    assert not (run / "summary.json").exists()


# ---- a server ----------------------------------------------------------------------------------------------------


class Served:
    """A server and a worker that train on the quadratic. This test starts the two processes itself."""

    def __init__(self, folder: Path, epochs: int):
        config = load_config(CONFIG, [f"epochs={epochs}", "workers=1"])
        values = json.loads(Settings.of(config, schedule="live", collective="none").to_json())
        self.folder = folder
        self.env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DANAZ_SETTINGS": json.dumps({**values, "checkpoint_s": 0.2}),
            "DANAZ_CONFIG": config.model_dump_json(),
            "DANAZ_RUN": str(folder),
        }
        self.server = self.start("serve", "--bind", "tcp://127.0.0.1:0")
        assert self.server.stdout is not None
        address = self.server.stdout.readline().strip().removeprefix("DANAZ_SERVER=")
        self.worker = self.start("work", DANAZ_WORKER="0", DANAZ_SERVER=address)

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "danaz", *words]
        env = {**self.env, **env}
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        for child in (self.server, self.worker):
            child.kill()
            child.communicate()

    def until_it_trains(self, updates: int = 1) -> None:
        trains = lambda: len(live.read_updates(self.folder)) >= updates  # noqa: E731
        live.until(lambda: trains() or self.server.poll() is not None, "it trains")

    def end(self) -> tuple[int, str]:
        """Check that the worker ended well, and return how the server ended."""
        _, said = self.server.communicate(timeout=live.DEADLINE_S)
        _, errors = self.worker.communicate(timeout=live.DEADLINE_S)
        assert self.worker.returncode == 0, errors
        assert "Traceback" not in said
        return self.server.returncode, said


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_server_goes_on_without_journal_and_checkpoints_and_says_what_is_lost(mount: Mount) -> None:
    disk = mount("256k")
    with Served(disk / "run", epochs=60) as served:
        served.until_it_trains()
        fill(disk)
        code, said = served.end()
    assert code == 2
    assert said.count("updates.jsonl cannot be written") == 1
    assert said.count("could not be written: ") == 2, said  # a checkpoint, once; and the results
    assert "the results of the run in" in said.splitlines()[-1]
    assert not (disk / "run" / "summary.json").exists()
    assert (disk / "run" / "checkpoints").is_dir(), "it can be resumed"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_deleted_run_folder_is_made_again_for_the_results(tmp_path: Path) -> None:
    with Served(tmp_path / "run", epochs=60) as served:
        served.until_it_trains(100)
        shutil.rmtree(served.folder)
        code, said = served.end()
    assert code == 2
    assert said.count("was deleted") == 1
    assert "lacks 6000 updates" in said.splitlines()[-1]
    summary: dict[str, Any] = json.loads((served.folder / "summary.json").read_text())
    assert (summary["complete"], summary["updates"], summary["unrecorded_updates"]) == (True, 6000, 6000)
    assert (served.folder / "parameters.safetensors").exists()
