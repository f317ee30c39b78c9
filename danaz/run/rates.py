"""The learning rate at a point of a run: the rate of a script or of a config, warmed up and scaled.

A config's rate steps down at its milestones; a script's rate is whatever its optimizer holds. The cluster applies
either one warmed up and, for SSGD, scaled with the number of workers. The user's API, the loop that trains a config and
the simulator all ask here, so this module lies below them, beside the config.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import TYPE_CHECKING

from danaz.run.config import Config

if TYPE_CHECKING:
    from danaz.optimizers import Optimizers
    from danaz.rules import Rule


def lr_at(config: Config, epoch: float) -> float:
    """Return the rate of a config at a fractional epoch of the cluster: with its steps, without warm-up."""
    steps_done = sum(epoch >= milestone for milestone in config.lr_schedule.milestones)
    return config.lr * config.lr_schedule.factor**steps_done


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


def scaling_factor(scaling: str, workers: int, *, is_adaptive: bool) -> float:
    """Return what a synchronous cluster of N multiplies the learning rate by, for its batches are N times as large.

    SGD takes N (Goyal et al. 2017: linear scaling). An optimizer that divides by the root of squared gradients takes
    √N: the noise of the mean gradient, and with it the length of a step, goes down with √N (Malladi et al., *On the
    SDEs and Scaling Rules for Adaptive Gradient Algorithms*, NeurIPS 2022).

    Args:
        scaling: linear, sqrt, none, or auto, which is linear or, if ``is_adaptive``, sqrt.
        workers: N, the number of workers.
        is_adaptive: whether the steps of the optimizer have a size for each parameter.
    """
    rule = {"auto": "sqrt" if is_adaptive else "linear"}.get(scaling, scaling)
    return {"linear": float(workers), "sqrt": sqrt(workers), "none": 1.0}[rule]


def lr_scale(rule: Rule, optimizers: Optimizers, scaling: str, workers: int) -> float:
    """Return what a cluster multiplies the learning rate by under ``rule``: 1, unless the rule scales with N."""
    return scaling_factor(scaling, workers, is_adaptive=optimizers.is_adaptive) if rule.scales_lr else 1.0


def effective_lr(lr: Sequence[float], *, epoch: float, workers: int, warmup_epochs: float, scale: float) -> list[float]:
    """Return the user's rates as the cluster applies them: warmed up, and times ``scale``, which only SSGD has."""
    factor = warmup_factor(epoch, workers, warmup_epochs) * scale
    return [rate * factor for rate in lr]
