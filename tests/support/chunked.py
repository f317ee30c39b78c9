"""Large messages made by hand: in chunks, as they travel, and whole, as an inbox puts them together."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from danaz.protocol.inbox import Inbox
from danaz.protocol.messages import Message, Push, Streamed
from danaz.protocol.wire import split
from danaz.vectors.cutting import SLICE_FLOATS

SIZE = 2 * SLICE_FLOATS + 1000  # three chunks


def push_of(vector: Tensor, **changes: object) -> Push:
    push = Push(0, 1, 2, 0, (0.1, 0.1), 1, None, 0, vector)
    return replace(push, **changes)  # type: ignore[arg-type]


def travelling(message: Message | Streamed) -> list[list[bytes]]:
    return [[bytes(frame) for frame in frames] for frames in split(message)]


def inbox(takes: bool = True, rooms: list[Tensor] | None = None) -> Inbox:
    def room(box: Inbox, message: object, size: int) -> Tensor:
        vector = torch.full((size,), 7.0)
        if rooms is not None:
            rooms.append(vector)
        return vector

    return Inbox(Message, lambda peer, message: takes, room)


def take_all(box: Inbox, messages: list[list[bytes]], peer: str = "a") -> list[Message]:
    return [message for frames in messages if (message := box.take(peer, frames)) is not None]
