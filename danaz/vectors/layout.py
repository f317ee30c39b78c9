"""The layer table: where each parameter and buffer of a model lies in its flat vector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from operator import index as whole
from typing import Any

import torch
from torch import Tensor

from danaz.vectors.cutting import tiles

MAX_TENSORS = 1 << 15  # parameters and buffers of a model, in a layer table
MAX_DIMENSIONS = 64  # of a tensor; torch has the same limit
MAX_GROUPS = 1 << 12  # parameter groups
MAX_FLOATS = 1 << 40  # in a flat vector
MAX_LAYER_NAME = 1000  # characters
RESERVED_NAME = "__metadata__"  # safetensors has another use for it

Rows = Sequence[tuple[str, Sequence[int], Sequence[int]]]  # name, shape and stride of each tensor


@dataclass(frozen=True)
class Entry:
    """One tensor's place in a flat vector."""

    name: str
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def stop(self) -> int:
        return self.start + self.size

    def of(self, flat: Tensor) -> Tensor:
        """Return this tensor as a view into ``flat``."""
        return flat.as_strided(self.shape, self.stride, flat.storage_offset() + self.start)


@dataclass(frozen=True)
class Layout:
    """The layer table: where each parameter and buffer lies, and the slice of each parameter group."""

    parameters: tuple[Entry, ...]
    buffers: tuple[Entry, ...]
    groups: tuple[tuple[int, int], ...]

    @cached_property
    def size(self) -> int:
        """P, the number of parameters."""
        return self.parameters[-1].stop if self.parameters else 0

    @property
    def buffer_size(self) -> int:
        return self.buffers[-1].stop if self.buffers else 0

    @classmethod
    def of(cls, parameters: Rows, buffers: Rows, group_sizes: Sequence[int]) -> Layout:
        """Lay tensors one after the other. Raises ValueError if one is not dense, or if the table exceeds the limits.

        ``group_sizes`` are the floats of each parameter group, in the order of the parameters.
        """
        _check_limits([*parameters, *buffers], group_sizes)
        return cls(_place(parameters), _place(buffers), _spans([whole(size) for size in group_sizes]))

    def slices(self, floats: int | None = None) -> Iterator[tuple[int, int, int]]:
        """Yield (group, start, stop) of slices that tile the vector.

        No slice crosses a group or a multiple of ``floats``, which is SLICE_FLOATS by default.
        """
        for group, (start, stop) in enumerate(self.groups):
            for piece in tiles(start, stop, floats):
                yield group, *piece

    def layers(self) -> Iterator[tuple[int, int, int]]:
        """Yield (group, start, stop) of each parameter tensor."""
        group = 0
        for entry in self.parameters:
            if entry.start == self.size:
                return  # this one and all after it are empty, and lie in no group
            while entry.start >= self.groups[group][1]:
                group += 1
            yield group, entry.start, entry.stop

    def cut(self, start: int, stop: int) -> Layout:
        """Return the table of the slice f32[stop - start], without buffers.

        A tensor that is cut appears as its flat part. All groups stay, even if some are empty.
        """
        inside = [e for e in self.parameters if e.start < stop and e.stop > start]
        parts = [(e, max(e.start, start), min(e.stop, stop)) for e in inside]
        rows = [
            (e.name, e.shape, e.stride) if last - first == e.size else (e.name, (last - first,), (1,))
            for e, first, last in parts
        ]
        sizes = [max(0, min(end, stop) - max(begin, start)) for begin, end in self.groups]
        return Layout(_place(rows), (), _spans(sizes))

    def named(self, params: Tensor, buffers: Tensor) -> dict[str, Tensor]:
        """Return name -> contiguous tensor, copied, as a state dict holds them."""
        tensors = [(e.name, e.of(params)) for e in self.parameters] + [(e.name, e.of(buffers)) for e in self.buffers]
        return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors}

    def to_lists(self) -> list[Any]:
        """Return the table as plain lists, for the wire."""
        tables = [[[e.name, list(e.shape), list(e.stride)] for e in table] for table in (self.parameters, self.buffers)]
        return [*tables, [stop - start for start, stop in self.groups]]

    @classmethod
    def from_lists(cls, lists: Any) -> Layout:
        """Read what to_lists wrote. Raises ValueError if it is not dense or complete, or exceeds the limits."""
        try:
            parameters, buffers, group_sizes = lists
            layout = cls.of(parameters, buffers, group_sizes)
        except (TypeError, ValueError) as error:
            raise ValueError(f"not a layer table: {error}") from error
        if (layout.groups[-1][1] if layout.groups else 0) != layout.size:
            raise ValueError("not a layer table: its groups do not add up to its parameters")
        return layout


def _check_limits(rows: Rows, groups: Sequence[int]) -> None:
    """Raise ValueError if the layer table exceeds the limits of the models that danaz trains, or could not be saved.

    A table that passes can be processed in time and memory proportional to its own length.
    """
    if len(rows) > MAX_TENSORS or len(groups) > MAX_GROUPS:
        raise ValueError(
            f"{len(rows)} parameters and buffers in {len(groups)} groups; danaz trains models of at most {MAX_TENSORS} "
            f"parameters and buffers in {MAX_GROUPS} groups"
        )
    names = {name for name, _, _ in rows}
    if len(names) < len(rows) or RESERVED_NAME in names:
        raise ValueError(f"two parameters or buffers have one name, or one is called {RESERVED_NAME}")
    for name, shape, stride in rows:
        if len(name) > MAX_LAYER_NAME or len(shape) > MAX_DIMENSIONS or len(stride) > MAX_DIMENSIONS:
            raise ValueError(
                f"{name[:MAX_LAYER_NAME]} has {len(name)} characters in its name and {len(shape)} dimensions; "
                f"at most {MAX_LAYER_NAME} and {MAX_DIMENSIONS} are possible"
            )
        if prod(max(1, whole(n)) for n in shape) > MAX_FLOATS or any(whole(n) > MAX_FLOATS for n in stride):
            raise ValueError(f"{name} is larger than {MAX_FLOATS} floats")


def _spans(sizes: Sequence[int]) -> tuple[tuple[int, int], ...]:
    if any(size < 0 for size in sizes):
        raise ValueError("a negative size")
    stops = list(accumulate(sizes))
    return tuple(zip([0, *stops[:-1]], stops, strict=True)) if stops else ()


def _place(rows: Rows) -> tuple[Entry, ...]:
    """Lay tensors one after the other. Raises ValueError if one is not dense, or if the vector gets too long."""
    entries, start = [], 0
    for name, shape, stride in rows:
        entry = Entry(str(name), start, tuple(map(whole, shape)), tuple(map(whole, stride)))
        if not _is_dense(entry.shape, entry.stride):
            raise ValueError(f"{name}: shape {entry.shape} with strides {entry.stride} does not tile its slice")
        entries.append(entry)
        start = entry.stop
        if start > MAX_FLOATS:
            raise ValueError(f"more than {MAX_FLOATS} floats")
    return tuple(entries)


def _is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    if len(shape) != len(stride) or any(n < 0 for n in (*shape, *stride)):
        return False
    if 0 in shape:
        return True
    expected = 1
    for step, n in sorted((s, n) for s, n in zip(stride, shape, strict=True) if n != 1):
        if step != expected:
            return False
        expected *= n
    return True
