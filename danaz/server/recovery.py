"""A restarted server goes on from its checkpoint, or from the newest view that a worker brings.

Under some rules, a view shows all that the server holds. Then a worker's view of version n is the server's state at
version n, and the journal (updates.jsonl) says which pushes are in it, so only updates that no worker has in a view are
lost. Under all other rules, the server goes back to its checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from danaz.protocol.messages import UNKNOWN_MACHINE, Join
from danaz.server.members import Member, MemberState
from danaz.server.records import Update
from danaz.server.state import ServerState
from danaz.vectors.cutting import all_finite


class Recovery:
    """The time after a restart, until all workers that the server knew are back or their time is up."""

    def __init__(self, journal: Sequence[Update], size: int, until: float):
        """``journal`` holds the updates since the checkpoint, ``size`` is P."""
        self.journal = journal
        self._life_of = {update.version: update.life for update in journal}
        self._size = size
        self._until = until
        self._newest: tuple[int, Tensor] | None = None  # version and f32[P]

    def hear(self, join: Join) -> None:
        """Keep the view that ``join`` brings if it is the newest one whose version the journal has, from its life."""
        view = join.params
        if view is None or join.life != self._life_of.get(join.version):
            return
        is_newer = self._newest is None or join.version > self._newest[0]
        if is_newer and view.numel() == self._size and all_finite(view):
            self._newest = (join.version, view)

    def is_over(self, members: Iterable[Member], now: float) -> bool:
        """Return whether all workers that the server knew are back, or their time is up."""
        return now >= self._until or not any(m.state is MemberState.EXPECTED for m in members)

    def conclude(self, state: ServerState, now: float) -> None:
        """Bring ``state`` to the version that the run goes on from."""
        if self._newest is not None and state.master.rule.view_is_state:
            version, view = self._newest
            for update in self.journal:
                if update.version <= version:
                    account(state, update, now)
            state.master.replace(view)
        at = state.master.version
        lost = sum(update.version > at for update in self.journal)
        state.totals.lost_updates += lost
        who, cost = "server", f", {lost} updates are lost"
        if state.settings.shard:  # shard 0 keeps the journal, so only shard 0 knows what is lost
            who, cost = f"shard {state.settings.shard}", ""
        state.on_notice(f"{who} restarted: it goes on at version {at}{cost}")


def account(state: ServerState, update: Update, now: float) -> None:
    """Record an update in ``state``, all but its arithmetic, which the view contains already."""
    master, member = state.master, state.members.get(update.worker)
    if member is None or member.incarnation < update.incarnation:
        # This worker joined after the checkpoint, and is not back yet.
        member = Member(update.worker, update.incarnation, b"", 0, 1, {}, now, MemberState.LOST)
        state.members[update.worker] = member
        state.totals.of(update.worker).enter(UNKNOWN_MACHINE)  # it tells its machine when it is back
    if member.incarnation == update.incarnation:
        member.lag, member.gap = update.lag, update.gap
        member.updates, member.applied_request = member.updates + 1, update.request
        member.request = max(member.request, update.request)
    for batch in (*update.earlier, update.batch):
        state.leases.account(batch)
    master.version = update.version
    master.max_lr = tuple(map(max, master.max_lr, update.lr))
    state.totals.count(update, now)
    state.totals.of(update.worker).count(update.samples, update)
    if update.loss is not None:
        state.totals.hear_loss(update.worker, update.loss)
