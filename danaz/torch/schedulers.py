"""torch's learning-rate schedulers, moved by the cluster's progress.

A script steps its scheduler after each of its own batches, or after each epoch. Each of N workers computes only about
1/N of the batches, but the schedule was tuned for the whole run. So if a scheduler is stepped within the loop over
batches, danaz brings it to where it would be if this worker had made all the cluster's steps. For that, danaz calls
`step()` as many times as it takes, which is right for every scheduler, whatever it computes its rates from. A scheduler
that is stepped between epochs already follows the cluster, because the epochs are the cluster's. A worker that comes
back in the middle of a run catches up on the epochs that are over.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import isclose
from typing import Any, Protocol

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau


class UnsupportedSchedulerError(TypeError):
    """This scheduler cannot follow the cluster's progress."""


class Clock(Protocol):
    """How far the cluster and this worker are."""

    in_loop: bool  # whether the script is in the loop over batches
    own_batches: int  # number of batches that this process has computed

    @property
    def epoch(self) -> float:
        """The cluster's epoch."""

    @property
    def epochs_over(self) -> int:
        """Number of epochs that were over before this worker's first."""

    @property
    def ticks(self) -> float:
        """Number of batches that the cluster has computed, counted in batches of the script's own loader."""


@dataclass
class _Follower:
    """One scheduler, and how far it has been moved."""

    clock: Clock
    moved: int = 0  # number of steps since the process began
    calls: int = 0  # number of calls that the script made in the loop over batches

    def step(self, scheduler: LRScheduler, step: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        clock = self.clock
        if args or kwargs:
            step(scheduler, *self._explicit(scheduler, *args, **kwargs))
            return
        if not clock.in_loop:
            self._move(scheduler, step, 1)
            return
        self.calls += 1
        # For example, a script may step at every second batch. The whole cluster's steps then count in the same way.
        calls_per_batch = min(1.0, self.calls / max(1, clock.own_batches))
        early = self.calls > clock.own_batches  # whether the script calls it before the optimizer's step
        target = int(clock.ticks * calls_per_batch + 1e-6) + early
        self._move(scheduler, step, max(0, target - self.moved))

    def catch_up(self, scheduler: LRScheduler, step: Callable[..., None]) -> None:
        self._move(scheduler, step, self.clock.epochs_over)

    def _move(self, scheduler: LRScheduler, step: Callable[..., None], steps: int) -> None:
        self.moved += steps
        # torch expects a step of the optimizer first, but so far only the other workers may have had batches.
        with nullcontext() if self.clock.own_batches else _no_warning_of_a_missing_step():
            for _ in range(steps):
                step(scheduler)

    def _explicit(self, scheduler: LRScheduler, epoch: float | None = None) -> tuple[float | None]:
        """Return the epoch to step to when the script has given one, which it may have counted by its own batches.

        Raises UnsupportedSchedulerError for a whole number that is not the cluster's epoch.
        """
        own = epoch is not None and self.clock.in_loop and not isclose(epoch, self.clock.epoch, abs_tol=1e-6)
        if own and epoch != int(epoch or 0):
            return (self.clock.epoch,)  # fractional epochs, which for example CosineAnnealingWarmRestarts takes
        if own:
            raise UnsupportedSchedulerError(
                f"{type(scheduler).__name__}.step({epoch}) was called within the loop over batches, where the cluster "
                f"is in epoch {self.clock.epoch:.3g}, which this worker's own batches do not tell. Call step() without "
                "an argument, or step(danaz.progress())"
            )
        return (epoch,)


@contextmanager
def _no_warning_of_a_missing_step() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
        yield


_followers: weakref.WeakKeyDictionary[LRScheduler, _Follower] = weakref.WeakKeyDictionary()


def follow(optimizers: Sequence[Optimizer], clock: Clock, *, one_worker: bool) -> None:
    """Let all schedulers of these optimizers follow ``clock``, and catch up on epochs that are over.

    A scheduler belongs to an optimizer if it sets the rates of its groups, although it may be made for a wrapper.
    Raises UnsupportedSchedulerError for a scheduler that cycles the momentum, or that each of several workers would
    feed with its own figure.
    """
    found = [each for each in gc.get_objects() if issubclass(type(each), LRScheduler)]
    groups = {id(group) for each in optimizers for group in each.param_groups}
    inner = {id(part) for each in found for part in getattr(each, "_schedulers", ())}
    for scheduler in found:
        if id(scheduler) in inner or not any(id(group) in groups for group in scheduler.optimizer.param_groups):
            continue
        name = type(scheduler).__name__
        if getattr(scheduler, "cycle_momentum", False):
            raise UnsupportedSchedulerError(
                f"{name} cycles the momentum, but the cluster looks ahead along one momentum for the whole run. Make "
                f"it {name}(…, cycle_momentum=False)"
            )
        if isinstance(scheduler, ReduceLROnPlateau):
            if not one_worker:
                raise UnsupportedSchedulerError(
                    "ReduceLROnPlateau would see another figure on each worker, and their rates would drift apart. "
                    "Use a scheduler that depends on the epoch alone, such as MultiStepLR or CosineAnnealingLR"
                )
            continue
        _follow(scheduler, clock)


def _follow(scheduler: LRScheduler, clock: Clock) -> None:
    if scheduler in _followers:
        return
    kind = type(scheduler)
    follower = _followers[scheduler] = _Follower(clock)

    def step(self: LRScheduler, *args: Any, **kwargs: Any) -> None:
        _followers[self].step(self, kind.step, *args, **kwargs)

    # The new step belongs to a new class, because an attribute of the object would become part of its state_dict().
    scheduler.__class__ = type(kind.__name__, (kind,), {"step": step, "__module__": kind.__module__})
    follower.catch_up(scheduler, kind.step)
