"""Which workers are sick: their pushes are not finite, or far outside the cluster's size.

A worker's size is compared with the others', so one worker alone is never an outlier; what diverges as a whole is the
affair of Figures.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from math import sqrt
from statistics import median_low
from typing import Any

import torch
from torch import Tensor

from danaz.rules import Rule
from danaz.server.messages import Push

OUTLIER_RATIO = 100.0  # between a step and the others' median step: no honest batch differs by so much
RECENT_PUSHES = 32  # of each worker, that its size is judged by
ENOUGH_PUSHES = 20  # of the others, before anyone is judged


class Health:
    """Counts what sick workers push. ``on_notice`` hears of each worker and each ailment once."""

    def __init__(self, on_notice: Callable[[str], None]):
        self.not_finite: Counter[int] = Counter()  # pushes of each worker
        self.outliers: Counter[int] = Counter()
        self._on_notice = on_notice
        self._sizes: dict[int, deque[float]] = {}  # of each worker's recent pushes

    def saw_not_finite(self, worker: int) -> None:
        self.not_finite[worker] += 1
        if self.not_finite[worker] == 1:
            self._on_notice(f"worker {worker} is sick: a push is not finite. Such pushes are refused, the run goes on")

    def is_outlier(self, worker: int, size: float, refused: bool) -> bool:
        """Whether a push of this size is far outside those of the other workers; counts it if so."""
        others = [each for other, sizes in self._sizes.items() if other != worker for each in sizes]
        self._sizes.setdefault(worker, deque(maxlen=RECENT_PUSHES)).append(size)
        if len(others) < ENOUGH_PUSHES or size <= OUTLIER_RATIO * (usual := median_low(others)):
            return False
        self.outliers[worker] += 1
        if self.outliers[worker] == 1:
            fate = "refused" if refused else "applied (--refuse-outliers refuses them)"
            self._on_notice(
                f"worker {worker} may be sick: a push is {size / usual if usual else float('inf'):.3g} times the size "
                f"of the others'. Such pushes are {fate}, the run goes on"
            )
        return True

    def summary(self) -> dict[str, dict[str, int]]:
        """Worker -> what it pushed and how often."""
        return {
            str(worker): {"not_finite": self.not_finite[worker], "outliers": self.outliers[worker]}
            for worker in sorted({*self.not_finite, *self.outliers})
        }

    def restore(self, summary: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over the counts of a summary; who is named in it was announced already."""
        for worker, counts in summary.items():
            self.not_finite[int(worker)], self.outliers[int(worker)] = counts["not_finite"], counts["outliers"]


def size_of(push: Push, rule: Rule, params: Tensor) -> float:
    """‖push‖₂ as that of a gradient: a displacement without its rate, parameters by how far they are from ours."""
    if rule.pushes == "parameters":
        norm = float(torch.linalg.vector_norm(push.push - params))
    elif push.square is not None:
        norm = sqrt(push.square)
    else:
        norm = float(torch.linalg.vector_norm(push.push))
    lr = 1.0 if rule.pushes == "gradient" else max(push.lr)
    return norm / lr if lr > 0 else 0.0
