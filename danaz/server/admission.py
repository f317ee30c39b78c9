"""Decides what the server admits and refuses, and what follows from a refused push.

Each function named ``why_…`` returns the reason for a refusal, or an empty text. It changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection
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
    Push,
    Report,
    Request,
)
from danaz.protocol.refusals import FRESH_AFTER, NEWER_JOINED, NOT_FINITE, OUTLIER, SICK
from danaz.rules import UnfitOptimizerError
from danaz.server.full_model import own_part
from danaz.server.health import size_of
from danaz.server.members import Member, MemberState
from danaz.server.settings import ServerSettings
from danaz.server.state import Job, ServerState
from danaz.vectors.cutting import all_finite
from danaz.vectors.layout import Layout

MAX_LR = torch.finfo(torch.float32).max
DIVERGED_STRIKES = 3  # non-finite pushes in a row from every live worker show divergence


def is_worth_receiving(message: Request, state: ServerState) -> bool:
    """Return whether to receive the vectors that ``message`` announces. If not, it is refused without them."""
    member = state.members.get(message.worker)
    if isinstance(message, Join):
        message = own_part(message, state.settings)
        brings = 0 if message.params is None else message.params.numel()
        fits = brings in (0, message.layout.size) and (message.untrained is None or not state.has_params)
        return fits and not why_not_join(message, state)
    if not state.has_job or why_stranger(message, member):
        return False
    if isinstance(message, Push):
        return message.push.numel() == state.job.layout.size
    if isinstance(message, Bye):
        return member is not None and not why_not_bye(message, state, member)
    return isinstance(message, Leave) and not why_not_leave(message, state.job)


def why_not_join(join: Join, state: ServerState) -> str:
    """Return why this worker cannot take part in the run, or cannot bring the first parameters."""
    settings, member = state.settings, state.members.get(join.worker)
    if join.digest != settings.digest:
        return "worker and server run different configurations"
    if not 0 <= join.worker < MAX_WORKERS:
        return f"worker number is not within 0..{MAX_WORKERS - 1}"
    counts = (join.layout.size, join.plan.batches_per_epoch, join.plan.epochs, join.ahead)
    if not (min(counts) > 0 and join.ahead <= MAX_AHEAD):
        return "model, plan or read-ahead out of range"
    if reason := why_not_optimizers(join, settings):
        return reason
    beside = 0 if join.untrained is None else 4 * join.untrained.numel()
    if least_bytes(join.layout, settings.workers) + beside > settings.memory_bytes:
        return (
            f"a model of this size, with {settings.workers} workers, does not fit into the "
            f"{settings.memory_bytes / 2**30:.1f} GiB of memory of the server's machine"
        )
    brought = None if state.has_params else join.params
    if brought is not None and (brought.numel() != join.layout.size or not all_finite(brought)):
        return "first parameters are not finite or of the wrong size"
    if state.has_job and state.job != Job(join.layout, join.plan, join.optimizers):
        return "model, data plan or optimizer differ from those of the workers before"
    if member is not None and member.incarnation > join.incarnation:
        return NEWER_JOINED
    if member is not None and member.incarnation == join.incarnation and member.request > join.request:
        # This is a late copy that nobody waits for, or a new process that does not say that it is new.
        return (
            "this incarnation of the worker has joined and gone on; a process that is started by hand in its place "
            "needs a higher DANAZ_INCARNATION"
        )
    return ""


def why_not_optimizers(join: Join, settings: ServerSettings) -> str:
    """Why the algorithm cannot carry out the optimizers of this worker."""
    if len(join.optimizers) not in (1, len(join.layout.groups)):
        return "there is neither one optimizer nor one for each parameter group"
    try:
        settings.rule(join.optimizers)
    except UnfitOptimizerError as error:
        return str(error)
    return ""


def least_bytes(layout: Layout, workers: int) -> int:
    """Return the least memory that a server needs: for θ, its copy for a checkpoint, and each worker's push."""
    return 4 * (layout.size + layout.buffer_size) * (2 + workers)


def why_stranger(message: Request, member: Member | None) -> str:
    """Return why the sender of a message must join first: it is not the ``member`` that the server knows."""
    if member is None:
        return "worker has not joined"
    if member.incarnation != message.incarnation:
        return "another incarnation of this worker has joined"
    if member.state is MemberState.EXPECTED and not isinstance(message, Heartbeat):
        return "the server was restarted"
    if not member.alive and not member.left:
        return "worker was silent too long and was given up"
    return ""


