"""A model whose parameters f32[P] and gradients f32[P] lie in flat vectors, and whose buffers become f32[B].

Parameters and gradients of the model become views into the flat vectors, in the order of the optimizer's groups, so
that each group is one slice. A parameter keeps its strides (channels_last stays channels_last).

The vectors are float32. A parameter of another type (bfloat16, float16, float64) keeps memory of its own, and so does
its gradient: ``show_params`` and ``show_gradients`` put the vectors' values there, rounded to its type. What the script
changes there is taken over into the vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from danaz.vectors.cutting import ALIGNED_FLOATS, Spans
from danaz.vectors.layout import Layout

TRAINED_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class FlatModel:
    """A model whose trained parameters and gradients live in two flat vectors."""

    def __init__(self, model: nn.Module, groups: Sequence[Sequence[nn.Parameter]] | None = None):
        """Move the parameters of ``groups`` (default: all that require a gradient, as one group) into a flat vector.

        Raises ValueError if a parameter is of none of the TRAINED_TYPES, is in two groups or does not belong to the
        model, or if the model has more tensors or groups than a layer table holds.
        """
        self.model = model
        if groups is None:
            groups = [[p for p in model.parameters() if p.requires_grad]]
        names = {p: _plain(name) for name, p in model.named_parameters()}
        self.trained = [p for group in groups for p in group]
        _check_trained(self.trained, names)
        rows = [(names[p], tuple(p.shape), _dense_stride(p)) for p in self.trained]
        self._buffers = {
            _plain(name): b
            for name, b in model.named_buffers()
            if b.is_floating_point() and name in model.state_dict(keep_vars=True)
        }
        buffers = [(name, tuple(b.shape), _dense_stride(b)) for name, b in self._buffers.items()]
        sizes = [sum(p.numel() for p in group) for group in groups]
        self.layout = Layout.of(rows, buffers, sizes)
        device = self.trained[0].device
        self.params = torch.empty(0, device=device)  # f32[P]
        # Ranks sum two things at once: flags that say whether each parameter has a gradient, and the gradients.
        flags = -(-len(self.trained) // ALIGNED_FLOATS) * ALIGNED_FLOATS
        self.summed = torch.zeros(flags + self.layout.size, device=device)  # f32[flags + P]
        self.grads = self.summed[flags:]  # f32[P]
        self.has_gradient = [False] * len(self.trained)  # of each parameter, when gradients were last gathered
        self.decayed = torch.empty(self.layout.size, device=device)  # f32[P], for the gradient with its weight decay
        self.grad_views = [entry.of(self.grads) for entry in self.layout.parameters]
        self.sparse: set[str] = set()  # names of parameters that have had a sparse gradient
        self._homes: list[int] = []  # the address of each parameter in ``params``
        self._types = [p.dtype for p in self.trained]
        self._rounded = [number for number, kind in enumerate(self._types) if kind != torch.float32]
        self.make_room(0)

    def make_room(self, floats: int) -> Tensor:
        """Move the parameters to the beginning of a longer vector f32[P + floats], and return that vector."""
        whole = torch.empty(self.layout.size + floats, device=self.params.device)
        self.params = whole[: self.layout.size]
        self._homes = [0] * len(self.trained)
        for number in self._rounded:
            self.layout.parameters[number].of(self.params).copy_(self.trained[number].data)
        self.bring_home()
        return whole

    def bring_home(self) -> None:
        """Bring what the script has done to parameters into the flat vector.

        Those whose memory was replaced (``p.data = …``) move back, with their new values. Where the values of one that
        is not float32 are no longer the vector's, rounded, the vector takes them over. Raises RuntimeError if the
        shape, type or device of a parameter has changed.
        """
        for number, (p, home) in enumerate(zip(self.trained, self._homes, strict=True)):
            if p.data_ptr() == home:
                continue
            entry, kind = self.layout.parameters[number], self._types[number]
            view = entry.of(self.params)
            if p.shape != view.shape or p.dtype != kind or p.device != view.device:
                raise RuntimeError(
                    f"parameter {entry.name} was {kind} of shape {tuple(view.shape)} on {view.device} when "
                    f"DistributedOptimizer was made, and is {p.dtype} of shape {tuple(p.shape)} on {p.device} now. "
                    "Move and convert the model before you wrap the optimizer."
                )
            if kind != torch.float32:
                view.copy_(torch.where(_is_rounded(p.data, view), view, p.data.to(view.dtype)))
                continue
            view.copy_(p.data)
            # The parameter gets its own storage over the same memory: otherwise saving one would save the whole vector.
            p.data = from_dlpack(view)
            self._homes[number] = view.data_ptr()

    def show_params(self) -> None:
        """Give the parameters that are not float32 the values of the flat vector, rounded to their types."""
        for number in self._rounded:
            self.trained[number].data.copy_(self.layout.parameters[number].of(self.params))

    @contextmanager
    def as_float32(self) -> Iterator[None]:
        """Let all parameters be float32 for a while, so that an optimizer's steps and state are not rounded.

        Meanwhile those of other types, and their gradients, are views into the flat vectors.
        """
        self.bring_home()
        kept = [(number, self.trained[number].data, self.trained[number].grad) for number in self._rounded]
        for number, *_ in kept:
            p, view = self.trained[number], self.layout.parameters[number].of(self.params)
            p.grad, p.data = None, view
            p.grad = self.grad_views[number] if self.has_gradient[number] else None
        try:
            yield
        finally:
            for number, data, grad in kept:
                p, view = self.trained[number], self.layout.parameters[number].of(self.params)
                if p.data_ptr() != view.data_ptr():
                    view.copy_(p.data)
                p.grad, p.data = None, data
                p.grad = grad
            self.show_params()

    def gather_gradients(self, indices: range, again: bool = False) -> None:
        """Bring the gradients of these parameters into the flat vector, wherever autograd or the user put them.

        A parameter whose gradient is None counts as zero in the vector, and keeps its None: it makes no step. A sparse
        gradient becomes a dense one. ``again`` says that ``show_gradients`` has put the vector's values into the
        gradients before: where one that is not float32 still has them, the vector keeps its precision.
        """
        strays, homes = [], []
        for number in indices:
            p, view = self.trained[number], self.grad_views[number]
            self.has_gradient[number] = p.grad is not None
            if p.grad is None:
                view.zero_()
                continue
            if p.grad.layout != torch.strided:
                self.sparse.add(self.layout.parameters[number].name)
                p.grad = p.grad.to_dense()
            if p.dtype != torch.float32:
                grad = p.grad.to(view.dtype)
                view.copy_(torch.where(_is_rounded(p.grad, view).all(), view, grad) if again else grad)
                continue
            if p.grad is not view:
                strays.append(p.grad)
                homes.append(view)
            p.grad = view
        if strays:
            torch._foreach_copy_(homes, strays)

    @torch.no_grad()
    def show_gradients(self) -> None:
        """Give each parameter that has a gradient the values of the flat vector as its gradient, in its own type."""
        for number, (p, view) in enumerate(zip(self.trained, self.grad_views, strict=True)):
            if not self.has_gradient[number]:
                continue
            if p.dtype == torch.float32:
                if p.grad is not view:
                    p.grad = view
            elif p.grad is None:
                p.grad = view.to(p.dtype)
            else:
                p.grad.copy_(view)

    @property
    def absent(self) -> Spans:
        """The spans of parameters that had no gradient at the last gathering. Torch does not change such parameters."""
        return self.absent_beside(range(len(self.trained)))

    def absent_beside(self, numbers: range) -> Spans:
        """Return ``absent``, together with the spans of all parameters but those with these ``numbers``."""
        if all(self.has_gradient) and len(numbers) == len(self.trained):
            return ()
        spans: list[tuple[int, int]] = []
        for number, entry in enumerate(self.layout.parameters):
            if (self.has_gradient[number] and number in numbers) or not entry.size:
                continue
            if spans and spans[-1][1] == entry.start:
                spans[-1] = (spans[-1][0], entry.stop)
            else:
                spans.append((entry.start, entry.stop))
        return tuple(spans)

    def buffers(self) -> Tensor:
        """Return a copy of the model's floating-point buffers, f32[B]."""
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
        if p.dtype not in TRAINED_TYPES:
            *most, last = (str(kind).removeprefix("torch.") for kind in TRAINED_TYPES)
            raise ValueError(
                f"parameter {names[p]} is {p.dtype}; danaz trains parameters of the types {', '.join(most)} and "
                f"{last}. Leave it out of the optimizer, or convert it"
            )
        seen.add(p)


def _plain(name: str) -> str:
    """Return the name of a tensor without what torch.compile puts before it, so that compiling changes no name."""
    return name.replace("_orig_mod.", "")


def _is_rounded(tensor: Tensor, exact: Tensor) -> Tensor:
    """Return for each element whether that of ``tensor`` is that of ``exact``, rounded to the type of ``tensor``."""
    rounded = exact.to(tensor.dtype)
    return (rounded == tensor) | (rounded.isnan() & tensor.isnan())


def _dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """Return the tensor's own strides if they leave no holes, otherwise contiguous ones."""
    return torch.empty_like(tensor, memory_format=torch.preserve_format).stride()
