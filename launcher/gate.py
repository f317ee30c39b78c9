"""Limits how many connections are made at once, and says when to retry one that was dropped.

An sshd limits how many clients may be in their handshake at the same time, and drops further ones at random
(MaxStartups, by default 10:30:100). With a jump host, all machines of a run share its limit.
"""

from __future__ import annotations

import random
from collections.abc import Hashable
from math import inf

__all__ = ["Gate", "delay_s"]

MOST = 8.0  # an sshd with default settings begins to drop connections at ten
GROWTH = 0.5  # how much each successful connection raises the limit
HANDSHAKE_S = 3.0  # by then, a connection is past sshd's handshake, or never will be
FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 8.0


class Gate:
    """Admits a few connections at once: fewer after one was dropped, and more again with each that succeeds."""

    def __init__(self) -> None:
        self.limit = MOST
        self._inside: dict[Hashable, float] = {}  # who is connecting, since when
        self._making: dict[Hashable, Hashable] = {}  # shared connection -> who makes it

    def admit(self, who: Hashable, now_s: float, shared: Hashable = None) -> bool:
        """Let `who` connect now if there is room; it then counts as connecting. Return whether there is.

        `shared` names the connection that it shares with others, if any. One of them makes it, and the others wait
        until that one is connected or has given up.
        """
        self._inside = {each: since_s for each, since_s in self._inside.items() if now_s < since_s + HANDSHAKE_S}
        if shared in self._making or len(self._inside) >= int(self.limit):
            return False
        self._inside[who] = now_s
        if shared is not None:
            self._making[shared] = who
        return True

    @property
    def next_s(self) -> float:
        """When to ask again even if nobody has left; inf: only after somebody has left."""
        return min(self._inside.values(), default=inf) + HANDSHAKE_S

    def connected(self, who: Hashable) -> None:
        if self._leaves(who):
            self.limit = min(MOST, self.limit + GROWTH)

    def gave_up(self, who: Hashable) -> None:
        self._leaves(who)

    def dropped(self, who: Hashable) -> None:
        """Note that an sshd dropped this connection because it has too many."""
        self._leaves(who)
        self.limit = max(1.0, self.limit / 2)

    def _leaves(self, who: Hashable) -> bool:
        """Stop counting `who` as connecting. Return whether it was still counted."""
        self._making = {shared: maker for shared, maker in self._making.items() if maker != who}
        return self._inside.pop(who, None) is not None


def delay_s(attempts: int) -> float:
    """Return how long to wait after this number of attempts.

    The wait grows with each attempt, and is random, so that connections that were dropped together do not all come back
    together.
    """
    longest_s = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** (attempts - 1))
    return random.uniform(longest_s / 2, longest_s)
