"""Messages as frames: [magic and version | msgpack header | one frame per vector, in the codec that the header names].

A message with a vector longer than a slice travels as several messages. The first has two frames, which announce the
sizes of the vectors. Then each slice of each vector follows as [magic, request, number of the chunk | bytes]. So the
other side receives, checks and applies the first slices while the last are on their way, and neither side allocates a
message of 100 MB.

Decoding trusts nothing. It checks each field against the type and the range that its message declares, and the sizes of
vectors before it allocates anything for them. Whatever does not fit raises WireError; decoding raises nothing else.
"""

from __future__ import annotations

import dataclasses
import struct
import types
import typing
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from math import ceil
from typing import Any

import msgpack
import torch
from torch import Tensor

from danaz.protocol import messages
from danaz.protocol.messages import Streamed
from danaz.vectors.codecs import FP32, Codec, CodecError, Encoded, UnknownCodecError, bytes_of, push_codec
from danaz.vectors.cutting import SLICE_FLOATS, announced, chunks, is_announced
from danaz.vectors.layout import MAX_FLOATS, Layout

MAGIC = b"DANAZ\x02"
CHUNK = struct.Struct("<8sQI")  # magic, request, number of the chunk within its message
CHUNK_MAGIC = b"DANAZ\x02+\0"
MAX_HEADER_BYTES = 3 << 19  # enough for a layer table of about twenty thousand tensors

Frame = bytes | bytearray | memoryview


class WireError(ValueError):
    """The frames are not a message of this protocol."""


MESSAGES: dict[str, type] = {
    kind.__name__: kind for kind in (*typing.get_args(messages.Request), *typing.get_args(messages.Reply))
}


def encode(message: messages.Message) -> list[Frame]:
    """The frames of a whole message. They share the tensors' memory, which must not change until they are sent.

    Announced vectors are only announced again. Raises ValueError if the header is too large to travel.
    """
    vectors = _vectors(message)
    frames = [] if any(map(is_announced, vectors.values())) else [_checked_bytes(vector) for vector in vectors.values()]
    return [*_head(message, vectors), *frames]


def split(message: messages.Message | Streamed) -> Iterator[list[Frame]]:
    """The messages that ``message`` travels as, each as frames. A Streamed is computed as it is sent."""
    header: messages.Message = message.header if isinstance(message, Streamed) else message
    announces = _vectors(header)
    codec, pieces = _encoded(message, announces)
    if max((vector.numel() for vector in announces.values()), default=0) <= SLICE_FLOATS:
        yield [*_head(header, announces, codec), *pieces]
        return
    assert not isinstance(header, messages.Heartbeat), "it has no vectors"
    yield _head(header, announces, codec)
    for number, piece in enumerate(pieces):
        yield [CHUNK.pack(CHUNK_MAGIC, header.request, number), piece]


def messages_of(message: messages.Message | Streamed) -> int:
    """How many messages ``split`` makes of ``message``."""
    sizes = [
        vector.numel() for vector in _vectors(message.header if isinstance(message, Streamed) else message).values()
    ]
    return 1 if max(sizes, default=0) <= SLICE_FLOATS else 1 + sum(max(1, ceil(size / SLICE_FLOATS)) for size in sizes)


def _encoded(message: messages.Message | Streamed, vectors: dict[str, Tensor]) -> tuple[str, Iterator[Frame]]:
    """The name of the codec of a message's vectors, and their slices encoded with it."""
    if isinstance(message, Streamed):
        return message.codec.name, map(message.codec.encode, message.slices)
    if isinstance(message, messages.Push) and message.encoded is not None:
        return message.encoded.codec, iter(message.encoded.chunks)
    return FP32.name, (_checked_bytes(piece) for vector in vectors.values() for piece in _slices(vector))


def _slices(vector: Tensor) -> Iterator[Tensor]:
    return (vector[start:stop] for start, stop in chunks(vector.numel())) if vector.numel() else iter((vector,))


