"""From pushes that may be applied to one update: the master's next version, and what is noted of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from danaz.flat import common_spans
from danaz.server.figures import Update
from danaz.server.members import Member
from danaz.server.messages import Push

if TYPE_CHECKING:
    from danaz.server.core import ServerCore


def update_by(core: ServerCore, parts: Sequence[Push]) -> Update:
    """Apply one update made of ``parts``, the push of one worker or those of a whole round, and complete its leases."""
    master, last = core.master, parts[-1]
    members = [core.members[p.worker] for p in parts]
    member = members[-1]
    lag = master.version - min(m.sent_version for m in members)
    gap = _gap(core, member, last)
    samples = sum(p.samples for p in parts)
    if master.rule.barrier:
        weighted = [(p.push, p.samples / max(1, samples)) for p in parts]
        master.apply_round(weighted, last.lr, members, lag, common_spans([p.absent for p in parts]))
    else:
        master.apply(last.push, last.lr, member, lag, last.absent)
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


def _gap(core: ServerCore, member: Member, push: Push) -> float | None:
    """The gap of the view that ``push`` was computed on, if it is to be measured.

    With several shards, the one of the worker's push before: of that one, ``push`` brings what the others saw.
    """
    settings, whole = core.settings, core.whole
    # All shards must measure the same pushes: a worker's number is the same to all of them, a version is their own.
    number = core.master.version if settings.shards == 1 else push.request
    measured = settings.gap_every and number % settings.gap_every == 0 and member.view is not None
    squares = core.master.squares(member.view) if measured and member.view is not None else None
    if settings.shards > 1:
        before, member.squares = member.squares, squares
        squares = whole.add_up(before, push.squares) if settings.shard == 0 else None
    return None if squares is None else whole.layers.gap(squares)
