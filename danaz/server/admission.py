"""What the server asks of a message before it may change anything: each function returns why not, or nothing."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import chain, pairwise
from math import inf, isfinite

import torch

from danaz.protocol.messages import (
    MAX_AHEAD,
    MAX_REPORTED,
    MAX_WORKERS,
    TOO_MANY_REPORTED,
    Bye,
    Heartbeat,
    Join,
    Leave,
    Plan,
    Push,
    Report,
    Request,
)
from danaz.protocol.refusals import NEWER_JOINED, NOT_FINITE
from danaz.server.leases import Leases
from danaz.server.members import Member
from danaz.server.settings import ServerSettings
from danaz.server.whole import WholeModel, own_part
from danaz.vectors.cutting import all_finite
from danaz.vectors.flat import Layout

MAX_LR = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Job:
    """What all workers of a run agree on; the first to join brings it."""

    layout: Layout
    plan: Plan
    momentum: float


def is_worth_receiving(
    message: Request,
    settings: ServerSettings,
    job: Job | None,
    whole: WholeModel | None,
    member: Member | None,
    needs_params: bool,
) -> bool:
    """Whether the vectors that ``message`` announces are: if not, it will be refused unseen."""
    if isinstance(message, Join):
        message = own_part(message, settings)
        brings = 0 if message.params is None else message.params.numel()
        fits = brings in (0, message.layout.size) and (message.untrained is None or needs_params)
        return fits and not why_not_join(message, settings, job, member, needs_params)
    if job is None or whole is None or why_stranger(message, member):
        return False
    if isinstance(message, Push):
        return message.push.numel() == job.layout.size
    if isinstance(message, Bye):
        return member is not None and not why_not_bye(message, settings, job, whole, member)
    return isinstance(message, Leave) and not why_not_leave(message, job)


def why_not_join(
    join: Join, settings: ServerSettings, job: Job | None, member: Member | None, needs_params: bool
) -> str:
    """Whether this worker, of which ``member`` is known, can take part in ``job``, or bring the first parameters."""
    if join.digest != settings.digest:
        return "worker and server run different configurations"
    if not 0 <= join.worker < MAX_WORKERS:
        return f"worker number is not within 0..{MAX_WORKERS - 1}"
    counts = (join.layout.size, join.plan.batches_per_epoch, join.plan.epochs, join.ahead)
    if not (-1 < join.momentum < 1 and min(counts) > 0 and join.ahead <= MAX_AHEAD):
        return "momentum, model, plan or read-ahead out of range"
    beside = 0 if join.untrained is None else 4 * join.untrained.numel()
    if least_bytes(join.layout, settings.workers) + beside > settings.memory_bytes:
        return (
            f"a model of this size, with {settings.workers} workers, does not fit into the "
            f"{settings.memory_bytes / 2**30:.1f} GiB of memory of the server's machine"
        )
    brought = join.params if needs_params else None
    if brought is not None and (brought.numel() != join.layout.size or not all_finite(brought)):
        return "first parameters are not finite or of the wrong size"
    if job is not None and job != Job(join.layout, join.plan, join.momentum):
        return "model, data plan or momentum differ from those of the workers before"
    if member is not None and member.incarnation > join.incarnation:
        return NEWER_JOINED
    if member is not None and member.incarnation == join.incarnation and member.request > join.request:
        # A late copy, which nobody waits for, or a process started anew without saying so.
        return (
            "this incarnation of the worker has joined and gone on; a process that is started by hand in its place "
            "needs a higher DANAZ_INCARNATION"
        )
    return ""


def least_bytes(layout: Layout, workers: int) -> int:
    """What a server needs at the least: θ, its copy for a checkpoint, and what each worker pushes."""
    return 4 * (layout.size + layout.buffer_size) * (2 + workers)


def why_stranger(message: Request, member: Member | None) -> str:
    """Whether a message comes from somebody who takes part."""
    if member is None:
        return "worker has not joined"
    if member.incarnation != message.incarnation:
        return "another incarnation of this worker has joined"
    if member.awaiting == "join" and not isinstance(message, Heartbeat):
        return "the server was restarted"
    if not member.alive and not member.left:
        return "worker was silent too long and was given up"
    return ""


def why_not_push(push: Push, member: Member, job: Job, leases: Leases, life: int) -> str:
    """Whether a push may be applied, by a server in this life."""
    if push.life != life:
        return "push was computed before the server was restarted"
    held = [batch for batch in set(push.batches) if leases.holds(member.worker, batch)]
    if len(held) < len(push.batches):
        return "batch was not leased to this worker"
    if push.view_version != member.sent_version or member.awaiting:
        return "push was computed on another view than the last one sent"
    if push.push.numel() != job.layout.size or len(push.lr) != len(job.layout.groups):
        return "push has the wrong size"
    ends = [0, *chain.from_iterable(push.absent), job.layout.size]
    if any(start > stop for start, stop in pairwise(ends)):
        return "push leaves out spans that are not in order, or not of the model"
    rates_fit = all(0 <= lr <= MAX_LR for lr in push.lr)
    if not (rates_fit and push.samples >= 0 and isfinite(push.loss or 0.0) and is_finite(push)):
        return NOT_FINITE
    return ""


def why_not_of_others(push: Push, layers: int) -> str:
    """Whether what a push brings of other slices may be of a model of so many ``layers``."""
    if push.elsewhere < 0:
        return "the other slices took fewer bytes than none"
    fits = len(push.squares) in (0, layers) and all(0 <= square < inf for square in push.squares)
    return "" if fits else "squares of the other slices do not fit the model"


def is_finite(push: Push) -> bool:
    """Whether no element is NaN or infinite. A square that is finite says so; one that is not may have overflowed."""
    return (push.square is not None and isfinite(push.square)) or all_finite(push.push)


def why_not_leave(leave: Leave, job: Job) -> str:
    """Whether a leaving worker's vectors fit the model."""
    given = leave.give_back
    if leave.buffers.numel() != job.layout.buffer_size or (given is not None and given.numel() != job.layout.size):
        return "leaving worker's vectors have the wrong size"
    return ""


def why_not_bye(bye: Bye, settings: ServerSettings, job: Job, whole: WholeModel, member: Member) -> str:
    """Whether what a worker brings with its good-bye is the end of θ, of which this server holds the beginning.

    One brings it to shard 0 of several, once, with the version that it has heard of.
    """
    if bye.rest is None or member.said_bye:
        return ""
    missing = whole.layout.size - job.layout.size
    if settings.shard or not missing or bye.rest.numel() != missing:
        return "this server does not need what the good-bye brings"
    return ""


def why_not_report(report: Report, reported: Collection[str]) -> str:
    """Whether the figures of a script fit in beside those ``reported`` before."""
    return TOO_MANY_REPORTED if len({*reported, *report.figures}) > MAX_REPORTED else ""