def _vectors(message: messages.Message) -> dict[str, Tensor]:
    kind: type = type(message)
    fields = ((name, getattr(message, name)) for name in _hints(kind))
    return {name: value for name, value in fields if isinstance(value, Tensor)}


def _head(message: messages.Message, vectors: dict[str, Tensor], codec: str = FP32.name) -> list[Frame]:
    kind: type = type(message)
    header = {name: _plain(getattr(message, name)) for name in _hints(kind)}
    present = [[name, vector.numel(), codec] for name, vector in vectors.items()]
    packed = msgpack.packb([kind.__name__, header, present])
    if len(packed) > MAX_HEADER_BYTES:
        raise ValueError(
            f"the header of a {kind.__name__} takes {len(packed)} bytes, and at most {MAX_HEADER_BYTES} travel; in a "
            "layer table, shorter names or fewer parameters help"
        )
    return [MAGIC, packed]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return None
    if isinstance(value, Layout):
        return value.to_lists()
    if isinstance(value, messages.Plan):
        return [value.batches_per_epoch, value.epochs]
    return value


def _checked_bytes(tensor: Tensor) -> Frame:
    if tensor.dtype != torch.float32 or tensor.dim() != 1:
        raise TypeError(f"only flat float32 vectors travel, not {tensor.dtype} of shape {tuple(tensor.shape)}")
    return bytes_of(tensor.detach().contiguous())


def decode(frames: Sequence[Frame], expect: type | types.UnionType = messages.Message) -> Any:
    """The message in ``frames``, one of ``expect``. Its vectors use the frames' memory where that is writable.

    Vectors that follow in chunks are only announced: they have a size, and take no memory. Raises WireError.
    """
    return _decode(frames, expect)[0]


def _decode(frames: Sequence[Frame], expect: type | types.UnionType) -> tuple[Any, dict[str, Codec]]:
    """The message, and the codec of each of its vectors."""
    if len(frames) < 2 or bytes(frames[0][:16]) != MAGIC:
        raise WireError("not a message of this version of danaz")
    kind, header, present = _unpack(frames[1])
    if not isinstance(kind, str) or not isinstance(header, dict) or not isinstance(present, list):
        raise WireError("malformed header")
    message_type = MESSAGES.get(kind)
    if message_type is None or not issubclass(message_type, expect):
        raise WireError("unknown or unexpected kind of message")
    sizes, codecs = _announcements(present)
    if len(frames) == 2:
        if sizes and max(sizes.values()) <= SLICE_FLOATS:
            raise WireError("number of tensor frames differs from the header")
        return _build(message_type, header, {name: announced(size) for name, size in sizes.items()}), codecs
    if len(sizes) != len(frames) - 2:
        raise WireError("number of tensor frames differs from the header")
    data = dict(zip(sizes, frames[2:], strict=True))
    message = _build(message_type, header, {name: _tensor(data[name], sizes[name], codecs[name]) for name in sizes})
    return _tell(message, codecs, sum(map(len, data.values()))), codecs


def _tell(message: Any, codecs: dict[str, Codec], nbytes: int) -> Any:
    """The message, with a note of how its push travelled."""
    codec = codecs.get("push", FP32)
    if codec is FP32 or not isinstance(message, messages.Push):
        return message
    return dataclasses.replace(message, encoded=Encoded(codec.name, nbytes))


def _announcements(present: list[Any]) -> tuple[dict[str, int], dict[str, Codec]]:
    """Name -> floats, and name -> codec, of each vector that a header announces."""
    sizes: dict[str, int] = {}
    codecs: dict[str, Codec] = {}
    for entry in present:
        if type(entry) is not list or len(entry) != 3:
            raise WireError("malformed header")
        name, size, codec = entry
        if type(name) is not str or name in sizes or type(size) is not int or size < 0:
            raise WireError("malformed header")
        if size > MAX_FLOATS:
            raise WireError("tensor is too large")
        if type(codec) is not str:
            raise WireError("malformed header")
        try:
            sizes[name], codecs[name] = size, push_codec(codec)
        except UnknownCodecError as error:
            raise WireError("unknown codec") from error
    return sizes, codecs


