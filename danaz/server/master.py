"""The master: the parameters θ (or Θ), the rule's vectors, and the arithmetic between a push and the next view."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from math import isfinite
from typing import Literal

import torch
from torch import Tensor

from danaz.flat import Layout
from danaz.rules import Context, Rule
from danaz.server.members import Member

SLICE_FLOATS = 1 << 18  # 1 MB: the vectors of one slice stay in cache while a rule passes over them


class Master:
    """All vectors of a server and its version. Knows nothing of messages, batches or time.

    ``ahead`` gives γ Σⱼ ηⱼvⱼ f32[P] where the velocities live on workers but are at hand (the simulator): then the
    gap of DANA is measured in θ, as everyone else's.
    """

    def __init__(self, rule: Rule, layout: Layout, params: Tensor, ahead: Callable[[], Tensor] | None = None):
        self.rule = rule
        self.layout = layout
        self.params = params.clone()  # f32[P]
        self.ahead = ahead
        self.version = 0
        self._taking_part: list[Member] = []
        self.shared = self._zeros(rule.shared_state)
        self.lr = self.max_lr = (0.0,) * len(layout.groups)  # of the last update, and the largest, per group

    def enter(self, member: Member) -> None:
        """Give a new member its vectors."""
        member.vectors = self._zeros(self.rule.worker_state)
        self.rule.enter(member.vectors, self.params)

    def _zeros(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        return {name: torch.zeros_like(self.params) for name in names}

    def apply(self, push: Tensor, lr: tuple[float, ...], member: Member, lag: int) -> None:
        """Apply one update at the rates ``lr`` (one a group), in place. ``push`` f32[P] may be overwritten."""
        self.max_lr = tuple(map(max, self.max_lr, lr))
        contexts = self._contexts(member, lr, lag)
        vectors = self._vectors(member)
        for group, start, stop in self.layout.slices(SLICE_FLOATS):
            own, shared = cut(vectors, start, stop), cut(self.shared, start, stop)
            self.rule.apply(self.params[start:stop], push[start:stop], own, shared, contexts[group])
        self.version, self.lr = self.version + 1, lr

    def apply_round(
        self, pushes: Sequence[tuple[Tensor, float]], lr: tuple[float, ...], members: Sequence[Member], lag: int
    ) -> None:
        """Apply what all ``members`` of a round pushed, each with its weight, as one update."""
        self.max_lr = tuple(map(max, self.max_lr, lr))
        contexts = self._contexts(members[-1], lr, lag)
        vectors = [self._vectors(member) for member in members]
        slices = self.layout.layers() if self.rule.per_layer else self.layout.slices(SLICE_FLOATS)
        for group, start, stop in slices:
            parts = [(push[start:stop], weight) for push, weight in pushes]
            owns, shared = [cut(own, start, stop) for own in vectors], cut(self.shared, start, stop)
            self.rule.apply_round(self.params[start:stop], parts, owns, shared, contexts[group])
        self.version, self.lr = self.version + 1, lr

    def view(self, member: Member) -> Tensor:
        """The parameters ``member`` is to compute on next, f32[P].

        A fresh buffer each time: the transport may still be sending the last one.
        """
        view = torch.empty_like(self.params)
        contexts = self._contexts(member, self.lr, lag=0)
        for group, start, stop in self.layout.slices(SLICE_FLOATS):
            own, shared = cut(member.vectors, start, stop), cut(self.shared, start, stop)
            self.rule.view(view[start:stop], self.params[start:stop], own, shared, contexts[group])
        return view

    def resum(self, members: Iterable[Member]) -> None:
        """Sum the velocities of those who take part afresh."""
        self._taking_part = list(members)
        taking_part = [(m, self._contexts(m, self.lr, lag=0)) for m in self._taking_part]
        for group, start, stop in self.layout.slices(SLICE_FLOATS):
            workers = [(cut(m.vectors, start, stop), contexts[group]) for m, contexts in taking_part]
            self.rule.resum(cut(self.shared, start, stop), workers)

    def _contexts(self, member: Member, lr: tuple[float, ...], lag: int) -> list[Context]:
        """The scalars of each parameter group."""
        return [
            Context(*rates, lag, self.version, member.updates, len(self._taking_part), group)
            for group, rates in enumerate(zip(lr, member.lr, self.max_lr, strict=True))
        ]

    def _vectors(self, member: Member) -> dict[str, Tensor]:
        """The member's vectors, with those that its rule asks for beside them."""
        vectors = dict(member.vectors)
        if self.rule.needs_view:
            assert member.view is not None, "a rule that needs views sees every one that is sent"
            vectors["view"] = member.view
        if self.rule.gossips:
            others = [m for m in self._taking_part if m is not member] or [member]
            vectors["neighbour"] = random.Random(self.version).choice(others).vectors["local"]
        return vectors

    def gap(self, view: Tensor) -> float | None:
        """G(θ − θ̂ᵢ) for the last view f32[P] sent to a worker (arXiv 1907.11612, section 3), None if not finite."""
        delta = self.params - view
        if self.ahead is not None and self._on_lookahead:
            delta.add_(self.ahead())
        gap = layerwise_gap(delta, self.layout)
        return gap if isfinite(gap) else None

    @property
    def gap_of(self) -> Literal["parameters", "lookahead"]:
        """What the gap is a difference of: θ, or Θ where only that is at hand."""
        return "lookahead" if self._on_lookahead and self.ahead is None else "parameters"

    @property
    def _on_lookahead(self) -> bool:
        return self.rule.pushes == "displacement"

    @property
    def l2(self) -> float | None:
        """‖params‖₂, None if it is not finite."""
        norm = float(torch.linalg.vector_norm(self.params.double()))
        return norm if isfinite(norm) else None


def layerwise_gap(delta: Tensor, layout: Layout) -> float:
    """G(Δ) = Σ over layers ψ of ‖Δψ‖₂ / √(size of ψ), for Δ f32[P]."""
    layers = [e for e in layout.parameters if e.size]
    norms = torch.stack(torch._foreach_norm([delta[e.start : e.stop] for e in layers]))
    return float((norms / torch.tensor([e.size for e in layers], device=delta.device).sqrt()).sum())


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite, in one pass without a temporary."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)
    return isfinite(low.item()) and isfinite(high.item())


def cut(vectors: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {name: vector[start:stop] for name, vector in vectors.items()}
