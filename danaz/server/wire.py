"""Messages as frames: [magic and version | msgpack header | one raw little-endian f32 frame per tensor].

Decoding trusts nothing: sizes are checked before anything is allocated, and each field against the type its message
declares. Whatever does not fit raises WireError; nothing else ever comes out of decode().
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

import msgpack
import torch
from torch import Tensor

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
    return memoryview(tensor.detach().contiguous().numpy()).cast("B") if tensor.numel() else b""


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
    for name, check in _checks(message_type).items():
        if name not in header:
            raise WireError(f"field {name} is missing")
        values[name] = check(tensors.pop(name, header[name]))
    if tensors or len(values) != len(header):
        raise WireError("fields that this kind of message does not have")
    return message_type(**values)


_CHECKS: dict[type, dict[str, Callable[[Any], Any]]] = {}


def _checks(message_type: type) -> dict[str, Callable[[Any], Any]]:
    if message_type not in _CHECKS:
        hints = typing.get_type_hints(message_type)
        _CHECKS[message_type] = {name: _checker(name, hint) for name, hint in hints.items()}
    return _CHECKS[message_type]


def _checker(name: str, hint: Any) -> Callable[[Any], Any]:
    """A function that returns a value as the field's type, or raises WireError."""

    def wrong() -> WireError:
        return WireError(f"field {name} has the wrong type")

    def check(value: Any, hint: Any = hint) -> Any:
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            return _first_fitting(value, arguments)
        if origin is tuple and isinstance(value, (list, tuple)):
            return tuple(check(item, arguments[0]) for item in value)
        if origin is dict and isinstance(value, dict):
            return {check(k, arguments[0]): check(v, arguments[1]) for k, v in value.items()}
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if hint is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if hint in (Layout, messages.Plan) and isinstance(value, list):
            return _structure(value, hint)
        if hint in (str, float, bool, Tensor) and isinstance(value, hint):
            return value
        raise wrong()

    def _structure(value: list[Any], hint: Any) -> Any:
        try:
            return Layout.from_lists(value) if hint is Layout else messages.Plan(*(check(n, int) for n in value))
        except (ValueError, TypeError) as error:
            raise wrong() from error

    def _first_fitting(value: Any, choices: Sequence[Any]) -> Any:
        if value is None and type(None) in choices:
            return None
        for choice in choices:
            if choice is not type(None):
                try:
                    return check(value, choice)
                except WireError:
                    continue
        raise wrong()

    return check