def _unpack(frame: Frame) -> tuple[Any, Any, Any]:
    if len(frame) > MAX_HEADER_BYTES:
        raise WireError("header too large")
    try:
        kind, header, present = msgpack.unpackb(frame, raw=False, strict_map_key=True)
    # msgpack raises its own errors, ValueError or RecursionError, depending on what is wrong.
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise WireError("header is not readable") from error
    return kind, header, present


def _tensor(frame: Frame, size: int, codec: Codec) -> Tensor:
    if codec is not FP32:
        return _decompressed(frame, size, codec)
    if len(frame) != 4 * size:
        raise WireError("tensor frame has another size than announced")
    if not size:
        return torch.empty(0)
    view = memoryview(frame)
    return torch.frombuffer(bytearray(view) if view.readonly else view, dtype=torch.float32)


def _decompressed(frame: Frame, size: int, codec: Codec) -> Tensor:
    if size > SLICE_FLOATS:
        raise WireError("vector should come in chunks")
    out = torch.empty(size)
    try:
        codec.decode(frame, out)
    except CodecError as error:
        raise WireError("vector is not in its codec") from error
    return out


def _build(message_type: type, header: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    values = {}
    for name, hint in _hints(message_type).items():
        if name not in header:
            raise WireError(f"field {name} is missing")
        try:
            values[name] = _fit(tensors.pop(name, header[name]), hint)
        except messages.OutOfRangeError as error:
            raise WireError(f"field {name} is out of range") from error
        except (TypeError, ValueError) as error:
            raise WireError(f"field {name} has the wrong type") from error
    if tensors or len(values) != len(header):
        raise WireError("fields that this kind of message does not have")
    return message_type(**values)


@cache
def _hints(message_type: type) -> dict[str, Any]:
    """Name -> type of each field that travels, with the range that it declares."""
    hints = typing.get_type_hints(message_type, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(message_type) if not f.metadata.get("local")}


def _fit(value: Any, hint: Any) -> Any:
    """``value`` as the type that a message's field declares. Raises TypeError or ValueError if it does not fit.

    Raises OutOfRangeError if the value has the right type but is not in the declared range.
    """
    return _FITTERS[typing.get_origin(hint) or hint](value, *typing.get_args(hint))


def _limited(value: Any, kind: Any, *limits: Any) -> Any:
    """Fit a value to ``Annotated[kind, *limits]``. The limits come first, so that an overlong value is not walked."""
    for limit in limits:
        limit.check(value)
    return _fit(value, kind)


def _exactly(kind: type) -> Callable[[Any], Any]:
    def fit(value: Any) -> Any:
        if type(value) is not kind:
            raise TypeError(f"{kind.__name__} expected")
        return value

    return fit


def _float(value: Any) -> float:
    if type(value) not in (float, int):
        raise TypeError("float expected")
    return float(value)


def _tuple(value: Any, *items: Any) -> tuple[Any, ...]:
    elements = _exactly(list)(value)
    kinds = [items[0]] * len(elements) if items[-1] is Ellipsis else items
    return tuple(_fit(element, kind) for element, kind in zip(elements, kinds, strict=True))


def _dict(value: Any, key: Any, item: Any) -> dict[Any, Any]:
    return {_fit(k, key): _fit(v, item) for k, v in _exactly(dict)(value).items()}


def _union(value: Any, *choices: Any) -> Any:
    if value is None and type(None) in choices:
        return None
    # str and float, say, have no value in common: at most one of the choices fits.
    for choice in choices:
        if choice is not type(None):
            with suppress(TypeError):
                return _fit(value, choice)
    raise TypeError("no type of the union fits")


def _plan(value: Any) -> messages.Plan:
    hints = _hints(messages.Plan).values()
    plan = messages.Plan(*(_fit(number, hint) for number, hint in zip(_exactly(list)(value), hints, strict=True)))
    messages.Within(1, messages.LARGEST).check(plan.batches)
    return plan


_FITTERS: dict[Any, Callable[..., Any]] = {
    int: _exactly(int),
    str: _exactly(str),
    bool: _exactly(bool),
    Tensor: _exactly(Tensor),
    float: _float,
    tuple: _tuple,
    dict: _dict,
    types.UnionType: _union,
    typing.Union: _union,
    typing.Annotated: _limited,
    messages.Plan: _plan,
    Layout: Layout.from_lists,
}


# ---- messages in chunks ----------------------------------------------------------------------------------------------


class StrayChunkError(WireError):
    """A chunk that belongs to no message under way, for example because its sender has connected again."""


Room = Callable[["Inbox", Any, int], Tensor]
Arrived = Callable[[Any, Tensor], object]


class Assembly:
    """A message whose vectors arrive in chunks, in order."""

    def __init__(
        self, message: messages.Message, codecs: dict[str, Codec], room: Callable[[int], Tensor], arrived: Arrived
    ):
        """``room(n)`` f32[n] gives the memory to receive a vector into; ``arrived`` hears of each slice there."""
        self.message = message
        self._arrived = arrived
        self._codecs = codecs
        self._vectors = {name: room(vector.numel()) for name, vector in _vectors(message).items()}
        self._slices = [(codecs[name], piece) for name, vector in self._vectors.items() for piece in _slices(vector)]
        self._next = 0
        self._bytes = 0
        self._square = 0.0

    def take(self, request: int, number: int, data: Frame) -> messages.Message | None:
        """Take the next chunk; returns the message when it is whole. Raises WireError."""
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
        message: messages.Message = _tell(dataclasses.replace(self.message, **found), self._codecs, self._bytes)
        return message


def _summed(message: Any) -> Any:
    """The message. A push gets the sum of its squares here, so that several readers need only one pass."""
    if not isinstance(message, messages.Push) or not message.push.numel():
        return message
    return dataclasses.replace(message, square=torch.dot(message.push, message.push).item())


class Inbox:
    """Puts the messages of many peers together from what arrives. Each peer has at most one message under way."""

    def __init__(
        self,
        expect: types.UnionType,
        takes: Callable[[Any, Any], bool],
        room: Room,
        arrived: Arrived = lambda message, piece: None,
    ):
        """``takes(peer, message)`` says whether the vectors that a message announces are worth receiving; if not, it
        stays as it is. ``room(inbox, message, n)`` f32[n] is the memory to receive one into. ``arrived(message,
        slice)`` hears of each slice in its room, before the message is whole.
        """
        self._expect, self._takes, self._room, self._arrived = expect, takes, room, arrived
        self._under_way: dict[Hashable, Assembly] = {}

    def take(self, peer: Hashable, frames: Sequence[Frame]) -> Any:
        """The message that ``frames`` are or complete; None while more is to come. Raises WireError."""
        if frames and len(frames[0]) == CHUNK.size:
            return self._take_chunk(peer, frames)
        message, codecs = _decode(frames, self._expect)
        self._under_way.pop(peer, None)
        if not any(map(is_announced, _vectors(message).values())):
            return _summed(message)
        if not self._takes(peer, message):
            return message
        self._under_way[peer] = Assembly(message, codecs, lambda size: self._room(self, message, size), self._arrived)
        return None

    def _take_chunk(self, peer: Hashable, frames: Sequence[Frame]) -> Any:
        magic, request, number = CHUNK.unpack(frames[0])
        if magic != CHUNK_MAGIC or len(frames) != 2:
            raise WireError("not a chunk of this version of danaz")
        assembly = self._under_way.pop(peer, None)
        if assembly is None:
            raise StrayChunkError("chunk of no message under way")
        whole = assembly.take(request, number, frames[1])
        if whole is None:
            self._under_way[peer] = assembly
        return whole

    def forget(self, belongs: Callable[[Any], bool]) -> None:
        """Give up the messages under way for which ``belongs`` is true."""
        for peer in [peer for peer, assembly in self._under_way.items() if belongs(assembly.message)]:
            del self._under_way[peer]
