"""Messages as frames: [magic and version | msgpack header | one frame per vector, in the codec that the header names].

A message with a vector longer than a slice travels as several messages. The first has two frames, which announce the
sizes of the vectors. Then each slice of each vector follows as [magic, request, number of the chunk | bytes]. So the
receiver checks and applies the first slices while the last are on their way, and neither side allocates a message of
100 MB.

Decoding trusts nothing. It checks each field against the type and the range that its message declares, and the sizes of
vectors before it allocates anything for them. Whatever does not fit raises WireError; decoding raises nothing else.
"""

from __future__ import annotations

import dataclasses
import struct
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from math import ceil
from typing import Any

import msgpack
import torch
from torch import Tensor

from danaz.optimizers import Optimizers, Sgd, optimizers_from_lists, optimizers_to_lists
from danaz.protocol import messages
from danaz.protocol.messages import Streamed
from danaz.vectors.codecs import FP32, Codec, CodecError, Encoded, UnknownCodecError, bytes_of, push_codec
from danaz.vectors.cutting import SLICE_FLOATS, announced, chunks, is_announced
from danaz.vectors.layout import MAX_FLOATS, MAX_GROUPS, Layout

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
    """Return the frames of a whole message. They share the tensors' memory, which must not change until they are sent.

    Announced vectors are announced again. Raises ValueError if the header is too large to travel.
    """
    vectors = vectors_of(message)
    frames = [] if any(map(is_announced, vectors.values())) else [_checked_bytes(vector) for vector in vectors.values()]
    return [*_head(message, vectors), *frames]


def split(message: messages.Message | Streamed) -> Iterator[list[Frame]]:
    """Yield the messages as which ``message`` travels, each as frames. A Streamed is computed while it is sent."""
    header: messages.Message = message.header if isinstance(message, Streamed) else message
    announces = vectors_of(header)
    codec, pieces = _encoded(message, announces)
    if max((vector.numel() for vector in announces.values()), default=0) <= SLICE_FLOATS:
        yield [*_head(header, announces, codec), *pieces]
        return
    assert not isinstance(header, messages.Heartbeat), "it has no vectors"
    yield _head(header, announces, codec)
    for number, piece in enumerate(pieces):
        yield [CHUNK.pack(CHUNK_MAGIC, header.request, number), piece]


def count_messages(message: messages.Message | Streamed) -> int:
    """Return how many messages ``split`` makes of ``message``."""
    sizes = [
        vector.numel() for vector in vectors_of(message.header if isinstance(message, Streamed) else message).values()
    ]
    return 1 if max(sizes, default=0) <= SLICE_FLOATS else 1 + sum(max(1, ceil(size / SLICE_FLOATS)) for size in sizes)


def _encoded(message: messages.Message | Streamed, vectors: dict[str, Tensor]) -> tuple[str, Iterator[Frame]]:
    """Return the name of the codec of a message's vectors, and their encoded slices."""
    if isinstance(message, Streamed):
        return message.codec.name, map(message.codec.encode, message.slices)
    if isinstance(message, messages.Push) and message.encoded is not None:
        return message.encoded.codec, iter(message.encoded.chunks)
    return FP32.name, (_checked_bytes(piece) for vector in vectors.values() for piece in slices_of(vector))


def slices_of(vector: Tensor) -> Iterator[Tensor]:
    """Return the slices that ``vector`` travels in, as views. An empty vector travels as one empty slice."""
    return (vector[start:stop] for start, stop in chunks(vector.numel())) if vector.numel() else iter((vector,))


def vectors_of(message: messages.Message) -> dict[str, Tensor]:
    """Return the vectors of a message by the names of their fields."""
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
    if isinstance(value, Optimizers):
        return optimizers_to_lists(value)
    if isinstance(value, messages.Plan):
        return [value.batches_per_epoch, value.epochs, *([list(value.lengths)] if value.lengths else [])]
    if isinstance(value, (messages.Machine, messages.Spent)):
        return list(vars(value).values())
    return value


def _checked_bytes(tensor: Tensor) -> Frame:
    if tensor.dtype != torch.float32 or tensor.dim() != 1:
        raise TypeError(f"only flat float32 vectors travel, not {tensor.dtype} of shape {tuple(tensor.shape)}")
    return bytes_of(tensor.detach().contiguous())


