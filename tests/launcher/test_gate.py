"""The gate limits how many connections are made at once; the test sets the clock."""

from __future__ import annotations

from math import inf

from launcher.gate import HANDSHAKE_S, LONGEST_DELAY_S, MOST, Gate, delay_s

CROWD = range(100)


def admitted(gate: Gate, now_s: float, first: int = 0) -> list[int]:
    return [who for who in CROWD[first:] if gate.admit(who, now_s)]


def test_only_so_many_at_once() -> None:
    gate = Gate()
    assert admitted(gate, 0.0) == list(range(int(MOST)))
    gate.connected(0)
    gate.gave_up(1)
    assert admitted(gate, 1.0, first=50) == [50, 51]
    assert gate.next_s == HANDSHAKE_S, "those who say nothing are past sshd's handshake by then"
    assert len(admitted(gate, HANDSHAKE_S, first=60)) == MOST - 2


def test_one_makes_the_connection_that_others_share() -> None:
    gate = Gate()
    assert gate.admit(0, 0.0, "a")
    assert gate.admit(1, 0.0, "b")
    assert not gate.admit(2, 0.0, "a")
    assert not gate.admit(2, 10 * HANDSHAKE_S, "a"), "however long that takes"
    assert gate.next_s == inf, "only when somebody has left"
    gate.connected(1)
    assert not gate.admit(2, 100.0, "a")
    gate.gave_up(0)
    assert gate.admit(2, 100.0, "a")
    assert not gate.admit(0, 100.0, "a")
    gate.connected(2)
    assert gate.admit(0, 100.0, "a")


def test_fewer_after_a_drop_and_more_again_after_a_success() -> None:
    gate = Gate()
    for who in admitted(gate, 0.0):
        gate.dropped(who)
    assert len(admitted(gate, 1.0)) == 1
    seen = []
    for turn in range(2, 20):
        for who in CROWD:
            gate.connected(who)
        seen.append(len(admitted(gate, float(turn))))
    assert seen == sorted(seen)
    assert seen[-1] == MOST


def test_the_delay_grows_and_ends_growing() -> None:
    for attempts in range(1, 30):
        longest_s = min(LONGEST_DELAY_S, 0.5 * 2.0 ** (attempts - 1))
        assert longest_s / 2 <= delay_s(attempts) <= longest_s
