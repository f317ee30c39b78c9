"""A state machine as one table of transitions, and the picture of it for the docs."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Generic, TypeVar

State = TypeVar("State", bound=Enum)
Event = TypeVar("Event", bound=Enum)


class IllegalTransitionError(RuntimeError):
    """An event that the table does not allow in this state: a fault in the program that lets it happen."""

    def __init__(self, role: str, event: Enum, state: Enum):
        super().__init__(f"{role}: the event {event.value!r} is not allowed in the state {state.value!r}")


class Transitions(Generic[State, Event]):
    """All transitions that are allowed in one kind of state machine. It holds no state itself.

    ``role`` says in errors whose machine it is. ``begins`` maps each state in which a machine may begin to the reason
    for it. ``table`` maps each event to its transitions, from the state before it to the state after it. Errors and the
    picture use the values of both enums as names: a state is one word of letters, digits and ``_``.
    """

    def __init__(self, role: str, begins: Mapping[State, str], table: Mapping[Event, Mapping[State, State]]):
        self.role = role
        self.begins = dict(begins)
        self.table = {event: dict(moves) for event, moves in table.items()}

    def allows(self, state: State, event: Event) -> bool:
        return state in self.table.get(event, {})

    def after(self, state: State, event: Event, who: str = "") -> State:
        """Return the state after ``event``. Raises IllegalTransitionError.

        ``who``, such as a worker's number, is added to the role in the error.
        """
        after = self.table.get(event, {}).get(state)
        if after is None:
            raise IllegalTransitionError(f"{self.role} {who}".rstrip(), event, state)
        return after

    def picture(self) -> str:
        """Return a mermaid state diagram of the whole table: one arrow for each pair of states, with all its events."""
        arrows: dict[tuple[str, str], list[str]] = {}
        for state, reason in self.begins.items():
            arrows.setdefault(("[*]", state.value), []).append(reason)
        for event, moves in self.table.items():
            for before, after in moves.items():
                arrows.setdefault((before.value, after.value), []).append(event.value)
        lines = [f"    {before} --> {after}: {', '.join(events)}" for (before, after), events in arrows.items()]
        return "\n".join(["stateDiagram-v2", *lines])
