"""The learning rate that the cluster applies: the rate of the script or of the config, warmed up and scaled.

A config's rate steps down at its milestones (``Config.lr_at``); a script's rate is whatever its optimizer holds.
"""

from __future__ import annotations

from collections.abc import Sequence


def warmup_factor(epoch: float, workers: int, warmup_epochs: float) -> float:
    """Return the factor for the learning rate while a cluster warms up: it grows linearly from 1/N to 1.

    This is the gradual warm-up of Goyal et al. 2017 (*Accurate, Large Minibatch SGD*, section 2.2). They start a
    cluster of N at the rate η of one worker, and end at N·η. Here N small updates replace one large update, so the
    same ramp goes from η/N to η.

    Args:
        epoch: progress of the whole cluster in epochs, with a fraction; it grows with every update.
        workers: N, the number of workers. One worker needs no warm-up.
        warmup_epochs: length of the ramp in epochs of the cluster; 0 turns it off.
    """
    if workers == 1 or warmup_epochs == 0:
        return 1.0
    start = 1.0 / workers
    return start + (1.0 - start) * min(1.0, epoch / warmup_epochs)


def effective_lr(
    lr: Sequence[float], *, epoch: float, workers: int, warmup_epochs: float, scales_lr: bool
) -> list[float]:
    """Return the user's rates as the cluster applies them: warmed up and, for SSGD, times the number of workers."""
    factor = warmup_factor(epoch, workers, warmup_epochs) * (workers if scales_lr else 1)
    return [rate * factor for rate in lr]
