"""Decides who computes which batch, so that every batch of the run is completed once."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from itertools import islice
from typing import Any

from danaz.protocol.messages import Plan

ORDERS_DIFFER = (
    "its loader has other batches in this epoch than those of the workers before: the data set or the sampler depends "
    "on something that differs from machine to machine, or that changes in the course of training. Give every process "
    "the same sampler over all samples; if its epochs differ by more than random numbers, it needs set_epoch(epoch)"
)


class Leases:
    """Leases batch numbers in order. Batches that come back from a worker are leased again before new ones."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.completed = 0
        self._next = 0
        self._returned: list[int] = []  # a heap of batches to lease again
        self._held: dict[int, list[int]] = {}  # worker -> the batches leased to it
        self._closed = False
        self._orders: dict[int, int] = {}  # epoch -> the digest of its order, as the first worker said

    def lease_up_to(self, worker: int, ahead: int) -> tuple[int, ...]:
        """Lease batches to ``worker`` until it holds ``ahead`` or none are left. Return all batches that it holds."""
        if self._closed:
            return ()
        held = self._held.setdefault(worker, [])
        held.extend(islice(iter(self._take, None), max(0, ahead - len(held))))
        return tuple(held)

    def _take(self) -> int | None:
        """Take the next batch to lease; return None if there is none."""
        if self._returned:
            return heapq.heappop(self._returned)
        if self._next == self.plan.batches:
            return None
        self._next += 1
        return self._next - 1

    def has_news(self, worker: int) -> bool:
        """Return whether a worker that asks for batches can be answered: it holds or can get one, or none will come."""
        return self.done or bool(self._held.get(worker)) or bool(self._returned) or self._next < self.plan.batches

    def holds(self, worker: int, batch: int) -> bool:
        return batch in self._held.get(worker, ())

    def hear_order(self, batch: int, order: int) -> bool:
        """Hear the digest of the order of the batch's epoch. Return whether it is the one that was heard first.

        0 says nothing of the order.
        """
        epoch, _ = self.plan.place_of(batch)
        return not order or self._orders.setdefault(epoch, order) == order

    def complete(self, worker: int, batch: int) -> None:
        """Count ``batch`` as completed by ``worker``, which must hold it."""
        self._held[worker].remove(batch)
        self.completed += 1

    def account(self, batch: int) -> None:
        """Count ``batch`` as completed by a worker whose lease was forgotten in a restart."""
        while self._next <= batch:
            heapq.heappush(self._returned, self._next)
            self._next += 1
        self._returned.remove(batch)
        heapq.heapify(self._returned)
        self.completed += 1

    def put_back(self, worker: int, batch: int) -> None:
        """Take ``batch`` back from ``worker``: the next worker that asks computes it again."""
        self._held[worker].remove(batch)
        heapq.heappush(self._returned, batch)

    def give_up(self, worker: int) -> None:
        """Take back everything ``worker`` holds."""
        for batch in self._held.pop(worker, ()):
            heapq.heappush(self._returned, batch)

    def close(self) -> None:
        """End the run early: lease nothing more, and do not wait for batches that workers hold."""
        self.stop()
        self._held.clear()

    def stop(self) -> None:
        """Lease nothing more. Batches that workers compute now may still be completed."""
        self._closed = True

    def facts(self) -> dict[str, Any]:
        """Return which batches are completed and which are not. A restart forgets which worker holds which."""
        held = (batch for batches in self._held.values() for batch in batches)
        left = sorted([*self._returned, *held])
        facts = {"completed": self.completed, "next": self._next, "returned": left, "closed": self._closed}
        return {**facts, "orders": list(self._orders.items())}

    @classmethod
    def restored(cls, plan: Plan, facts: Mapping[str, Any]) -> Leases:
        """Return leases with the state that ``facts`` returned."""
        leases = cls(plan)
        leases.completed, leases._next = facts["completed"], facts["next"]
        leases._returned, leases._closed = list(facts["returned"]), facts["closed"]
        leases._orders = dict(facts.get("orders", ()))  # a checkpoint of an earlier version has none
        return leases

    @property
    def epoch(self) -> float:
        """Completed epochs of the whole cluster."""
        return self.plan.epoch_after(self.completed)

    @property
    def done(self) -> bool:
        """Whether no batch is left to compute."""
        return self._closed or self.completed == self.plan.batches


class LeasedElsewhere(Leases):
    """The leases of a shard other than 0. Shard 0 leases every batch, and workers say when none are left."""

    def lease_up_to(self, worker: int, ahead: int) -> tuple[int, ...]:
        return ()

    def has_news(self, worker: int) -> bool:
        return True

    def holds(self, worker: int, batch: int) -> bool:
        return True

    def hear_order(self, batch: int, order: int) -> bool:
        return True  # shard 0 compares

    def complete(self, worker: int, batch: int) -> None:
        self.completed += 1

    def put_back(self, worker: int, batch: int) -> None:
        """Do nothing: shard 0 does it."""

    @property
    def done(self) -> bool:
        return self._closed
