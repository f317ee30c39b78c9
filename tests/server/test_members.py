"""The states of a worker on the server follow one table, and the docs show the picture of it."""

from __future__ import annotations

import re

import pytest
from pictures import PAGE, TABLES, drawn

from danaz.protocol.transitions import IllegalTransitionError
from danaz.server.members import MEMBER, Member, MemberEvent, MemberState, restored_state
from danaz.server.snapshot import STATE_FACTS


def member_in(state: MemberState) -> Member:
    return Member(3, 1, b"", 1, 1, {}, 0.0, state)


def test_the_page_shows_the_tables():
    """If it does not, run: PYTHONPATH=. python tests/support/pictures.py"""
    page = PAGE.read_text()
    assert re.findall(r"<!-- picture of (\w+) -->", page) == list(TABLES)
    assert page == drawn(page)


def test_every_state_can_be_reached_and_every_event_can_happen():
    reachable = {*MEMBER.begins, *(after for moves in MEMBER.table.values() for after in moves.values())}
    assert reachable == set(MemberState)
    assert set(MEMBER.table) == set(MemberEvent)
    assert all(MEMBER.table.values())


@pytest.mark.parametrize("state", MemberState)
@pytest.mark.parametrize("event", MemberEvent)
def test_an_event_follows_the_table_or_is_an_error(event: MemberEvent, state: MemberState):
    member = member_in(state)
    if MEMBER.allows(state, event):
        member.on(event)
        assert member.state is MEMBER.table[event][state]
    else:
        with pytest.raises(IllegalTransitionError) as raised:
            member.on(event)
        assert str(raised.value) == (f"member 3: the event '{event.value}' is not allowed in the state '{state.value}'")
        assert member.state is state


@pytest.mark.parametrize("state", MemberState)
def test_a_checkpoint_holds_who_has_left_and_who_is_awaited(state: MemberState):
    """A worker that takes part is expected to join again; all others are as they were."""
    before = member_in(state)
    after = member_in(restored_state(*(getattr(before, name) for name in STATE_FACTS)))
    assert {name: getattr(after, name) for name in STATE_FACTS} == {name: getattr(before, name) for name in STATE_FACTS}
    assert after.state in MEMBER.begins
    assert after.takes_part == before.takes_part
    assert not after.takes_part or after.state is MemberState.EXPECTED
