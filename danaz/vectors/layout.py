"""A model as flat vectors: parameters f32[P], gradients f32[P], batch-norm buffers f32[B], and their layer table.

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

Spans = tuple[tuple[int, int], ...]  # (start, stop) each, ascending, without overlap

MAX_TENSORS = 1 << 15  # parameters and buffers of a model, in a layer table
MAX_DIMENSIONS = 64  # of a tensor; torch has the same limit
MAX_GROUPS = 1 << 12  # parameter groups
MAX_FLOATS = 1 << 40  # in a flat vector
MAX_LAYER_NAME = 1000  # characters
RESERVED_NAME = "__metadata__"  # safetensors has another use for it
SLICE_FLOATS = 1 << 18  # 1 MB: a chunk that is sent, and that a rule works on, while it is in cache


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
        """(group, start, stop) of slices that tile the vector. No slice crosses a group or a multiple of ``floats``.

        ``floats`` is SLICE_FLOATS by default.
        """
        floats = floats or SLICE_FLOATS
        for group, (start, stop) in enumerate(self.groups):
            while start < stop:
                end = min(start - start % floats + floats, stop)
                yield group, start, end
                start = end

    def layers(self) -> Iterator[tuple[int, int, int]]:
        """(group, start, stop) of each parameter tensor."""
        group = 0
        for entry in self.parameters:
            if entry.start == self.size:
                return  # it and all after it are empty, and lie in no group
            while entry.start >= self.groups[group][1]:
                group += 1
            yield group, entry.start, entry.stop

    def cut(self, start: int, stop: int) -> Layout:
        """The table of the slice f32[stop - start], without buffers. A tensor that is cut appears as its flat part.

        All groups stay, even if some are empty.
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
        """The inverse of to_lists. Raises ValueError if it is not a dense, complete layout, or exceeds the limits."""
        try:
            parameters, buffers, group_sizes = lists
            _check_limits([*parameters, *buffers], group_sizes)
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


def parts(start: int, stop: int, absent: Spans) -> Iterator[tuple[int, int, bool]]:
    """(start, stop, whether it is absent) of the pieces of a slice that lie in ``absent`` spans, or between them."""
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


def present(start: int, stop: int, absent: Spans) -> Iterator[tuple[int, int]]:
    """(start, stop) of the pieces of a slice that lie in no ``absent`` span."""
    return ((first, last) for first, last, is_absent in parts(start, stop, absent) if not is_absent)


def common_spans(each: Sequence[Spans]) -> Spans:
    """The spans that lie in every one of several sets of spans."""
    first, *others = each
    for spans in others:
        first = tuple(
            (start + low, start + high) for start, stop in first for low, high in spans_within(spans, start, stop)
        )
    return first


def spans_within(spans: Spans, start: int, stop: int) -> Spans:
    """The parts of ``spans`` that lie in this slice, counted from its start."""
    inside = ((max(first, start) - start, min(last, stop) - start) for first, last in spans)
    return tuple((first, last) for first, last in inside if first < last)


Rows = Sequence[tuple[str, Sequence[int], Sequence[int]]]  # name, shape and stride of each tensor


def _check_limits(rows: Rows, groups: Sequence[int]) -> None:
    """Raises ValueError if the layer table exceeds the limits of the models that danaz trains, or could not be saved.

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


def _dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """The tensor's own strides if they leave no holes, otherwise contiguous ones."""
    return torch.empty_like(tensor, memory_format=torch.preserve_format).stride()


