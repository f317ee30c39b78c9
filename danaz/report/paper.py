"""Figures from the papers, which reports show beside ours if the experiment is the same.

DANA: Hakimi et al., arXiv 1907.11612. Gap-Aware: Barkai et al., ICLR 2020, arXiv 1909.10802.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from danaz.compare.results import Setting

RESNET20_CIFAR10 = {
    "workload": "cifar10-resnet20",
    "epochs": 160,
    "batch_size": 128,
    "lr": 0.1,
    "momentum": 0.9,
    "lr_schedule": {"milestones": [80, 120], "factor": 0.1},
}


@dataclass(frozen=True)
class Paper:
    """Test errors in percent (means over seeds) of one experiment with one order of workers."""

    source: str
    experiment: Mapping[str, Any]  # config keys with the paper's values
    schedule: str  # the config key
    baseline: float  # test error with one worker
    errors: Mapping[str, Mapping[int, float]]  # algorithm -> number of workers -> test error

    def error(self, algorithm: str, setting: Setting) -> float | None:
        """Return the paper's figure for an algorithm in a setting, if it has one."""
        if setting.is_baseline:
            return self.baseline
        return self.errors.get(algorithm, {}).get(setting.workers) if setting.schedule == self.schedule else None


DANA = Paper(
    source="DANA paper (mean of 5)",
    experiment=RESNET20_CIFAR10,
    schedule="block-random",
    baseline=8.37,
    errors={
        "asgd": {4: 10.68, 8: 11.07, 16: 11.20, 24: 11.62, 32: 12.26},
        "nag-asgd": {4: 8.56, 8: 9.12, 16: 50.50, 24: 90.00, 32: 81.49},
        "multi-asgd": {4: 8.50, 8: 8.76, 16: 12.94, 24: 71.05, 32: 90.00},
        "ssgd": {4: 9.18, 8: 9.65, 16: 9.84, 24: 10.52, 32: 12.15},
        "dana": {4: 8.38, 8: 8.51, 16: 8.76, 24: 9.28, 32: 11.90},
        "dana-zero": {24: 9.43},
    },
)

# The paper gives accuracies.
GAP_AWARE = Paper(
    source="Gap-Aware paper",
    experiment=RESNET20_CIFAR10,
    schedule="gamma",
    baseline=round(100 - 92.43, 2),
    errors={
        algorithm: {16: round(100 - at_16, 2), 32: round(100 - at_32, 2)}
        for algorithm, at_16, at_32 in (
            ("sa", 88.93, 85.59),
            ("dana-sa", 89.48, 87.64),
            ("nag-asgd", 10.0, 10.0),
            ("ga", 89.59, 87.92),
            ("asgd", 89.82, 88.3),
            ("dana", 89.68, 27.6),
            ("dana-ga", 91.98, 91.15),
        )
    },
)

# Measured in the DANA paper: ResNet-20 on V100s with one server.
MEASURED_SPEEDUP: Mapping[int, float] = {24: 16.0}  # number of workers -> speed-up over one


def papers_of(config: Mapping[str, Any]) -> list[Paper]:
    """Return the papers that ran the experiment of this config."""
    return [paper for paper in (DANA, GAP_AWARE) if _agrees(paper.experiment, config)]


def _agrees(wanted: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    return all(
        _agrees(value, config.get(key) or {}) if isinstance(value, Mapping) else config.get(key) == value
        for key, value in wanted.items()
    )
