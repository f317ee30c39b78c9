"""Put messages together from the slices in which they arrive."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from danaz.protocol import messages
from danaz.protocol.wire import (
    Frame,
    WireError,
    as_travelled,
    decode_with_codecs,
    read_chunk,
    slices_of,
    vectors_of,
)
from danaz.vectors.codecs import Codec, CodecError
from danaz.vectors.cutting import is_announced


class StrayChunkError(WireError):
    """A chunk that belongs to no message under way, for example because its sender has connected again."""


Room = Callable[["Inbox", Any, int], Tensor]
Arrived = Callable[[Any, Tensor], object]


class Assembly:
    """A message whose vectors arrive in chunks, in order."""

    def __init__(
        self, message: messages.Message, codecs: dict[str, Codec], room: Callable[[int], Tensor], arrived: Arrived
    ):
        """``room(n)`` returns the memory f32[n] that receives a vector; ``arrived`` is told of each slice in it."""
        self.message = message
        self._arrived = arrived
        self._codecs = codecs
        self._vectors = {name: room(vector.numel()) for name, vector in vectors_of(message).items()}
        self._slices = [(codecs[name], piece) for name, vector in self._vectors.items() for piece in slices_of(vector)]
        self._next = 0
        self._bytes = 0
        self._square = 0.0

    def take(self, request: int, number: int, data: Frame) -> messages.Message | None:
        """Take the next chunk. Returns the message when it is complete, or None before. Raises WireError."""
        assert not isinstance(self.message, messages.Heartbeat), "it has no vectors"
        if request != self.message.request or number != self._next:
            raise StrayChunkError("chunk of no message under way")
        codec, piece = self._slices[number]
        try:
            codec.decode(data, piece)
        except CodecError as error:
            raise WireError("chunk has another size than announced, or is not in its codec") from error
        self._arrived(self.message, piece)
        self._bytes += len(data)
        if piece.numel():
            self._square += torch.dot(piece, piece).item()  # while it is in cache
        self._next += 1
        return self._whole() if self._next == len(self._slices) else None

    def _whole(self) -> messages.Message:
        found: dict[str, Any] = dict(self._vectors)
        if isinstance(self.message, messages.Push):
            found["square"] = self._square
        message: messages.Message = as_travelled(dataclasses.replace(self.message, **found), self._codecs, self._bytes)
        return message


def _summed(message: Any) -> Any:
    """Return the message. A push gets the sum of its squares here, so that several readers need only one pass."""
    if not isinstance(message, messages.Push) or not message.push.numel():
        return message
    return dataclasses.replace(message, square=torch.dot(message.push, message.push).item())


class Inbox:
    """Puts the messages of many peers together from their slices. Each peer has at most one message under way."""

    def __init__(
        self,
        expect: types.UnionType,
        takes: Callable[[Any, Any], bool],
        room: Room,
        arrived: Arrived = lambda message, piece: None,
    ):
        """Expect messages of these kinds.

        ``takes(peer, message)`` says whether to receive the vectors that a message announces; if not, the message keeps
        its announced vectors. ``room(inbox, message, n)`` returns the memory f32[n] that receives one of them.
        ``arrived(message, slice)`` is told of each slice in that memory, before the message is complete.
        """
        self._expect, self._takes, self._room, self._arrived = expect, takes, room, arrived
        self._under_way: dict[Hashable, Assembly] = {}

    def take(self, peer: Hashable, frames: Sequence[Frame]) -> Any:
        """Return the message that ``frames`` hold or complete, or None while more is to come. Raises WireError."""
        chunk = read_chunk(frames)
        if chunk is not None:
            return self._take_chunk(peer, *chunk)
        message, codecs = decode_with_codecs(frames, self._expect)
        self._under_way.pop(peer, None)
        if not any(map(is_announced, vectors_of(message).values())):
            return _summed(message)
        if not self._takes(peer, message):
            return message
        self._under_way[peer] = Assembly(message, codecs, lambda size: self._room(self, message, size), self._arrived)
        return None

    def _take_chunk(self, peer: Hashable, request: int, number: int, data: Frame) -> Any:
        assembly = self._under_way.pop(peer, None)
        if assembly is None:
            raise StrayChunkError("chunk of no message under way")
        whole = assembly.take(request, number, data)
        if whole is None:
            self._under_way[peer] = assembly
        return whole

    def forget(self, belongs: Callable[[Any], bool]) -> None:
        """Drop the messages under way for which ``belongs`` is true."""
        for peer in [peer for peer, assembly in self._under_way.items() if belongs(assembly.message)]:
            del self._under_way[peer]