class FlatModel:
    """A model whose trained parameters and gradients live in two flat vectors."""

    def __init__(self, model: nn.Module, groups: Sequence[Sequence[nn.Parameter]] | None = None):
        """Move the parameters of ``groups`` (default: all that require a gradient, as one group) into a flat vector.

        Raises ValueError if a parameter is not float32, is in two groups or does not belong to the model, or if the
        model has more tensors or groups than a layer table holds.
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
        buffers = [(name, tuple(b.shape), _dense_stride(b)) for name, b in self._buffers.items()]
        sizes = [sum(p.numel() for p in group) for group in groups]
        _check_limits([*rows, *buffers], sizes)
        self.layout = Layout(_place(rows), _place(buffers), _spans(sizes))
        device = self.trained[0].device
        self.params = torch.empty(0, device=device)  # f32[P]
        # Ranks sum two things at once: flags that say whether each parameter has a gradient, and the gradients.
        flags = -(-len(self.trained) // ALIGNED_FLOATS) * ALIGNED_FLOATS
        self.summed = torch.zeros(flags + self.layout.size, device=device)  # f32[flags + P]
        self.grads = self.summed[flags:]  # f32[P]
        self.has_gradient = [False] * len(self.trained)  # of each parameter, when gradients were last gathered
        self.decayed = torch.empty(self.layout.size, device=device)  # f32[P], for the gradient with its weight decay
        self.grad_views = [entry.of(self.grads) for entry in self.layout.parameters]
        self._homes: list[int] = []  # the address of each parameter in ``params``
        self.make_room(0)

    def make_room(self, floats: int) -> Tensor:
        """Move the parameters to the beginning of a longer vector f32[P + floats], and return that vector."""
        whole = torch.empty(self.layout.size + floats, device=self.params.device)
        self.params = whole[: self.layout.size]
        self._homes = [0] * len(self.trained)
        self.bring_home()
        return whole

    def bring_home(self) -> None:
        """Move parameters whose memory was replaced (``p.data = …``) back into the flat vector, with their new values.

        Raises RuntimeError if the shape, type or device of one has changed.
        """
        for number, (p, home) in enumerate(zip(self.trained, self._homes, strict=True)):
            if p.data_ptr() == home:
                continue
            entry = self.layout.parameters[number]
            view = entry.of(self.params)
            if p.shape != view.shape or p.dtype != view.dtype or p.device != view.device:
                raise RuntimeError(
                    f"parameter {entry.name} was {view.dtype} of shape {tuple(view.shape)} on {view.device} when "
                    f"DistributedOptimizer was made, and is {p.dtype} of shape {tuple(p.shape)} on {p.device} now. "
                    "Move and convert the model before you wrap the optimizer."
                )
            view.copy_(p.data)
            # It gets its own storage over the same memory: otherwise saving part of the model would save all of it.
            p.data = from_dlpack(view)
            self._homes[number] = view.data_ptr()

    def gather_gradients(self, indices: range) -> None:
        """Bring the gradients of these parameters into the flat vector, wherever autograd or the user put them.

        A parameter whose gradient is None counts as zero in the vector, and keeps its None: it makes no step. Raises
        TypeError for a sparse gradient.
        """
        strays, homes = [], []
        for number in indices:
            p, view = self.trained[number], self.grad_views[number]
            self.has_gradient[number] = p.grad is not None
            if p.grad is None:
                view.zero_()
                continue
            if p.grad.is_sparse:
                raise TypeError(
                    f"the gradient of {self.layout.parameters[number].name} is sparse, and danaz sums dense gradients "
                    "alone; look the rows up with sparse=False"
                )
            if p.grad is not view:
                strays.append(p.grad)
                homes.append(view)
            p.grad = view
        if strays:
            torch._foreach_copy_(homes, strays)

    @property
    def absent(self) -> Spans:
        """(start, stop) of parameters that had no gradient at the last gathering; torch does not change such ones."""
        if all(self.has_gradient):
            return ()
        spans: list[tuple[int, int]] = []
        for entry, has_gradient in zip(self.layout.parameters, self.has_gradient, strict=True):
            if has_gradient or not entry.size:
                continue
            if spans and spans[-1][1] == entry.start:
                spans[-1] = (spans[-1][0], entry.stop)
            else:
                spans.append((entry.start, entry.stop))
        return tuple(spans)

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
