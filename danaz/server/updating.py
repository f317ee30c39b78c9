"""From pushes that may be applied to one update: the master's next version, and what is noted of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from danaz.server.figures import Update
from danaz.server.messages import Push

if TYPE_CHECKING:
    from danaz.server.core import ServerCore


def update_by(core: ServerCore, parts: Sequence[Push]) -> Update:
    """Apply one update made of ``parts``, the push of one worker or those of a whole round, and complete its leases."""
    master, every, last = core.master, core.settings.gap_every, parts[-1]
    members = [core.members[p.worker] for p in parts]
    member = members[-1]
    lag = master.version - min(m.sent_version for m in members)
    measured = every and master.version % every == 0 and member.view is not None
    gap = master.gap(member.view) if measured and member.view is not None else None
    samples = sum(p.samples for p in parts)
    if master.rule.barrier:
        weighted = [(p.push, p.samples / max(1, samples)) for p in parts]
        master.apply_round(weighted, last.lr, members, lag)
    else:
        master.apply(last.push, last.lr, member, lag)
    for m, p in zip(members, parts, strict=True):
        m.lr, m.updates, m.applied_request, m.lag, m.gap = last.lr, m.updates + 1, p.request, lag, gap
        for batch in p.batches:
            core.leases.complete(p.worker, batch)
    losses = [p.loss for p in parts if p.loss is not None]
    return Update(
        version=master.version,
        worker=last.worker,
        lag=lag,
        lr=last.lr,
        gap=gap,
        gap_of=master.gap_of,
        loss=sum(losses) / len(losses) if losses else None,
        batch=last.batch,
        round=tuple((p.worker, p.batch) for p in parts) if master.rule.barrier else None,
        samples=samples,
        earlier=last.earlier,
        incarnation=last.incarnation,
        request=last.request,
        life=core.life,
    )
