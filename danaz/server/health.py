"""Which workers are sick: their pushes are not finite, or far larger than those of the cluster.

The size of a push is compared with what the other workers pushed lately, so a single worker is never an outlier.
Whether the whole run diverges is judged by RunTotals.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import compress
from math import inf, isfinite, sqrt
from statistics import median_low
from typing import Any

import torch
from torch import Tensor

from danaz.protocol.messages import Push
from danaz.rules import Rule

OUTLIER_RATIO = 100.0  # largest honest ratio of a step to the others' median step
RECENT_PUSHES = 256  # pushes of the cluster that a size is compared with, refused ones included
RECENT_OF_EACH = 32  # of these, pushes that count for each worker, so that a fast worker has no larger say
ENOUGH_PUSHES = 20  # pushes of the others that it takes to judge a worker
HOPELESS_PUSHES = 32  # pushes of one worker refused in a row, after which a person should look at it


@dataclass
class Ailments:
    """What was wrong with the pushes of one worker, and what the run lost by it."""

    not_finite: int = 0  # pushes that are not finite, or whose update would not be
    outliers: int = 0  # pushes far larger than those of the others
    refused_pushes: int = 0  # pushes of both kinds that were refused
    dropped_batches: int = 0  # batches of refused pushes, which count as used but are in no update
    dropped_samples: int = 0  # samples of these batches


class PushHealth:
    """Counts the sick pushes of each worker, and calls ``on_notice`` once for each worker and ailment."""

    def __init__(self, on_notice: Callable[[str], None]):
        self._on_notice = on_notice
        self._ailments: dict[int, Ailments] = {}  # by worker; a worker without any is not in it
        self._sizes: deque[float] = deque(maxlen=RECENT_PUSHES)  # ‖push‖ of each recent push
        self._senders: deque[int] = deque(maxlen=RECENT_PUSHES)  # the worker that made each of them
        self._in_a_row: Counter[int] = Counter()  # by worker, its refused pushes since the last applied one

    def _of(self, worker: int) -> Ailments:
        return self._ailments.setdefault(worker, Ailments())

    def count_not_finite(self, worker: int) -> None:
        """Count a push that is not finite."""
        ailments = self._of(worker)
        ailments.not_finite += 1
        if ailments.not_finite == 1:
            self._on_notice(f"worker {worker} is sick: a push is not finite. Such pushes are refused, the run goes on")

    def judge(self, worker: int, size: float, refused: bool) -> bool:
        """Remember the size of a push, and count the push if it is an outlier; returns whether it is.

        ``refused`` says what becomes of outliers.
        """
        ratio = self._outlier_ratio(worker, size)
        self._sizes.append(size)
        self._senders.append(worker)
        if ratio is not None:
            self._count_outlier(worker, ratio, refused)
        return ratio is not None

    def _outlier_ratio(self, worker: int, size: float) -> float | None:
        """Return ``size`` over the usual size of the others' pushes; None if it is no outlier."""
        # Most pushes need no median: it is at least the smallest size.
        if size <= OUTLIER_RATIO * min(self._sizes, default=0.0):
            return None
        usual = self._usual_beside(worker)
        if usual is None or size <= OUTLIER_RATIO * usual:
            return None
        return size / usual if usual else inf

    def _count_outlier(self, worker: int, ratio: float, refused: bool) -> None:
        ailments = self._of(worker)
        ailments.outliers += 1
        if ailments.outliers == 1:
            fate = "refused" if refused else "applied (--refuse-outliers refuses them)"
            self._on_notice(
                f"worker {worker} may be sick: a push is {ratio:.3g} times the size "
                f"of the others'. Such pushes are {fate}, the run goes on"
            )

    def _usual_beside(self, worker: int) -> float | None:
        """Return the median size of the other workers' recent pushes; None while there are too few to judge by."""
        of_each: dict[int, list[float]] = {}
        for other, size in zip(self._senders, self._sizes, strict=True):
            if other != worker:
                of_each.setdefault(other, []).append(size)
        others = [size for sizes in of_each.values() for size in sizes[-RECENT_OF_EACH:]]
        return median_low(others) if len(others) >= ENOUGH_PUSHES else None

    def forget(self, worker: int) -> None:
        """Stop comparing others with what ``worker``, which is gone, has pushed."""
        of_others = [sender != worker for sender in self._senders]
        self._sizes = deque(compress(self._sizes, of_others), maxlen=RECENT_PUSHES)
        self._senders = deque(compress(self._senders, of_others), maxlen=RECENT_PUSHES)
        del self._in_a_row[worker]

    def count_refused(self, push: Push) -> int:
        """Count what the run loses by a refused sick push. Return how many of the worker's were refused in a row."""
        worker, ailments = push.worker, self._of(push.worker)
        ailments.refused_pushes += 1
        ailments.dropped_batches += len(push.batches)
        ailments.dropped_samples += max(0, push.samples)
        self._in_a_row[worker] += 1
        if self._in_a_row[worker] == HOPELESS_PUSHES:
            self._on_notice(
                f"worker {worker}: its last {HOPELESS_PUSHES} pushes were all refused, and their batches are in no "
                "update. Look at that machine; sick_workers in summary.json counts what is lost"
            )
        return self._in_a_row[worker]

    def count_applied(self, worker: int) -> None:
        """Count the refused pushes of ``worker`` in a row from zero again, as one of its pushes was applied."""
        del self._in_a_row[worker]

    def summary(self) -> dict[str, dict[str, int]]:
        """Return the ailments of each worker that had any, by its number as a text."""
        return {str(worker): asdict(ailments) for worker, ailments in sorted(self._ailments.items())}

    def restore(self, summary: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over the counts of a summary. The notices of the workers in it were given before."""
        self._ailments = {int(worker): Ailments(**counts) for worker, counts in summary.items()}


def measured(push: Push) -> Push:
    """Return ``push`` with the sum of its squares, computed once for all who need it."""
    if push.square is not None:
        return push
    return replace(push, square=torch.dot(push.push, push.push).item())


def norm_of(push: Push) -> float:
    """Return ‖push‖₂; infinity if its square does not fit into float32."""
    square = measured(push).square
    assert square is not None
    return sqrt(square) if isfinite(square) else inf


def size_of(push: Push, rule: Rule, params: Tensor) -> float:
    """Return ‖push‖₂ on the scale of a gradient.

    A displacement is divided by its rate; pushed parameters count by their distance from ours, over the rate.
    """
    moved = rule.pushes == "parameters"
    norm = torch.linalg.vector_norm(push.push - params).item() if moved else norm_of(push)
    lr = 1.0 if rule.pushes == "gradient" else max(push.lr)
    return norm / lr if lr > 0 else 0.0
