"""Simulated runs: NumPy replays their arithmetic from the records, the seed decides every bit, and DANA trains well
where NAG-ASGD diverges. Also the content of a run folder, and what is left of it after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import ORACLES
from oracle_optimizers import AdamOracle, Array, NAdamOracle, SgdOracle
from safetensors.torch import load_file
from shipped import CONFIGS, shipped
from typer.testing import CliRunner

from danaz.cli.main import app
from danaz.files.atomic import write_atomically
from danaz.run.config import Config
from danaz.run.folder import read_summary, with_measured
from danaz.run.lock import RunFolderError, free_run_folder
from danaz.server.records import Update
from danaz.serving.journal import RunWriter
from danaz.simulate.simulator import simulate

DIMENSION, PER_EPOCH = 1000, 100
SGD = SgdOracle(DIMENSION, 0.9)
CURVATURE = np.logspace(-2, 0, DIMENSION)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def no_constant(word: str) -> None:
    raise AssertionError(f"{word} is not JSON")


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=no_constant)


def lines(run: Path) -> list[dict[str, Any]]:
    return [strict(line) for line in (run / "updates.jsonl").read_text().splitlines()]


def run_config(config: Config, run: Path) -> dict[str, Any]:
    run.mkdir(exist_ok=True)
    summary = simulate(config, run)
    assert with_measured(strict((run / "summary.json").read_text())) == summary
    return summary


def quadratic(run: Path, algorithm: str, workers: int, *overrides: str) -> dict[str, Any]:
    sets = [f"algorithm={algorithm}", f"workers={workers}", "threads=1", *overrides]
    return run_config(shipped("quadratic", *sets), run)


# ---- the replay --------------------------------------------------------------------------------------------------


def value(theta: Array) -> float:
    """Return f(θ) = ½ Σ aⱼ(θⱼ − 1)²."""
    return float((CURVATURE * (theta - 1) ** 2).sum() / 2)


def replayed(
    run: Path, algorithm: str, workers: int, lr_correction: bool = True, optimizer: Any = SGD, tolerance: float = 1e-6
) -> Array:
    """Check loss, lag and gap of each line. Return θ after all updates, from the records and the formulas alone."""
    oracle = ORACLES[algorithm](np.zeros(DIMENSION), workers, optimizer, lr_correction)
    oracle.start()
    for line in lines(run):
        worker = line["worker"]
        view, version = oracle.sent[worker]
        gap = np.linalg.norm(oracle.final() - view) / DIMENSION**0.5
        assert line["lag"] == oracle.updates - version
        assert line["gap"] == pytest.approx(gap, rel=1e-3, abs=tolerance)
        assert line["gap_of"] == "parameters"
        assert line["loss"] == pytest.approx(value(view), rel=1e-4)
        for number in [number for number, _ in line.get("round", [(worker, None)])]:
            grad = CURVATURE * (oracle.sent[number][0] - 1)
            oracle.push(number, [(grad, np.full(DIMENSION, line["lr"]))], 1)
        assert oracle.updates == line["version"]
    return oracle.final()


SCHEDULE = "lr_schedule={milestones: [1, 2.5], factor: 0.5, warmup_epochs: 1.5}"
RUNS = [
    ("baseline", 1, ()),
    ("asgd", 8, ()),
    ("nag-asgd", 8, ("lr=0.005",)),
    ("multi-asgd", 8, ()),
    ("dana-zero", 8, ()),
    ("dana", 8, ()),
    ("ssgd", 8, ()),
    ("ssgd-lars", 8, ()),
    ("sa", 8, ("lr=0.01",)),
    ("dana-sa", 8, ()),
    ("dana-ga", 8, ()),
    ("dc-asgd", 8, ()),
]


class TestReplay:
    """The records are enough to check the arithmetic of a whole run."""

    @pytest.mark.parametrize(("algorithm", "workers", "overrides"), RUNS, ids=[run[0] for run in RUNS])
    def test_constant_rate(self, tmp_path, algorithm, workers, overrides):
        summary = quadratic(tmp_path, algorithm, workers, *overrides)
        self.same_end(summary, replayed(tmp_path, algorithm, workers))
        expected = 0.05 if not overrides else float(overrides[0].removeprefix("lr="))
        assert {line["lr"] for line in lines(tmp_path)} == {expected * (workers if algorithm.startswith("ssgd") else 1)}
        assert not summary["diverged"]

    @pytest.mark.parametrize(("algorithm", "workers", "overrides"), RUNS, ids=[run[0] for run in RUNS])
    def test_steps_and_warm_up(self, tmp_path, algorithm, workers, overrides):
        summary = quadratic(tmp_path, algorithm, workers, *overrides, SCHEDULE)
        self.same_end(summary, replayed(tmp_path, algorithm, workers))
        base = 0.05 if not overrides else float(overrides[0].removeprefix("lr="))
        records = lines(tmp_path)
        for line in records:
            assert line["lr"] == pytest.approx(self.rate(base, line, records, algorithm, workers), rel=1e-12)
        assert len({line["lr"] for line in records}) > 10 or workers == 1

    def test_round_robin(self, tmp_path):
        summary = quadratic(tmp_path, "dana", 5, "schedule=round-robin")
        self.same_end(summary, replayed(tmp_path, "dana", 5))

    def test_without_lr_correction(self, tmp_path):
        summary = quadratic(tmp_path, "dana", 8, SCHEDULE, "lr_correction=false")
        self.same_end(summary, replayed(tmp_path, "dana", 8, lr_correction=False))

    @pytest.mark.parametrize(
        ("algorithm", "name"),
        [
            *((each, "adamw") for each in ("dana-zero", "dana", "ssgd", "dana-ga")),
            ("dana", "nadam"),
        ],
    )
    def test_other_optimizers(self, tmp_path, algorithm, name):
        """Steps of Adam do not shrink with the gradient, so that the run ends at 200 updates, before it is there."""
        optimizer, *options = {
            "adamw": (AdamOracle(DIMENSION, weight_decay=0.1), "optimizer=adamw", "weight_decay=0.1"),
            "nadam": (NAdamOracle(DIMENSION), "optimizer=nadam"),
        }[name]
        options.append("lr_scaling=linear")
        summary = quadratic(tmp_path, algorithm, 8, *options, SCHEDULE, "lr=0.002", "epochs=2")
        self.same_end(summary, replayed(tmp_path, algorithm, 8, optimizer=optimizer, tolerance=1e-5))

    def same_end(self, summary: dict[str, Any], theta: Array) -> None:
        assert summary["params_l2"] == pytest.approx(np.linalg.norm(theta), rel=1e-4)
        assert summary["final_train_loss"] == pytest.approx(value(theta), rel=1e-4)

    def rate(
        self, base: float, line: dict[str, Any], records: Sequence[dict[str, Any]], algorithm: str, workers: int
    ) -> float:
        """The steps follow the batch's epoch. The warm-up follows the cluster's progress when the view was sent."""
        batches_before = len(line.get("round", [0])) and sum(
            len(each.get("round", [0])) for each in records[: line["version"] - 1 - line["lag"]]
        )
        step = 0.5 ** sum(line["batch"] // PER_EPOCH >= milestone for milestone in (1, 2.5))
        progress = min(1.0, batches_before / PER_EPOCH / 1.5)
        warm_up = 1.0 if workers == 1 else 1 / workers + (1 - 1 / workers) * progress
        return base * step * warm_up * (workers if algorithm.startswith("ssgd") else 1)

    def test_dana_and_dana_zero_walk_the_same_way(self, tmp_path):
        ends = [quadratic(tmp_path / name, name, 8, SCHEDULE) for name in ("dana", "dana-zero")]
        assert ends[0]["params_l2"] == pytest.approx(ends[1]["params_l2"], rel=1e-5)
        walks = [lines(tmp_path / name) for name in ("dana", "dana-zero")]
        for one, other in zip(*walks, strict=True):
            assert (one["worker"], one["lag"], one["batch"]) == (other["worker"], other["lag"], other["batch"])
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
            assert one["gap"] == pytest.approx(other["gap"], rel=1e-3, abs=1e-6)


class TestRecords:
    def test_the_lines_of_a_run(self, tmp_path):
        quadratic(tmp_path, "dana", 8)
        records = lines(tmp_path)
        assert [line["version"] for line in records] == list(range(1, 401))
        assert sorted(line["batch"] for line in records) == list(range(400))
        figures = ["version", "worker", "lag", "lr", "gap", "gap_of", "loss", "batch"]
        assert all(list(line) == [*figures, "samples", "incarnation", "request"] for line in records)

    def test_round_robin_has_lag_n_minus_1(self, tmp_path):
        summary = quadratic(tmp_path, "asgd", 4, "schedule=round-robin", "epochs=1")
        assert [line["worker"] for line in lines(tmp_path)] == list(range(4)) * 25
        assert [line["lag"] for line in lines(tmp_path)] == [0, 1, 2] + [3] * 97
        assert summary["mean_lag"] == pytest.approx((0 + 1 + 2 + 3 * 97) / 100)

    def test_block_random_holds_each_worker_once_in_a_block(self, tmp_path):
        quadratic(tmp_path, "asgd", 5, "epochs=1")
        order = [line["worker"] for line in lines(tmp_path)]
        blocks = [order[at : at + 5] for at in range(0, 100, 5)]
        assert all(sorted(block) == list(range(5)) for block in blocks)
        assert len({tuple(block) for block in blocks}) > 10

    def test_the_summary(self, tmp_path):
        summary = quadratic(tmp_path, "dana", 8, "seed=3")
        told = ("algorithm", "workers", "ranks_per_worker", "schedule", "seed", "updates", "epochs", "diverged")
        assert [summary[key] for key in told] == ["dana", 8, 1, "block-random", 3, 400, 4.0, False]
        assert (summary["collective"], summary["complete"]) == ("none", True)
        assert summary["test_error_percent"] is None
        assert summary["gap_of"] == "parameters"
        gaps = [line["gap"] for line in lines(tmp_path)]
        assert summary["mean_gap"] == pytest.approx(sum(gaps) / 400)
        assert summary["wall_seconds"] > 0
        assert summary["updates_per_second"] == pytest.approx(400 / summary["wall_seconds"])
        assert read_summary(tmp_path) == summary

    def test_the_saved_parameters_are_theta(self, tmp_path):
        summary = quadratic(tmp_path, "dana", 8)
        [theta] = load_file(tmp_path / "parameters.safetensors").values()
        assert float(torch.linalg.vector_norm(theta.double())) == pytest.approx(summary["params_l2"], rel=1e-12)

    @pytest.mark.parametrize(("gap", "measured"), [("off", 0), ("every:100", 4), ("on", 400)])
    def test_the_gap_as_often_as_asked(self, tmp_path, gap, measured):
        summary = quadratic(tmp_path, "dana", 4, f"gap={gap}")
        assert sum(line["gap"] is not None for line in lines(tmp_path)) == measured
        assert (summary["mean_gap"] is None) == (measured == 0)

    @pytest.mark.parametrize("algorithm", ["dana", "ssgd", "bmuf", "easgd"])
    def test_every_batch_is_used_whatever_does_not_divide(self, tmp_path, algorithm):
        """An epoch has 100 batches for 7 workers, and some algorithms lease 10 batches at a time."""
        summary = quadratic(tmp_path, algorithm, 7, "epochs=1", "lr=0.01")
        assert summary["epochs"] == 1.0


class TestTheSeedDecides:
    @pytest.mark.parametrize("algorithm", ["dana", "ssgd"])
    def test_every_bit(self, tmp_path, algorithm):
        """The seed also decides shuffling, the order of workers and augmentation."""
        files = []
        for name, seed in (("a", 5), ("b", 5), ("c", 6)):
            sets = [f"algorithm={algorithm}", "workers=4", "epochs=1", "threads=1", "augment=true", f"seed={seed}"]
            run_config(shipped("digits", *sets), tmp_path / name)
            files.append(
                [(tmp_path / name / file).read_bytes() for file in ("updates.jsonl", "parameters.safetensors")]
            )
        assert files[0] == files[1]
        assert files[0] != files[2]


class TestDivergence:
    @pytest.mark.parametrize("lr", ["1.0", "1e30", "1e38"])
    @pytest.mark.parametrize("algorithm", ["nag-asgd", "dana", "ssgd"])
    def test_it_is_a_result(self, tmp_path, algorithm, lr):
        """A run that diverges does not crash: figures are finite, files whole, updates fewer than planned."""
        summary = quadratic(tmp_path, algorithm, 8, f"lr={lr}")
        if algorithm == "nag-asgd" or float(lr) > 1:
            assert summary["diverged"] is True
            assert summary["diverged_because"]
            assert summary["updates"] < 400
        assert all(line["loss"] is not None for line in lines(tmp_path))
        assert (tmp_path / "parameters.safetensors").exists()

    @pytest.mark.parametrize("lr", ["1e4", "1e30"])
    def test_a_network_with_batch_norm(self, tmp_path, lr):
        """The running statistics of batch norm are not finite either."""
        sets = ["algorithm=dana", "workers=4", "epochs=1", f"lr={lr}", "lr_schedule.warmup_epochs=0", "threads=1"]
        summary = run_config(shipped("digits", *sets), tmp_path)
        assert summary["updates"] == len(lines(tmp_path))
        assert summary["diverged"] or summary["test_error_percent"] > 50


@pytest.mark.slow
def test_dana_holds_where_nag_asgd_breaks(tmp_path):
    """Train on real digits with 8 workers in block-random order, by the shipped config, which suits one worker."""
    errors = {}
    for algorithm, workers in (("baseline", 1), ("dana", 8), ("nag-asgd", 8)):
        config = shipped("digits", f"algorithm={algorithm}", f"workers={workers}")
        assert (config.schedule, config.momentum) == ("block-random", 0.9)
        errors[algorithm] = run_config(config, tmp_path / algorithm)["test_error_percent"]
    assert errors["baseline"] < 3
    assert errors["dana"] < errors["baseline"] + 2
    assert errors["nag-asgd"] > errors["baseline"] + 10


# ---- what cannot be run ----------------------------------------------------------------------------------------------


class TestNothingIsHalfWritten:
    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["-a", "dnaa"], "Did you mean 'dana'"),
            (["-n", "0"], "workers = 0 should be greater than or equal to 1"),
            (["--set", "momentum=1"], "momentum = 1 should be less than 1"),
            (["--set", "momentum=-1"], "momentum = -1 should be greater than -1"),
            (["--schedule", "constant:1,2"], "one speed above 0 for each of 8 workers"),
            (
                ["--schedule", "trace:{tmp}/trace.jsonl"],
                "names worker 8 and does not fit a run of 8 workers, numbered from 0; set workers to 9",
            ),
            (["--schedule", "trace:{tmp}/none"], "cannot read"),
            (["--set", "workload=cifar10-small", "--set", "data_dir={tmp}"], "Download it with"),
        ],
    )
    def test_the_reason_is_given(self, tmp_path, words, said):
        (tmp_path / "trace.jsonl").write_text('{"worker": 8}\n')
        words = [word.format(tmp=tmp_path) for word in words]
        command = ["simulate", str(CONFIGS / "digits.yaml"), *words, "--out", str(tmp_path / "run")]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2
        assert said in result.stderr
        assert not (tmp_path / "run").exists()

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
    def test_a_gpu_that_is_not_there(self, tmp_path):
        command = ["simulate", str(CONFIGS / "digits.yaml"), "--device", "cuda", "--out", str(tmp_path / "run")]
        result = CliRunner().invoke(app, command)
        assert (result.exit_code, (tmp_path / "run").exists()) == (2, False)
        assert "torch sees no GPU here" in result.stderr


# ---- the run folder ----------------------------------------------------------------------------------------------

UPDATE = Update(1, 0, 2, (0.1,), 0.5, "parameters", 1.5, 7)


class TestRunFolder:
    def test_several_groups_and_rounds_show_in_a_line(self, tmp_path):
        folder = RunWriter(tmp_path, {})
        folder.record(Update(1, 1, 0, (0.1, 0.2), None, "lookahead", None, 4, ((0, 3), (1, 4))))
        [line] = lines(tmp_path)
        assert (line["lr"], line["round"], line["gap"], line["loss"]) == ([0.1, 0.2], [[0, 3], [1, 4]], None, None)

    def test_a_folder_with_a_run_in_it_is_not_written_over(self, tmp_path):
        (tmp_path / "updates.jsonl").write_text("")
        with pytest.raises(RunFolderError, match="already holds a run"):
            free_run_folder(tmp_path, "x")

    def test_names_are_made_up_and_never_twice(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        folders = set()
        for _ in range(3):
            folders.add(folder := free_run_folder(None, "digits dana/8"))
            folder.mkdir(parents=True)
        assert len(folders) == 3
        assert all(folder.parent == Path("runs") for folder in folders)
        assert all("digits-dana-8" in folder.name for folder in folders)

    def test_a_file_is_whole_or_as_before(self, tmp_path, monkeypatch):
        path = tmp_path / "summary.json"
        write_atomically(path, b"before")

        def full_disk(fd: int) -> None:
            raise OSError(28, "no space left on device")

        monkeypatch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="no space"):
            write_atomically(path, b"after")
        assert path.read_bytes() == b"before"

    def test_a_kill_leaves_whole_lines(self, tmp_path):
        """SIGKILL hits the run in the middle, while each line is written as soon as it comes."""
        program = (
            "import sys, pathlib\n"
            "from danaz.run.config import load_config\n"
            "import danaz.run.folder, danaz.simulate.simulator as s\n"
            "danaz.run.folder.FLUSH_S = 0.0\n"
            "s.simulate(load_config(sys.argv[1], ['epochs=100000', 'threads=1']), pathlib.Path(sys.argv[2]))\n"
        )
        command = [sys.executable, "-c", program, str(CONFIGS / "quadratic.yaml"), str(tmp_path)]
        process = subprocess.Popen(command, cwd=CONFIGS.parent)
        try:
            updates = tmp_path / "updates.jsonl"
            deadline = time.monotonic() + 60
            while not (updates.exists() and updates.stat().st_size > 30_000):
                assert process.poll() is None, "the run ended before the kill"
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert updates.read_bytes().endswith(b"\n")
        records = lines(tmp_path)
        assert [line["version"] for line in records] == list(range(1, len(records) + 1))
        assert len(records) > 150
        assert not (tmp_path / "summary.json").exists()