def why_not_push(push: Push, member: Member, state: ServerState) -> str:
    """Return why a push may not be applied, whatever its size."""
    job, leases = state.job, state.leases
    if push.life != state.life:
        return "push was computed before the server was restarted"
    held = [batch for batch in set(push.batches) if leases.holds(member.worker, batch)]
    if len(held) < len(push.batches):
        return "batch was not leased to this worker"
    if push.view_version != member.sent_version or not member.computing:
        return "push was computed on another view than the last one sent"
    if push.push.numel() != job.layout.size or len(push.lr) != len(job.layout.groups):
        return "push has the wrong size"
    ends = [0, *chain.from_iterable(push.absent), job.layout.size]
    if any(start > stop for start, stop in pairwise(ends)):
        return "push leaves out spans that are not in order, or not of the model"
    rates_fit = all(0 <= lr <= MAX_LR for lr in push.lr)
    if not (rates_fit and push.samples >= 0 and isfinite(push.loss or 0.0) and is_finite(push)):
        return NOT_FINITE
    return why_not_of_others(push, len(state.full_model.layers))


def why_not_of_others(push: Push, layers: int) -> str:
    """Return why what a push says of the other shards does not fit a model with this number of ``layers``."""
    if push.elsewhere < 0:
        return "the other slices took fewer bytes than none"
    fits = len(push.squares) in (0, layers) and all(0 <= square < inf for square in push.squares)
    return "" if fits else "squares of the other slices do not fit the model"


def is_finite(push: Push) -> bool:
    """Return whether no element is NaN or infinite. A finite square proves it; an infinite one may be an overflow."""
    return (push.square is not None and isfinite(push.square)) or all_finite(push.push)


def why_not_leave(leave: Leave, job: Job) -> str:
    """Return why a leaving worker's vectors do not fit the model."""
    given = leave.give_back
    if leave.buffers.numel() != job.layout.buffer_size or (given is not None and given.numel() != job.layout.size):
        return "leaving worker's vectors have the wrong size"
    return ""


def why_not_bye(bye: Bye, state: ServerState, member: Member) -> str:
    """Return why a good-bye brings something other than the part of θ that this server lacks.

    With several shards, a worker brings that part to shard 0, once, with the last version that it was told.
    """
    if bye.rest is None or member.said_bye:
        return ""
    missing = state.full_model.layout.size - state.job.layout.size
    if state.settings.shard or not missing or bye.rest.numel() != missing:
        return "this server does not need what the good-bye brings"
    return ""


def why_not_report(report: Report, reported: Collection[str]) -> str:
    """Return why a script cannot report more figures beside those ``reported`` before."""
    return TOO_MANY_REPORTED if len({*reported, *report.figures}) > MAX_REPORTED else ""


# ---- pushes that are sick, and pushes that are refused ---------------------------------------------------------------


def judge_size(push: Push, state: ServerState) -> str:
    """Compare the size of a sound push with those of the other workers, and remember it.

    Return why it is refused, or an empty text.
    """
    refuses, size = state.settings.refuse_outliers, size_of(push, state.master.rule, state.master.params)
    is_outlier = state.health.judge(push.worker, size, refuses)
    return OUTLIER if is_outlier and refuses else ""


def refuse_push(state: ServerState, member: Member, push: Push, reason: str) -> None:
    """Count a push as refused, and put its batches back or, if it is sick, drop them."""
    state.refuse(reason)
    state.totals.of(member.worker).refused_pushes += 1
    member.pending, member.refused = None, (push.request, reason)
    if reason in SICK:
        _drop(state, member, push, reason)
    else:
        for batch in push.batches:
            if state.leases.holds(member.worker, batch):
                state.leases.put_back(member.worker, batch)


def _drop(state: ServerState, member: Member, push: Push, reason: str) -> None:
    """Count the batches of a sick push as used, because they would give another such push.

    A velocity that the server keeps for the worker is as suspect as one on the worker, and starts afresh as often.
    """
    for batch in push.batches:
        if state.leases.holds(member.worker, batch):  # not if the run has just ended early
            state.leases.complete(member.worker, batch)
    if state.health.count_refused(push) % FRESH_AFTER == 0 and member.vectors:
        state.admit(member, afresh=True)
    if reason == OUTLIER:
        return
    state.health.count_not_finite(member.worker)
    member.strikes += 1
    if all(m.strikes >= DIVERGED_STRIKES for m in state.members.values() if m.takes_part):
        state.diverge(f"the last {DIVERGED_STRIKES} pushes of every worker were not finite")
