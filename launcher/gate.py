"""How many connections are made at once, and when one that was dropped is tried again.

An sshd lets only so many clients be at their handshake together, and drops others at random (MaxStartups, by default
10:30:100). Behind a jump host that is one number for all machines of a run.
"""

from __future__ import annotations

import random
from collections.abc import Hashable
from math import inf

__all__ = ["Gate", "delay_s"]

MOST = 8.0  # fewer than the ten from which on an sshd of the usual settings drops some
GROWTH = 0.5  # by a connection that was made
HANDSHAKE_S = 3.0  # then it is past sshd's handshake, or will never be
FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 8.0


class Gate:
    """Admits a few at once; fewer after one was dropped, and more again with each that was not."""

    def __init__(self) -> None:
        self.limit = MOST
        self._inside: dict[Hashable, float] = {}  # who is connecting, since when
        self._making: dict[Hashable, Hashable] = {}  # shared connection -> who makes it

    def admits(self, who: Hashable, now_s: float, shared: Hashable = None) -> bool:
        """Let `who` connect now, if that may be; returns whether it may.

        `shared` names the connection that it shares with others, if any: one of them makes it, and the others wait
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
        """When to ask again, though nobody has left; inf: only when somebody has."""
        return min(self._inside.values(), default=inf) + HANDSHAKE_S

    def connected(self, who: Hashable) -> None:
        if self._leaves(who):
            self.limit = min(MOST, self.limit + GROWTH)

    def gave_up(self, who: Hashable) -> None:
        self._leaves(who)

    def dropped(self, who: Hashable) -> None:
        """An sshd that has too many connections dropped this one."""
        self._leaves(who)
        self.limit = max(1.0, self.limit / 2)

    def _leaves(self, who: Hashable) -> bool:
        """Returns whether it was still counted among those who are connecting."""
        self._making = {shared: maker for shared, maker in self._making.items() if maker != who}
        return self._inside.pop(who, None) is not None


def delay_s(attempts: int) -> float:
    """How long to wait after so many attempts: longer each time, and not as long as others that were dropped too."""
    longest_s = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** (attempts - 1))
    return random.uniform(longest_s / 2, longest_s)
