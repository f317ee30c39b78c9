"""Messages as frames: [magic and version | msgpack header | one raw little-endian f32 frame per tensor].

Decoding trusts nothing: sizes are checked before anything is allocated, and each field against the type its message
declares. Whatever does not fit raises WireError; nothing else ever comes out of decode().
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import msgpack
import torch
from torch import Tensor

from danaz.codecs import Encoded
from danaz.flat import Layout
from danaz.server import messages

MAGIC = b"DANAZ\x01"
MAX_HEADER_BYTES = 4 << 20  # a layer table of some ten thousand layers
MAX_TENSOR_BYTES = 64 << 30

Frame = bytes | bytearray | memoryview


class WireError(ValueError):
    """Frames that are no message of this protocol."""


MESSAGES: dict[str, type] = {
    kind.__name__: kind for kind in (*typing.get_args(messages.Request), *typing.get_args(messages.Reply))
}


def encode(message: messages.Message) -> list[Frame]:
    """Frames of a message. Tensor frames share the tensors' memory, which must not change until they are sent."""
    tensors: list[Frame] = []

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(_bytes_of(value))
            return None
        if isinstance(value, Layout):
            return value.to_lists()
        if isinstance(value, messages.Plan):
            return [value.batches_per_epoch, value.epochs]
        return value

    fields = [(f.name, getattr(message, f.name)) for f in dataclasses.fields(message)]
    header = {name: plain(value) for name, value in fields}
    present = [name for name, value in fields if isinstance(value, Tensor)]
    return [MAGIC, msgpack.packb([type(message).__name__, header, present]), *tensors]


def _bytes_of(tensor: Tensor) -> Frame:
    if tensor.dtype != torch.float32 or tensor.dim() != 1:
        raise TypeError(f"only flat float32 vectors travel, not {tensor.dtype} of shape {tuple(tensor.shape)}")
    return tensor.detach().contiguous().numpy().data.cast("B") if tensor.numel() else b""


def decode(frames: Sequence[Frame], expect: type | types.UnionType = messages.Message) -> Any:
    """The message in ``frames``, one of ``expect``. Its tensors use the frames' memory where that is writable.

    Raises WireError.
    """
    if len(frames) < 2 or bytes(frames[0][:16]) != MAGIC:
        raise WireError("not a message of this version of danaz")
    kind, header, present = _unpack(frames[1])
    if not isinstance(kind, str) or not isinstance(header, dict) or not isinstance(present, list):
        raise WireError("malformed header")
    message_type = MESSAGES.get(kind)
    if message_type is None or not issubclass(message_type, expect):
        raise WireError("unknown or unexpected kind of message")
    if len(present) != len(frames) - 2:
        raise WireError("number of tensor frames differs from the header")
    tensors = {}
    for name, frame in zip(present, frames[2:], strict=True):
        if not isinstance(name, str):
            raise WireError("malformed header")
        tensors[name] = _tensor(frame)
    return _build(message_type, header, tensors)


def _unpack(frame: Frame) -> tuple[Any, Any, Any]:
    if len(frame) > MAX_HEADER_BYTES:
        raise WireError("header too large")
    try:
        kind, header, present = msgpack.unpackb(frame, raw=False, strict_map_key=True)
    # msgpack lets anything from its own errors to ValueError and RecursionError out, by what it trips over.
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise WireError("header is not readable") from error
    return kind, header, present


def _tensor(frame: Frame) -> Tensor:
    if len(frame) % 4 or len(frame) > MAX_TENSOR_BYTES:
        raise WireError("tensor frame is too large or no whole number of floats")
    if not len(frame):
        return torch.empty(0)
    view = memoryview(frame)
    return torch.frombuffer(bytearray(view) if view.readonly else view, dtype=torch.float32)


def _build(message_type: type, header: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    values = {}
    for name, hint in _hints(message_type).items():
        if name not in header:
            raise WireError(f"field {name} is missing")
        try:
            values[name] = _fit(tensors.pop(name, header[name]), hint)
        except (TypeError, ValueError, OverflowError) as error:
            raise WireError(f"field {name} has the wrong type") from error
    if tensors or len(values) != len(header):
        raise WireError("fields that this kind of message does not have")
    return message_type(**values)


@cache
def _hints(message_type: type) -> dict[str, Any]:
    return typing.get_type_hints(message_type)


def _fit(value: Any, hint: Any) -> Any:
    """``value`` as the type that a message's field declares. Raises TypeError or ValueError if it is none."""
    return _FITTERS[typing.get_origin(hint) or hint](value, *typing.get_args(hint))


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


def _tuple(value: Any, item: Any, *_: Any) -> tuple[Any, ...]:
    return tuple(_fit(element, item) for element in _exactly(list)(value))


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
    return messages.Plan(*_tuple(value, int))


_FITTERS: dict[Any, Callable[..., Any]] = {
    int: _exactly(int),
    str: _exactly(str),
    bool: _exactly(bool),
    Tensor: _exactly(Tensor),
    float: _float,
    tuple: _tuple,
    dict: _dict,
    types.UnionType: _union,
    messages.Plan: _plan,
    Encoded: _exactly(Encoded),  # never comes in a header
    Layout: Layout.from_lists,
}
