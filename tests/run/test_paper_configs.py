"""The plans for the papers' tables can be read, and hold the cells of those tables."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from danaz.compare.cells import read_plan
from danaz.workloads.cifar10_wrn16_4 import WideResNet

PLANS = sorted((Path(__file__).parents[2] / "configs" / "paper").glob("*.yaml"))


@pytest.mark.parametrize("plan", PLANS, ids=lambda path: path.stem)
def test_a_plan_holds_one_baseline_and_every_algorithm(plan: Path) -> None:
    cells = read_plan(plan).cells
    assert {cell.config.algorithm for cell in cells} == {"baseline", "dana", "nag-asgd", "multi-asgd", "asgd", "ssgd"}
    assert {cell.config.workers for cell in cells if cell.config.algorithm == "baseline"} == {1}
    assert all(cell.cluster is None for cell in cells)


def test_table_4_is_the_papers() -> None:
    cells = read_plan(PLANS[0].with_name("table4.yaml")).cells
    config = cells[0].config
    assert (config.epochs, config.batch_size, config.lr, config.momentum) == (160, 128, 0.1, 0.9)
    assert config.lr_schedule.milestones == (80, 120)
    assert {cell.config.workers for cell in cells} == {1, 4, 8, 16, 24, 32}
    assert {cell.config.seed for cell in cells} == {0, 1, 2, 3, 4}


def test_wide_resnet_takes_the_number_of_classes_of_its_data() -> None:
    linear = WideResNet(num_classes=100).linear
    assert isinstance(linear, nn.Linear)
    assert linear.out_features == 100
