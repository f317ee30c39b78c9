"""Slices, shards and other parts of flat vectors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import isfinite

import torch
from torch import Tensor

SLICE_FLOATS = 1 << 18  # 1 MB: a chunk that is sent, and that a rule works on, while it is in cache
ALIGNED_FLOATS = 16  # a line of cache

Span = tuple[int, int]  # (start, stop), as in vector[start:stop]
Spans = tuple[Span, ...]  # ascending, without overlap


def tiles(start: int, stop: int, floats: int | None = None) -> Iterator[Span]:
    """Yield the spans that tile a span. None crosses a multiple of ``floats``, which is SLICE_FLOATS by default."""
    floats = floats or SLICE_FLOATS
    while start < stop:
        end = min(start - start % floats + floats, stop)
        yield start, end
        start = end


def chunks(size: int) -> Iterator[Span]:
    """Yield the spans of the chunks in which a vector f32[size] travels."""
    return tiles(0, size)


def shard_spans(size: int, shards: int) -> list[Span]:
    """Return the span of f32[size] that each of ``shards`` servers holds. Raises ValueError if a span is empty.

    Spans begin at whole lines of cache.
    """
    cuts = [0, *(number * size // shards // ALIGNED_FLOATS * ALIGNED_FLOATS for number in range(1, shards)), size]
    spans = list(pairwise(cuts))
    if any(start >= stop for start, stop in spans):
        raise ValueError(f"a model of {size} parameters is too small for {shards} shards of whole lines of cache")
    return spans


def chunks_of_shards(size: int, shards: int) -> list[list[Span]]:
    """Return, for each shard, the spans within f32[size] of the chunks in which its slice travels.

    Raises ValueError as shard_spans does.
    """
    return [[(at + start, at + stop) for start, stop in chunks(end - at)] for at, end in shard_spans(size, shards)]


def parts(start: int, stop: int, absent: Spans) -> Iterator[tuple[int, int, bool]]:
    """Divide a span where ``absent`` spans begin and end: yield (start, stop, whether it is absent) of each piece."""
    for first, last in absent:
        first, last = max(first, start), min(last, stop)
        if first >= last:
            continue
        if start < first:
            yield start, first, False
        yield first, last, True
        start = last
    if start < stop:
        yield start, stop, False


def present(start: int, stop: int, absent: Spans) -> Iterator[Span]:
    """Yield the pieces of a span that lie in no ``absent`` span."""
    return ((first, last) for first, last, is_absent in parts(start, stop, absent) if not is_absent)


def common_spans(each: Sequence[Spans]) -> Spans:
    """Return the spans that lie in each of several sets of spans."""
    first, *others = each
    for spans in others:
        first = tuple(
            (start + low, start + high) for start, stop in first for low, high in spans_within(spans, start, stop)
        )
    return first


def spans_within(spans: Spans, start: int, stop: int) -> Spans:
    """Return the parts of ``spans`` that lie between ``start`` and ``stop``, counted from ``start``."""
    inside = ((max(first, start) - start, min(last, stop) - start) for first, last in spans)
    return tuple((first, last) for first, last in inside if first < last)


def cut(vectors: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """Return the same slice of each of several vectors, as views."""
    return {name: vector[start:stop] for name, vector in vectors.items()}


def announced(size: int) -> Tensor:
    """Return a vector f32[size] that only announces its size: it has no values and takes no memory."""
    return torch.zeros(1).expand(size)


def is_announced(vector: Tensor) -> bool:
    """Return whether ``vector`` only announces its size."""
    return vector.numel() > 1 and vector.stride() == (0,)


def all_finite(tensor: Tensor) -> bool:
    """Return whether no element is NaN or infinite, in one pass without a temporary."""
    if tensor.numel() == 0 or is_announced(tensor):
        return True
    low, high = torch.aminmax(tensor)
    return isfinite(low.item()) and isfinite(high.item())
