"""A model as flat vectors: parameters f32[P], gradients f32[P], batch-norm buffers f32[B], and the table between.

Parameters and gradients of the model become views into the flat vectors, in the order of the optimizer's groups, so
that each group is one slice. A parameter keeps its strides (channels_last stays channels_last).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from operator import index as whole
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

SLICE_FLOATS = 1 << 18  # 1 MB: what travels, and what a rule passes over, while it is in cache


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
        """This tensor as a view into ``flat``."""
        return flat.as_strided(self.shape, self.stride, flat.storage_offset() + self.start)


@dataclass(frozen=True)
class Layout:
    """The layer table: where each parameter and buffer lies, and the slice of each parameter group."""

    parameters: tuple[Entry, ...]
    buffers: tuple[Entry, ...]
    groups: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """P, the number of parameters."""
        return self.parameters[-1].stop if self.parameters else 0

    @property
    def buffer_size(self) -> int:
        return self.buffers[-1].stop if self.buffers else 0

    def slices(self, floats: int | None = None) -> Iterator[tuple[int, int, int]]:
        """(group, start, stop) that tile the vector: no slice crosses a group or a multiple of ``floats``.

        By default, of SLICE_FLOATS.
        """
        floats = floats or SLICE_FLOATS
        for group, (start, stop) in enumerate(self.groups):
            while start < stop:
                end = min(start - start % floats + floats, stop)
                yield group, start, end
                start = end

    def layers(self) -> Iterator[tuple[int, int, int]]:
        """(group, start, stop) of each parameter tensor."""
        for group, (start, stop) in enumerate(self.groups):
            for entry in self.parameters:
                if start <= entry.start < stop:
                    yield group, entry.start, entry.stop

    def cut(self, start: int, stop: int) -> Layout:
        """The table of the slice f32[stop - start], without buffers: of a tensor that is cut, the flat part.

        All groups stay, some of them perhaps empty.
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
        """Name -> contiguous tensor, as a state dict holds them."""
        tensors = [(e.name, e.of(params)) for e in self.parameters] + [(e.name, e.of(buffers)) for e in self.buffers]
        return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors}

    def to_lists(self) -> list[Any]:
        """As plain lists, for the wire."""
        tables = [[[e.name, list(e.shape), list(e.stride)] for e in table] for table in (self.parameters, self.buffers)]
        return [*tables, [stop - start for start, stop in self.groups]]

    @classmethod
    def from_lists(cls, lists: Any) -> Layout:
        """The inverse of to_lists. Raises ValueError on anything that is no dense, complete layout."""
        try:
            parameters, buffers, group_sizes = lists
            layout = cls(_place(parameters), _place(buffers), _spans([whole(size) for size in group_sizes]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"not a layer table: {error}") from error
        if (layout.groups[-1][1] if layout.groups else 0) != layout.size:
            raise ValueError("not a layer table: its groups do not add up to its parameters")
        return layout


def chunks(size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the chunks that a vector f32[size] travels in."""
    return ((start, min(start + SLICE_FLOATS, size)) for start in range(0, size, SLICE_FLOATS))


ALIGNED_FLOATS = 16  # a line of cache


def shard_spans(size: int, shards: int) -> list[tuple[int, int]]:
    """(start, stop) of the slice of f32[size] that each of ``shards`` servers holds.

    Raises ValueError if one is empty.
    """
    cuts = [0, *(number * size // shards // ALIGNED_FLOATS * ALIGNED_FLOATS for number in range(1, shards)), size]
    spans = list(pairwise(cuts))
    if any(start >= stop for start, stop in spans):
        raise ValueError(f"a model of {size} parameters is too small for {shards} shards of whole lines of cache")
    return spans


def chunks_of_shards(size: int, shards: int) -> list[list[tuple[int, int]]]:
    """(start, stop) within f32[size] of the chunks that each shard's slice travels in. Raises ValueError as above."""
    return [[(at + start, at + stop) for start, stop in chunks(end - at)] for at, end in shard_spans(size, shards)]


def _spans(sizes: Sequence[int]) -> tuple[tuple[int, int], ...]:
    if any(size < 0 for size in sizes):
        raise ValueError("a negative size")
    stops = list(accumulate(sizes))
    return tuple(zip([0, *stops[:-1]], stops, strict=True)) if stops else ()


def _place(rows: Sequence[tuple[str, Sequence[int], Sequence[int]]]) -> tuple[Entry, ...]:
    """Lay tensors one behind the other."""
    entries, start = [], 0
    for name, shape, stride in rows:
        entry = Entry(str(name), start, tuple(map(whole, shape)), tuple(map(whole, stride)))
        if not _is_dense(entry.shape, entry.stride):
            raise ValueError(f"{name}: shape {entry.shape} with strides {entry.stride} does not tile its slice")
        entries.append(entry)
        start = entry.stop
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


def _dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """The tensor's own strides where they leave no holes, else contiguous ones."""
    return torch.empty_like(tensor, memory_format=torch.preserve_format).stride()


class FlatModel:
    """A model whose trained parameters and gradients live in two flat vectors."""

    def __init__(self, model: nn.Module, groups: Sequence[Sequence[nn.Parameter]] | None = None):
        """Move the parameters of ``groups`` (default: all that require a gradient, as one group) into a flat vector.

        Raises ValueError when a parameter is not float32, is shared between groups or is not the model's.
        """
        self.model = model
        if groups is None:
            groups = [[p for p in model.parameters() if p.requires_grad]]
        names = {p: name for name, p in model.named_parameters()}
        self.trained = [p for group in groups for p in group]
        _check_trained(self.trained, names)
        rows = [(names[p], tuple(p.shape), _dense_stride(p)) for p in self.trained]
        self._buffers = {
            name: b
            for name, b in model.named_buffers()
            if b.is_floating_point() and name in model.state_dict(keep_vars=True)
        }
        self.layout = Layout(
            _place(rows),
            _place([(name, tuple(b.shape), _dense_stride(b)) for name, b in self._buffers.items()]),
            _spans([sum(p.numel() for p in group) for group in groups]),
        )
        device = self.trained[0].device
        self.params = torch.empty(0, device=device)  # f32[P]
        self.grads = torch.zeros(self.layout.size, device=device)  # f32[P]
        self.decayed = torch.empty(self.layout.size, device=device)  # f32[P], for the gradient with its weight decay
        self.grad_views = [entry.of(self.grads) for entry in self.layout.parameters]
        self.make_room(0)

    def make_room(self, floats: int) -> Tensor:
        """Move the parameters into a longer vector f32[P + floats], which is returned: they are its beginning."""
        whole = torch.empty(self.layout.size + floats, device=self.params.device)
        self.params = whole[: self.layout.size]
        for p, entry in zip(self.trained, self.layout.parameters, strict=True):
            view = entry.of(self.params)
            view.copy_(p.data)
            # With a storage of its own over the same memory: else saving a part of the model would save all of it.
            p.data = from_dlpack(view)
        return whole

    def gather_gradients(self, indices: range) -> None:
        """Bring the gradients of these parameters into the flat vector, wherever autograd or the user put them.

        A gradient of None, which ``zero_grad()`` leaves behind for a parameter the loss does not use, is zero.
        """
        strays, homes = [], []
        for number in indices:
            p, view = self.trained[number], self.grad_views[number]
            if p.grad is None:
                view.zero_()
            elif p.grad is not view:
                strays.append(p.grad)
                homes.append(view)
            p.grad = view
        if strays:
            torch._foreach_copy_(homes, strays)

    def buffers(self) -> Tensor:
        """A copy of the model's floating-point buffers, f32[B]."""
        flat = torch.empty(self.layout.buffer_size)
        for entry, buffer in zip(self.layout.buffers, self._buffers.values(), strict=True):
            entry.of(flat).copy_(buffer)
        return flat

    @torch.no_grad()
    def load_buffers(self, flat: Tensor) -> None:
        """Set the model's floating-point buffers from f32[B]."""
        for entry, buffer in zip(self.layout.buffers, self._buffers.values(), strict=True):
            buffer.copy_(entry.of(flat))


def _check_trained(trained: Sequence[nn.Parameter], names: dict[nn.Parameter, str]) -> None:
    if not trained:
        raise ValueError("the optimizer holds no parameters to train")
    seen: set[nn.Parameter] = set()
    for p in trained:
        if p not in names:
            raise ValueError(f"the optimizer trains a parameter of shape {tuple(p.shape)} that the model does not have")
        if p in seen:
            raise ValueError(f"parameter {names[p]} is in two groups of the optimizer")
        if p.dtype != torch.float32:
            raise ValueError(
                f"parameter {names[p]} is {p.dtype}; danaz trains float32 parameters (use torch.autocast for bfloat16)"
            )
        seen.add(p)
