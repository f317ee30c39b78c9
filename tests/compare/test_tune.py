"""A grid over learning rate and momentum, from the simulations to the heat map."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from torch import nn

from danaz.cli.output import print_tuning
from danaz.compare.tune import Tuning, tune
from danaz.report.heat_map import write_tuning
from danaz.run.config import load_config
from danaz.workloads.train import make_optimizer

QUADRATIC = Path(__file__).parents[2] / "configs" / "quadratic.yaml"


@pytest.fixture(scope="module")
def tuning(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tuning, Path]:
    config = load_config(QUADRATIC, ["algorithm=nag-asgd", "workers=4"])
    folder = tmp_path_factory.mktemp("tune")
    return tune(config, [0.01, 0.05], [-0.3, 0.9], folder, jobs=2), folder


def test_every_point_is_a_run_and_the_best_is_found(tuning: tuple[Tuning, Path]) -> None:
    found, _ = tuning
    assert found.failures == {}
    assert found.measure.key == "final_train_loss"
    figures = {point: found.figure(*point) for point in found.summaries}
    assert len(figures) == 4
    # Without look-ahead, a larger rate slows four workers down at momentum 0.9, and speeds them up at a negative one.
    assert found.best == min(figures, key=lambda point: figures[point] or 0) == (0.01, 0.9)
    assert (figures[0.05, -0.3] or 0) < (figures[0.01, -0.3] or 0)


def test_finished_points_are_kept(tuning: tuple[Tuning, Path]) -> None:
    found, folder = tuning
    before = {file: file.stat().st_mtime_ns for file in folder.glob("cells/*/summary.json")}
    again = tune(found.config, [0.01, 0.05], [-0.3, 0.9], folder)
    assert again.summaries == found.summaries
    assert {file: file.stat().st_mtime_ns for file in folder.glob("cells/*/summary.json")} == before


def test_table_and_files(tuning: tuple[Tuning, Path], capsys: pytest.CaptureFixture[str]) -> None:
    found, folder = tuning
    print_tuning(found)
    assert "best: lr 0.01, momentum 0.9" in capsys.readouterr().out
    files = write_tuning(found, folder)
    assert [file.name for file in files] == ["tune.csv", "tune.png", "tune.svg"]
    rows = list(csv.DictReader(files[0].read_text().splitlines()))
    assert {(float(row["lr"]), float(row["momentum"])) for row in rows} == set(found.summaries)
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_momentum_may_be_negative() -> None:
    config = load_config(QUADRATIC, ["momentum=-0.5"])
    [group] = make_optimizer(nn.Linear(2, 1), config).param_groups
    assert (group["momentum"], group["nesterov"]) == (-0.5, True)
