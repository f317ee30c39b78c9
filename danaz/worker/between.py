"""Small values that the ranks of one worker tell each other. Every rank must make the same calls in the same order."""

from __future__ import annotations

from typing import Any, TypeVar

import msgpack
import torch
from torch import Tensor

from danaz.protocol.messages import MAX_REASON
from danaz.worker.group import Group

Value = TypeVar("Value", float, Tensor)


def mean(group: Group, value: Value) -> Value:
    """Return the mean of every rank's value; a tensor keeps its type and shape."""
    if isinstance(value, Tensor):
        total = value.detach().clone()
        if not total.is_floating_point():
            raise TypeError(f"danaz.mean takes a float or a tensor of floats, not one of {total.dtype}")
    else:
        total = torch.tensor([float(value)], dtype=torch.float64)
    if group.size > 1:
        group.wait(group.sum_async(total, "mean"))
    total /= group.size
    return total if isinstance(value, Tensor) else total.item()


def broadcast_object(group: Group, value: Any) -> Any:
    """Return rank 0's ``value`` on every rank.

    It may hold None, bool, int, float, str, bytes, and lists and dicts of them. Nothing is unpickled. Raises
    TypeError on every rank if rank 0's value holds anything else.
    """
    if group.size == 1:
        _encoded(value)  # raise TypeError here, too, for a value that other ranks could not receive
        return value
    content, complaint = b"", None
    if group.rank == 0:
        try:
            content = _encoded(value)
        except TypeError as error:
            complaint = error
    size = torch.tensor([-1 if complaint else len(content)])
    group.broadcast(object_size=size)
    if size.item() < 0:
        raise complaint or TypeError("danaz.broadcast_object: rank 0 gave a value that cannot be sent; see its message")
    room = torch.zeros(int(size), dtype=torch.uint8)
    if group.rank == 0:
        room.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    group.broadcast(object_content=room)
    return value if group.rank == 0 else msgpack.unpackb(room.numpy().tobytes(), strict_map_key=False)


def _encoded(value: Any) -> bytes:
    try:
        encoded: bytes = msgpack.packb(value, strict_types=True)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(
            "danaz.broadcast_object carries None, bool, int (of 64 bits), float, str, bytes, and lists and dicts of "
            f"them: {error}. Give tuples as lists, and arrays as .tolist()."
        ) from error
    return encoded


def first_text(group: Group, text: str) -> str:
    """Return on every rank the text of the first rank that has one, cut to MAX_REASON characters."""
    text = text[:MAX_REASON]
    if group.size == 1:
        return text
    has_one = torch.zeros(group.size, dtype=torch.float64)
    has_one[group.rank] = bool(text)
    group.wait(group.sum_async(has_one, "has_text"))
    first = next((rank for rank, flag in enumerate(has_one.tolist()) if flag), None)
    codes = torch.zeros(MAX_REASON, dtype=torch.float64)
    if group.rank == first:
        codes[: len(text)] = torch.tensor([ord(character) for character in text], dtype=torch.float64)
    group.wait(group.sum_async(codes, "text"))
    return "".join(chr(int(code)) for code in codes.tolist() if code)