def decode(frames: Sequence[Frame], expect: type | types.UnionType = messages.Message) -> Any:
    """Return the message in ``frames``, one of ``expect``. Its vectors use the frames' memory where that is writable.

    Vectors that follow in chunks are only announced: they have a size, and take no memory. Raises WireError.
    """
    return decode_with_codecs(frames, expect)[0]


def decode_with_codecs(frames: Sequence[Frame], expect: type | types.UnionType) -> tuple[Any, dict[str, Codec]]:
    """Like ``decode``, but return the message and the codec of each of its vectors."""
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
    return as_travelled(message, codecs, sum(map(len, data.values()))), codecs


def as_travelled(message: Any, codecs: dict[str, Codec], nbytes: int) -> Any:
    """Return the message. If it is a push that travelled in a lossy codec, it says in which, and in how many bytes."""
    codec = codecs.get("push", FP32)
    if codec is FP32 or not isinstance(message, messages.Push):
        return message
    return dataclasses.replace(message, encoded=Encoded(codec.name, nbytes))


def _announcements(present: list[Any]) -> tuple[dict[str, int], dict[str, Codec]]:
    """Return name -> floats, and name -> codec, of each vector that a header announces."""
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
    if message_type is messages.Join and "momentum" in header:
        # A recording of an earlier version: there, every worker had SGD.
        header["optimizers"] = optimizers_to_lists(Optimizers([Sgd(_float(header.pop("momentum")))]))
    for name, default in _later_defaults(message_type).items():
        header.setdefault(name, default)
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


def read_chunk(frames: Sequence[Frame]) -> tuple[int, int, Frame] | None:
    """Return request, number and bytes if ``frames`` are a chunk, or None if not. Raises WireError."""
    if not frames or len(frames[0]) != CHUNK.size:
        return None
    magic, request, number = CHUNK.unpack(frames[0])
    if magic != CHUNK_MAGIC or len(frames) != 2:
        raise WireError("not a chunk of this version of danaz")
    return request, number, frames[1]


@cache
def _hints(message_type: type) -> dict[str, Any]:
    """Return name -> type of each field that travels, with the range that it declares."""
    hints = typing.get_type_hints(message_type, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(message_type) if not f.metadata.get("local")}


@cache
def _later_defaults(message_type: type) -> dict[str, Any]:
    """Return what the fields hold that recordings of earlier versions do not have, as a header has them."""
    return {f.name: _plain(f.default) for f in dataclasses.fields(message_type) if f.metadata.get("later")}


def _fit(value: Any, hint: Any) -> Any:
    """Return ``value`` as the type that a message's field declares. Raises TypeError or ValueError if it does not fit.

    Raises OutOfRangeError if the value has the right type but is not in the declared range.
    """
    return _FITTERS[typing.get_origin(hint) or hint](value, *typing.get_args(hint))


def _limited(value: Any, kind: Any, *limits: Any) -> Any:
    """Fit a value to ``Annotated[kind, *limits]``. The limits come first, so that an overlong value is not read."""
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
    # The choices, such as str and float, have no value in common: at most one of them fits.
    for choice in choices:
        if choice is not type(None):
            with suppress(TypeError):
                return _fit(value, choice)
    raise TypeError("no type of the union fits")


def _row(kind: type) -> Callable[[Any], Any]:
    """Return what reads a message's part, which travels as the list of its fields."""

    def fit(value: Any) -> Any:
        hints = _hints(kind).values()
        return kind(*(_fit(each, hint) for each, hint in zip(_exactly(list)(value), hints, strict=True)))

    return fit


def _plan(value: Any) -> messages.Plan:
    hints = list(_hints(messages.Plan).values())
    has_lengths = len(_exactly(list)(value)) == len(hints)
    hints = hints if has_lengths else hints[:-1]  # a plan whose epochs are alike has none
    plan = messages.Plan(*(_fit(number, hint) for number, hint in zip(value, hints, strict=True)))
    if has_lengths and messages.Plan.of(plan.lengths or (0,)) != plan:
        raise ValueError("lengths do not fit the number of epochs or the first of them")
    messages.Within(1, messages.LARGEST).check(plan.batches)
    return plan


def _optimizers(value: Any) -> Optimizers:
    match value:
        case [str(), list(groups)]:
            messages.AtMost(MAX_GROUPS).check(groups)
    return optimizers_from_lists(value)


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
    messages.Machine: _row(messages.Machine),
    messages.Spent: _row(messages.Spent),
    Layout: Layout.from_lists,
    Optimizers: _optimizers,
}
