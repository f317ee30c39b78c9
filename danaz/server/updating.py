"""Makes one update of pushes that passed all checks: the master's next version, and its record."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from danaz.protocol.messages import Push
from danaz.server.health import norm_of
from danaz.server.members import Member
from danaz.server.records import Update, mean
from danaz.server.state import ServerState
from danaz.vectors.cutting import common_spans


def update_by(state: ServerState, parts: Sequence[Push], now: float) -> Update | None:
    """Apply one update made of ``parts``, one worker's push or those of a whole round, and complete their leases.

    Returns None, and changes nothing, if the result would not be finite.
    """
    master, last = state.master, parts[-1]
    members = [state.members[p.worker] for p in parts]
    member = members[-1]
    lag = master.version - min(m.sent_version for m in members)
    gap = _gap(state, member, last)
    samples = sum(p.samples for p in parts)
    norm = max(map(norm_of, parts))
    if master.rule.barrier:
        weighted = [(p.push, p.samples / max(1, samples)) for p in parts]
        applied = master.apply_round(weighted, norm, last.lr, members, lag, common_spans([p.absent for p in parts]))
    else:
        applied = master.apply(last.push, norm, last.lr, member, lag, last.absent)
    if not applied:
        return None
    for m, p in zip(members, parts, strict=True):
        m.updates, m.applied_request, m.lag, m.gap = m.updates + 1, p.request, lag, gap
        for batch in p.batches:
            state.leases.complete(p.worker, batch)
    losses = {p.worker: p.loss for p in parts if p.loss is not None}
    for worker, loss in losses.items():
        state.totals.hear_loss(worker, loss)
    return Update(
        version=master.version,
        worker=last.worker,
        lag=lag,
        lr=last.lr,
        gap=gap,
        gap_of=master.gap_of,
        loss=mean(losses.values()),
        batch=last.batch,
        round=tuple((p.worker, p.batch) for p in parts) if master.rule.barrier else None,
        samples=samples,
        earlier=last.earlier,
        incarnation=last.incarnation,
        request=last.request,
        life=state.life,
        seconds=state.totals.seconds_at(now),
    )


def _gap(state: ServerState, member: Member, push: Push) -> float | None:
    """Return the gap of the view that ``push`` was computed on, if it is to be measured.

    With several shards, return the gap of the worker's previous push instead: ``push`` brings what the other shards
    measured for that one.
    """
    settings, full = state.settings, state.full_model
    # All shards must measure the same pushes. They agree on a worker's request numbers, but not on versions.
    number = state.master.version if settings.shards == 1 else push.request
    measured = settings.gap_every and number % settings.gap_every == 0 and member.view is not None
    squares = state.master.squares(member.view) if measured and member.view is not None else None
    if settings.shards > 1:
        before, member.squares = member.squares, squares
        squares = full.add_up(before, push.squares) if settings.shard == 0 else None
    gap = None if squares is None else full.layers.gap(squares)
    return gap if gap is not None and isfinite(gap) else None
