"""A number that tells two values apart, in whatever processes they are."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import numpy as np
from torch import Tensor

BITS = 32  # so that a float64 holds the sum of the fingerprints of two million ranks exactly


def fingerprint(value: object) -> int:
    """Return a number from 1 below 2^32 that equal values share in all processes.

    It looks into numbers, texts, bytes, arrays, tensors, and lists, tuples, dicts and sets of them. Of anything else it
    sees the type alone, because the rest, such as an address, may differ from process to process.
    """
    found = sha256()
    _feed(found, value)
    return int.from_bytes(found.digest()[: BITS // 8], "big") or 1


def _feed(found: Any, value: object) -> None:
    match value:
        case Tensor():
            plain = value.detach().cpu()
            _feed(found, (plain.float() if plain.is_floating_point() else plain).numpy())  # numpy has no bfloat16
        case np.ndarray() if value.dtype != object:
            found.update(f"{value.shape}{value.dtype.kind}".encode())
            found.update(np.ascontiguousarray(value).tobytes())
        case list() if value and all(isinstance(item, (int, np.integer)) for item in value):
            found.update(f"{len(value)}i".encode())
            found.update(repr(list(map(int, value))).encode())  # a list of a million numbers takes no second
        case Mapping():
            _feed(found, sorted(value.items(), key=lambda item: repr(item[0])))
        case list() | tuple():
            found.update(f"{len(value)}[".encode())
            for item in value:
                _feed(found, item)
        case set() | frozenset():
            _feed(found, sorted(value, key=repr))
        case np.generic():
            _feed(found, value.item())
        case None | bool() | int() | float() | complex() | str() | bytes():
            found.update(repr(value).encode() + b",")
        case _:
            found.update(f"{type(value).__qualname__},".encode())
