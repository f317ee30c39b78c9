"""`danaz compare`: which cells a comparison has, how they run, and that finished cells survive a stop."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
import yaml
from shipped import CONFIGS

from danaz.cli.compare import compare
from danaz.compare import pool as pool_module
from danaz.compare.cells import ComparisonError, is_plan, make_comparison, make_grid, read_plan
from danaz.compare.display import Lines, OverallProgress
from danaz.compare.folder import ComparisonFolder
from danaz.compare.machine import available_bytes, cores, resident_bytes
from danaz.rules import UnknownAlgorithmError
from danaz.run.config import ConfigError, load_config

QUADRATIC = CONFIGS / "quadratic.yaml"


def compare_cells(overrides=(), **grid):
    return make_comparison(QUADRATIC, [make_grid("the grid", grid)], overrides)


def names(comparison):
    return [cell.name for cell in comparison.cells]


# ---- cells -------------------------------------------------------------------------------------------------------


def test_with_one_worker_every_algorithm_is_the_baseline():
    comparison = compare_cells(algorithms=["ssgd", "dana"], workers=[1, 4], seeds=2)
    assert names(comparison) == [
        "baseline-1-seed0",
        "ssgd-4-block-random-seed0",
        "dana-4-block-random-seed0",
        "baseline-1-seed1",
        "ssgd-4-block-random-seed1",
        "dana-4-block-random-seed1",
    ]
    dana = comparison.cells[5].config
    assert (dana.algorithm, dana.workers, dana.seed) == ("dana", 4, 1)


def test_the_baseline_enters_once_whatever_the_workers():
    assert names(compare_cells(algorithms=["baseline"], workers=[4, 8], schedule="round-robin")) == ["baseline-1-seed0"]


def test_workers_default_to_one_and_those_of_the_config():
    assert names(compare_cells(algorithms=["dana"])) == ["baseline-1-seed0", "dana-8-block-random-seed0"]


def test_seeds_count_from_that_of_the_config():
    comparison = compare_cells(["seed=7"], algorithms=["dana"], workers=[2], seeds=2)
    assert [cell.config.seed for cell in comparison.cells] == [7, 8]


def test_a_live_cell_gets_its_workers_from_the_hosts():
    [cell] = compare_cells(algorithms=["dana"], hosts="localhost:4", workers_per_host=2, collective="torch").cells
    assert cell.name == "dana-live-2x2-seed0"
    assert cell.facts() == {
        "algorithm": "dana",
        "workers": 2,
        "ranks_per_worker": 2,
        "schedule": "live",
        "seed": 0,
    }


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ({"algorithms": ["dana"], "workers": [4, 0]}, "workers should be 1 or more each, not 4, 0"),
        ({"algorithms": ["dana"], "workers": ["four"]}, "workers.0 = 'four'"),
        ({"algorithms": ["dana"], "seeds": 0}, "seeds = 0"),
        ({"algorithms": []}, "algorithms = []"),
        ({"algorithms": ["dana"], "hosts": "localhost:4", "workers": [4]}, "from hosts and workers_per_host"),
        ({"algorithms": ["dana"], "hosts": "localhost:4", "hostfile": "hosts"}, "either hosts or a hostfile"),
        ({"algorithms": ["dana"], "worker": [4]}, "unknown key 'worker'"),
        ("dana", "expected keys and values, found 'dana'"),
    ],
)
def test_a_bad_grid_is_refused_with_the_place_and_the_reason(grid, said):
    with pytest.raises(ComparisonError) as refusal:
        make_grid("demo.yaml, cell 2", grid)
    assert str(refusal.value).startswith("demo.yaml, cell 2: ")
    assert said in str(refusal.value)


def test_an_unknown_algorithm_is_refused_with_the_nearest():
    with pytest.raises(UnknownAlgorithmError, match="Did you mean 'dana'"):
        compare_cells(algorithms=["ssgd", "danna"])


def test_more_workers_than_an_algorithm_takes_are_refused_before_anything_runs():
    with pytest.raises(ValueError, match="baseline trains on 1 worker, 4 were asked for"):
        compare_cells(algorithms=["baseline"], hosts="localhost:4", workers_per_host=4, collective="torch")


def test_what_is_compared_cannot_be_set_too():
    with pytest.raises(ConfigError, match="cells are compared by this key"):
        compare_cells(["workers=4"], algorithms=["dana"])


def test_the_demo_is_a_plan_of_live_and_simulated_cells():
    assert is_plan(CONFIGS / "demo.yaml")
    assert not is_plan(QUADRATIC)
    demo = read_plan(CONFIGS / "demo.yaml")
    assert names(demo) == [
        "ssgd-live-4x1-seed0",
        "dana-live-4x1-seed0",
        "nag-asgd-live-4x1-seed0",
        "dana-live-2x2-seed0",
        "baseline-1-seed0",
        "ssgd-8-block-random-seed0",
        "dana-8-block-random-seed0",
        "nag-asgd-8-block-random-seed0",
    ]
    assert len(read_plan(CONFIGS / "demo.yaml", seeds=2).cells) == 16


def test_a_plan_with_other_keys_is_refused(tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text("cells: []\nexperiment: digits.yaml\n")
    with pytest.raises(ComparisonError, match=r"expected the keys config .* found cells, experiment"):
        read_plan(plan)


# ---- the folder --------------------------------------------------------------------------------------------------


def test_cells_of_earlier_calls_are_remembered(tmp_path):
    folder = ComparisonFolder(tmp_path)
    for workers in ([4], [2, 4]):
        with folder.opened_for(compare_cells(algorithms=["dana"], workers=workers)):
            pass
    index = yaml.safe_load((tmp_path / "comparison.yaml").read_text())
    assert index["cells"] == ["dana-4-block-random-seed0", "dana-2-block-random-seed0"]


def test_another_config_is_refused_and_fresh_begins_anew(tmp_path):
    folder = ComparisonFolder(tmp_path, has_fresh=True)
    before = compare_cells(algorithms=["dana"], workers=[4])
    with folder.opened_for(before):
        folder.begin(before.cells[0])
    now = compare_cells(["lr=0.01", "threads=2"], algorithms=["dana"], workers=[4])
    with pytest.raises(ComparisonError, match=r"lr: 0.05 -> 0.01.*--fresh"), folder.opened_for(now):
        pass
    assert folder.cell("dana-4-block-random-seed0").exists()
    with folder.opened_for(now, fresh=True):
        assert not folder.cell("dana-4-block-random-seed0").exists()


def test_what_does_not_change_the_runs_may_change(tmp_path):
    folder = ComparisonFolder(tmp_path)
    for overrides in ([], ["threads=2"], ["gap=off"]):
        with folder.opened_for(compare_cells(overrides, algorithms=["dana"], workers=[4])):
            pass


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    comparison = compare_cells(algorithms=["dana"])
    with pytest.raises(ComparisonError, match="holds no comparison"), ComparisonFolder(tmp_path).opened_for(comparison):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_at_a_time_in_one_folder_are_refused(tmp_path):
    comparison = compare_cells(algorithms=["dana"])
    with (
        ComparisonFolder(tmp_path).opened_for(comparison),
        pytest.raises(ComparisonError, match="is running in"),
        ComparisonFolder(tmp_path).opened_for(comparison),
    ):
        pass


def test_a_half_finished_cell_is_begun_anew(tmp_path):
    folder = ComparisonFolder(tmp_path)
    [cell] = compare_cells(algorithms=["dana"], workers=[4]).cells
    with folder.opened_for(compare_cells(algorithms=["dana"], workers=[4])):
        run = folder.begin(cell)
        (run / "updates.jsonl").write_text('{"version": 1')
        assert not folder.is_finished(cell)
        assert {file.name for file in folder.begin(cell).iterdir()} == {"config.yaml", ".run.lock"}
        assert load_config(run / "config.yaml").digest() == cell.config.digest()
        (run / "summary.json").write_text("{}")
        assert folder.is_finished(cell)


# ---- the machine -------------------------------------------------------------------------------------------------


def test_the_machine_is_measured():
    assert cores() >= 1
    assert resident_bytes(os.getpid()) > 1 << 20
    assert available_bytes() > 1 << 20


def test_what_running_cells_have_yet_to_take_counts_against_the_next(monkeypatch, tmp_path):
    class Running:
        process = subprocess.CompletedProcess([], 0)

    Running.process.pid = 0
    pool = pool_module.Pool([], ComparisonFolder(tmp_path), 8, Lines(1))
    pool.need_bytes = 1000
    monkeypatch.setattr(pool_module, "resident_bytes", lambda pid: 400)
    cases = ((0, 0, True), (1, 1500, False), (1, 1700, True), (2, 2100, False), (2, 2300, True))
    for running, available, room in cases:
        pool.children = [Running()] * running
        monkeypatch.setattr(pool_module, "available_bytes", lambda available=available: available)
        assert pool.has_room() is room
    pool.selector.close()


def test_time_to_go_counts_what_running_cells_have_done(monkeypatch):
    cells = compare_cells(algorithms=["dana"], workers=[2, 4, 8, 16]).cells
    progress = OverallProgress(4)
    assert progress.left_s is None
    progress.running[cells[0].name] = 0.5
    progress.end(cells[0])
    progress.running[cells[1].name] = 0.6
    progress.began_s = time.monotonic() - 16
    assert progress.left_s == pytest.approx(24, abs=0.5)  # 1.6 of 4 cells took 16 s


# ---- the command -------------------------------------------------------------------------------------------------


def start(*words, out: Path, **popen) -> subprocess.Popen:
    command = [sys.executable, "-m", "danaz", "compare", *map(str, words), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen)


def run(*words, out: Path) -> tuple[int, str, str]:
    process = start(*words, out=out)
    stdout, stderr = process.communicate(timeout=100)
    return process.returncode, stdout, stderr


def summaries(out: Path) -> dict[str, int]:
    """Return {name of a finished cell: time at which it was finished, in ns}."""
    return {file.parent.name: file.stat().st_mtime_ns for file in out.glob("cells/*/summary.json")}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_comparison_end_to_end_without_a_terminal(tmp_path):
    out = tmp_path / "c"
    code, stdout, stderr = run(QUADRATIC, "-a", "ssgd,dana", "-n", "1,2,4", "--seeds", "2", "-j", "2", out=out)
    assert code == 0, stderr
    assert len(summaries(out)) == 10
    assert "\x1b" not in stdout + stderr
    assert "[10/10] " in stderr
    assert "simulated 4, block-random" in stdout
    assert str(out / "report.html") in stdout
    figures = [json.loads(file.read_text()) for file in out.glob("cells/dana-4-*/summary.json")]
    mean = sum(each["final_train_loss"] for each in figures) / 2
    assert f"{mean:.4f} ± " in stdout
    assert (out / "error-by-workers.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_comparison_goes_on_where_it_was(tmp_path):
    out = tmp_path / "c"
    words = (QUADRATIC, "-a", "dana", "-n", "2", "--seeds", "4", "-j", "1", "--set", "epochs=30")
    process = start(*words, out=out)
    while len(summaries(out)) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finished = summaries(out)
    assert 2 <= len(finished) < 4
    wait_for_the_end_of(children)
    code, stdout, stderr = run(*words, out=out)
    assert code == 0, stderr
    assert f"finished before: {len(finished)} of 4" in stdout
    after = summaries(out)
    assert len(after) == 4
    assert finished.items() <= after.items()
    code, _, stderr = run(*words[:-1], "epochs=31", out=out)
    assert code == 2
    assert "epochs: 30 -> 31" in stderr
    assert summaries(out) == after


def wait_for_the_end_of(pids: list[str]) -> None:
    """Wait until processes that are not our children have ended: until they are gone or zombies."""
    assert pids
    deadline = time.monotonic() + 30
    for pid in pids:
        status = Path(f"/proc/{pid}/status")
        while status.exists() and "State:\tZ" not in status.read_text():
            assert time.monotonic() < deadline, f"process {pid} outlives its parent"
            time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ctrl_c_reports_what_there_is_and_ends_all_processes(tmp_path):
    out = tmp_path / "c"
    process = start(QUADRATIC, "-a", "dana", "-n", "2", "--seeds", "9", "-j", "1", "--set", "epochs=30", out=out)
    while not summaries(out):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command continues with them" in stdout
    assert (out / "report.html").exists()
    wait_for_the_end_of(children)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_cell_that_breaks_does_not_break_the_comparison(tmp_path):
    """A trace of eight workers fits a run of eight, but not one of four."""
    trace = tmp_path / "updates.jsonl"
    trace.write_text("".join(json.dumps({"worker": worker}) + "\n" for worker in range(8)))
    out = tmp_path / "c"
    words = (QUADRATIC, "-a", "dana", "-n", "4,8", "--schedule", f"trace:{trace}")
    code, stdout, stderr = run(*words, out=out)
    assert code == 1
    assert len(summaries(out)) == 1
    assert "FAILED" in stdout
    assert "does not fit a run of 4 workers" in " ".join(stdout.split())
    [logs] = [line.split(": ")[1] for line in stdout.splitlines() if "its logs" in line]
    assert "Traceback" in (Path(logs) / "localhost" / "simulation" / "stderr").read_text()
    assert "[2/2]" in stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_live_algorithms_side_by_side(tmp_path):
    out = tmp_path / "c"
    words = ("--live", "--hosts", "localhost:2", "--workers-per-host", "2", "--collective", "torch")
    code, stdout, stderr = run(QUADRATIC, "-a", "ssgd,dana", *words, out=out)
    assert code == 0, stderr
    assert set(summaries(out)) == {"ssgd-live-2x1-seed0", "dana-live-2x1-seed0"}
    assert "live 2×1" in stdout
    summary = json.loads((out / "cells" / "dana-live-2x1-seed0" / "summary.json").read_text())
    assert summary["schedule"] == "live"
    assert summary["collective"] == "torch"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((CONFIGS / "demo.yaml", "--workers", "4"), "lists its cells itself"),
        ((QUADRATIC, "--live"), "--live and --hosts or --hostfile belong together"),
        ((QUADRATIC, "--hosts", "localhost:4"), "--live and --hosts or --hostfile belong together"),
        ((QUADRATIC, "--workers-per-host", "2"), "are for --live"),
        ((CONFIGS / "quadratik.yaml",), "no such config file"),
        ((QUADRATIC, "--schedule", "block-randm"), "did you mean 'block-random'"),
    ],
)
def test_a_bad_call_is_refused_and_leaves_nothing(words, said, tmp_path, capsys):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(compare)
    with pytest.raises(SystemExit) as end:
        app([*map(str, words), "--out", str(tmp_path / "c")])
    assert end.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
