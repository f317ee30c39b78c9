"""Why a push is refused, and what follows for its batches, for its worker's reputation and for the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from danaz.protocol.messages import Push
from danaz.protocol.refusals import FRESH_AFTER, OUTLIER, SICK
from danaz.server.admission import why_not_of_others, why_not_push
from danaz.server.health import size_of
from danaz.server.members import Member

if TYPE_CHECKING:
    from danaz.server.core import ServerCore

DIVERGED_STRIKES = 3  # non-finite pushes in a row, of every live worker


def why_refuse(core: ServerCore, member: Member, push: Push) -> str:
    """Why a push may not be applied, or nothing."""
    reason = why_not_push(push, member, core.job, core.leases, core.life)
    return reason or why_not_of_others(push, len(core.whole.layers)) or _why_sick(core, push)


def _why_sick(core: ServerCore, push: Push) -> str:
    """Why a push that is sound in itself is refused for its size."""
    refused, size = core.settings.refuse_outliers, size_of(push, core.master.rule, core.master.params)
    return OUTLIER if core.health.is_outlier(push.worker, size, refused) and refused else ""


def refuse_push(core: ServerCore, member: Member, push: Push, reason: str) -> None:
    """Count a push as refused, and see to the batches that it was made of."""
    core.refuse(reason)
    member.pending, member.refused = None, (push.request, reason)
    if reason in SICK:
        _drop(core, member, push, reason)
    else:
        for batch in push.batches:
            if core.leases.holds(member.worker, batch):
                core.leases.put_back(member.worker, batch)


def _drop(core: ServerCore, member: Member, push: Push, reason: str) -> None:
    """Computed again, the batches would be as bad: they count as used.

    Where the server keeps a velocity for the worker, it is as suspect as one on the worker, and starts afresh like it.
    """
    for batch in push.batches:
        if core.leases.holds(member.worker, batch):  # not if the run has just ended early
            core.leases.complete(member.worker, batch)
    if core.health.refused(push) % FRESH_AFTER == 0 and member.vectors:
        core.admit(member, afresh=True)
    if reason == OUTLIER:
        return
    core.health.saw_not_finite(member.worker)
    member.strikes += 1
    if all(m.strikes >= DIVERGED_STRIKES for m in core.members.values() if m.takes_part):
        core.diverge(f"the last {DIVERGED_STRIKES} pushes of every worker were not finite")
