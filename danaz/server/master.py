"""The master holds the parameters θ (or Θ) and the rule's vectors, and computes the next view from a push."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, isfinite, sqrt
from typing import Literal

import torch
from torch import Tensor

from danaz.rules import Context, Rule
from danaz.server.members import Member
from danaz.vectors.codecs import FP32, Codec
from danaz.vectors.counts import Counts
from danaz.vectors.cutting import Spans, all_finite, chunks, cut, present
from danaz.vectors.gap import Layers
from danaz.vectors.layout import Layout

# While the norms of all vectors and of a push, and its rates, are below these, no rule can leave the range of float32.
TAME = 1e9
TAME_LR = 1e3
LARGEST = 2.0**120  # the largest element after an update: the sum of a few of these, as in a view, is still finite


class UnsettledError(RuntimeError):
    """The parameters were read while an update was only partly applied."""

    def __init__(self, version: int):
        super().__init__(
            f"update {version} is only partly applied: take the next view to its end, or call settle(), "
            "before you read the parameters"
        )


class Master:
    """All vectors of a server, and their version. It knows nothing of messages, batches or time.

    An update is applied slice by slice while the next view is taken, so that the first slices of the view leave while
    the last ones are computed. ``settle`` applies what is left of it. All methods that change vectors settle first;
    ``params`` and everything else that only reads raise UnsettledError until the update is complete. So only the thread
    that changes the master ever drives an update. Settle also before you look at ``shared`` or at a member's vectors.

    No update leaves anything that is not finite. The master keeps a bound on the norms of all vectors, from squares
    that it sums while each slice is in cache. An update that begins with large norms is applied at once, on trial; if
    its result is not finite, the vectors are restored to the bit.

    ``ahead`` returns γ Σⱼ ηⱼvⱼ f32[P] where workers hold the velocities but the caller has them at hand (the
    simulator). Then the gap of DANA is measured in θ, as it is for all other algorithms.
    """

    def __init__(
        self,
        rule: Rule,
        layout: Layout,
        params: Tensor,
        ahead: Callable[[], Tensor] | None = None,
        view_codec: Codec = FP32,
    ):
        self.rule = rule
        self.layout = layout
        self._params = params.clone()  # f32[P]: [:_applied] is of this version, the rest of the version before
        self._applied = layout.size
        self._applying: Iterator[int] = iter(())  # each step applies one slice and yields where that ends
        self._squares: list[Tensor] = []  # ‖·‖² of each slice of the last update, f32[] each
        self._norm: float | None = None  # at least the largest ‖·‖₂ of a vector; None: it must be measured anew
        self.ahead = ahead
        self.view_codec = view_codec
        self.version = 0
        self._taking_part: list[Member] = []
        self.shared = self._zeros(rule.shared_state)
        self.shared_counts = Counts.of(layout.size)  # gradients in each element of the shared state, and the last rate
        self._slice = torch.empty_like(self._params[slice(*next(chunks(layout.size)))])  # scratch
        self.layers = Layers(layout)
        self.max_lr = (0.0,) * len(layout.groups)  # the largest rate so far, per group

    @property
    def params(self) -> Tensor:
        """The parameters, f32[P]. Raises UnsettledError."""
        if self._applied < self.layout.size:
            raise UnsettledError(self.version)
        return self._params

    def settle(self) -> None:
        """Apply the rest of the last update. After that, its push is no longer needed."""
        self._apply_up_to(self.layout.size)
        if self._norm is not None and self._squares:
            square = torch.stack(self._squares).sum().item()
            self._norm = max(self._norm, sqrt(square) if isfinite(square) else inf)
        self._squares.clear()

    def enter(self, member: Member) -> None:
        """Give a new member its vectors."""
        self.settle()
        member.vectors = self._zeros(self.rule.worker_state)
        member.counts = Counts.of(self.layout.size)
        self.rule.enter(member.vectors, self.params)

    def _zeros(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        return {name: torch.zeros_like(self._params) for name in names}

    def apply(
        self, push: Tensor, norm: float, lr: tuple[float, ...], member: Member, lag: int, absent: Spans = ()
    ) -> bool:
        """Apply one update at the rates ``lr`` (one for each group), in place.

        Returns False, and changes nothing, if the result would not be finite. Parameters in ``absent`` spans make no
        step. ``push`` f32[P], whose ‖·‖₂ is ``norm``, may be overwritten. It must stay until the next view is taken, or
        ``settle`` is called.
        """
        self.settle()
        max_lr, vectors = tuple(map(max, self.max_lr, lr)), self._vectors(member)
        slices = self._apply(push, self._contexts(member, lag, lr, max_lr), vectors, absent)
        if self._is_tame(norm, lr):
            self._applying, self._applied = slices, 0
            if self.rule.push_moves_view:
                self._norm = self._bound() + norm
        elif not self._try(slices, [vectors]):
            return False
        self._count([member], lr, absent)
        self.version, self.max_lr = self.version + 1, max_lr
        return True

    def _count(self, members: Sequence[Member], lr: tuple[float, ...], absent: Spans) -> None:
        """Count a gradient in the states of ``members`` and in the shared state, outside of the ``absent`` spans."""
        for member in members:
            member.counts = member.counts.plus_one(self.layout.groups, lr, absent)
        self.shared_counts = self.shared_counts.plus_one(self.layout.groups, lr, absent)

    def _apply(self, push: Tensor, contexts: Contexts, vectors: dict[str, Tensor], absent: Spans) -> Iterator[int]:
        for group, begin, end in self.layout.slices():
            for start, stop, ctx in contexts.of(group, present(begin, end, absent)):
                own, shared = cut(vectors, start, stop), cut(self.shared, start, stop)
                self.rule.apply(self._params[start:stop], push[start:stop], own, shared, ctx)
                if not self.rule.push_moves_view:  # else the norm of the push bounds what the update adds
                    self._measure(self._params[start:stop], own, shared)
            yield end

    def _apply_up_to(self, stop: int) -> None:
        while self._applied < stop:
            self._applied = next(self._applying)

    def apply_round(
        self,
        pushes: Sequence[tuple[Tensor, float]],
        norm: float,
        lr: tuple[float, ...],
        members: Sequence[Member],
        lag: int,
        absent: Spans = (),
    ) -> bool:
        """Apply what all ``members`` of a round pushed, each with its weight, as one update, as ``apply`` does.

        ``norm`` is the largest ‖·‖₂ of a push.
        """
        self.settle()
        max_lr, vectors = tuple(map(max, self.max_lr, lr)), [self._vectors(member) for member in members]
        slices = self._apply_round(pushes, self._contexts(members[-1], lag, lr, max_lr), vectors, absent)
        if self._is_tame(norm, lr):
            exhaust(slices)
        elif not self._try(slices, vectors):
            return False
        self._count(members, lr, absent)
        self.version, self.max_lr = self.version + 1, max_lr
        return True

    def _apply_round(
        self,
        pushes: Sequence[tuple[Tensor, float]],
        contexts: Contexts,
        vectors: Sequence[dict[str, Tensor]],
        absent: Spans,
    ) -> Iterator[int]:
        slices = self.layout.layers() if self.rule.per_layer else self.layout.slices()
        pieces = (piece for group, begin, end in slices for piece in contexts.of(group, present(begin, end, absent)))
        for start, stop, ctx in pieces:
            parts = [(push[start:stop], weight) for push, weight in pushes]
            owns, shared = [cut(own, start, stop) for own in vectors], cut(self.shared, start, stop)
            self.rule.apply_round(self._params[start:stop], parts, owns, shared, ctx)
            self._measure(self._params[start:stop], *owns, shared)
            yield stop

    # ---- nothing that is not finite ------------------------------------------------------------------------------

    def _measure(self, params: Tensor, *vectors: dict[str, Tensor]) -> None:
        """Sum the squares of slices that an update has just written, while they are in cache."""
        written = [params, *(vector for each in vectors for name, vector in each.items() if name != "view")]
        self._squares += [torch.dot(each, each) for each in written]

    def _is_tame(self, norm: float, lr: tuple[float, ...]) -> bool:
        """Return whether an update by a push of this norm, at these rates, is sure to be finite."""
        return self._bound() <= TAME and norm <= TAME and max(lr) <= TAME_LR

    def _bound(self) -> float:
        """Return an upper bound on the ‖·‖₂ of each vector that takes part; measure it if it is not known."""
        if self._norm is None:
            members = (vector for member in self._taking_part for vector in member.vectors.values())
            norms = [torch.linalg.vector_norm(each).item() for each in (self.params, *self.shared.values(), *members)]
            self._norm = max(norms) if all(map(isfinite, norms)) else inf
        return self._norm

    def _try(self, slices: Iterator[int], vectors: Sequence[dict[str, Tensor]]) -> bool:
        """Make an update at once. If its result is not finite, or too large, restore the vectors and return False."""
        owns = (vector for own in vectors for name, vector in own.items() if name != "view")
        written = [self._params, *self.shared.values(), *owns]
        before = [vector.clone() for vector in written]
        exhaust(slices)
        self._norm = None
        if all(is_within(vector, LARGEST) for vector in written):
            return True
        for vector, old in zip(written, before, strict=True):
            vector.copy_(old)
        return False

    @property
    def is_finite(self) -> bool:
        """Whether all parameters are finite. A user's own rule, or the first parameters, may make some that are not.

        Raises UnsettledError.
        """
        params = self.params
        is_bounded = self._norm is not None and not self._squares and isfinite(self._norm)
        return is_bounded or all_finite(params)

    def add(self, given: Tensor) -> bool:
        """Add what a worker gives back, f32[P]; this is no update.

        Returns False, and adds nothing, if the sum is not finite or close to that.
        """
        self.settle()
        total = self.params + given
        if not is_within(total, LARGEST):
            return False
        self.replace(total)
        return True

    def replace(self, params: Tensor) -> None:
        """Go on from other parameters f32[P]."""
        self.settle()
        self.params.copy_(params)
        self._norm = None

    def begin_with(self, member: Member, vectors: Mapping[str, Tensor], counts: Counts, ahead: Tensor) -> None:
        """Start from an optimizer's state f32[P] each, with its ``counts``, where all of it is zero.

        The parameters become those of which ``ahead`` f32[P] is the look-ahead. ``member`` is the only worker.
        """
        self.replace(self.params - ahead)
        for name, vector in vectors.items():
            (self.shared if name in self.shared else member.vectors)[name].copy_(vector)
        self.shared_counts = member.counts = counts
        rates = ([rate for *_, rate in counts.runs(*group)] for group in self.layout.groups)
        self.max_lr = tuple(max(each, default=0.0) for each in rates)

    def take_view(self, member: Member, keep: bool, ahead: bool = False) -> Iterator[Tensor]:
        """Compute the view that ``member`` gets next, slice by slice: f32[n] each, as cutting.chunks cuts f32[P].

        Before each slice of the view, the last update is applied up to the end of that slice. A slice is valid until
        the next one is taken. With ``keep``, the view becomes ``member.view``, or ``member.ahead_view`` if it is sent
        ``ahead`` of its time. Raises RuntimeError if another update came in between: a view is of one version.
        """
        kept = None
        if keep and ahead:
            kept = member.ahead_view = (
                torch.empty_like(self._params) if member.ahead_view is None else member.ahead_view
            )
        elif keep:
            kept = member.view = torch.empty_like(self._params) if member.view is None else member.view
        return self._take_view(self.version, self._contexts(member), member, kept)

    def _take_view(self, version: int, contexts: Contexts, member: Member, kept: Tensor | None) -> Iterator[Tensor]:
        slices = self.layout.slices()
        for start, stop in chunks(self.layout.size):
            if self.version != version:
                raise RuntimeError(f"a view of version {version} was asked for when the master was at {self.version}")
            self._apply_up_to(stop)
            if self.rule.view_is_state and kept is None and self.view_codec is FP32:
                yield self._params[start:stop]
                continue
            out = self._slice[: stop - start] if kept is None else kept[start:stop]
            at = start
            while at < stop:
                group, at, end = next(slices)
                for first, last, ctx in contexts.of(group, [(at, end)]):
                    own, shared = cut(member.vectors, first, last), cut(self.shared, first, last)
                    self.rule.view(out[first - start : last - start], self._params[first:last], own, shared, ctx)
                at = end
            if self.view_codec is not FP32:
                seen = out.cpu()  # by the worker, once it has decoded it
                self.view_codec.decode(self.view_codec.encode(seen), seen)
                out.copy_(seen)
            yield out

    def resum(self, members: Iterable[Member]) -> None:
        """Sum again the velocities of ``members``, who take part."""
        self.settle()
        before, self._taking_part = self._taking_part, list(members)
        if list(map(id, before)) != list(map(id, self._taking_part)):
            self._norm = None  # a member that joins, or comes back, has vectors of its own
        taking_part = [(m, self._contexts(m)) for m in self._taking_part]
        counts = [self.shared_counts, *(member.counts for member in self._taking_part)]
        edges = sorted({edge for each in counts for edge in each.stops})  # between two, all counts stay the same
        for group, begin, end in self.layout.slices():
            inner = [edge for edge in edges if begin < edge < end]
            for start, stop in pairwise([begin, *inner, end]):
                workers = [
                    (cut(m.vectors, start, stop), ctx)
                    for m, contexts in taking_part
                    for _, _, ctx in contexts.of(group, [(start, stop)])
                ]
                self.rule.resum(cut(self.shared, start, stop), workers)

    def _contexts(
        self,
        member: Member,
        lag: int = 0,
        lr: tuple[float, ...] | None = None,
        max_lr: tuple[float, ...] | None = None,
    ) -> Contexts:
        """Return the scalars of an update at the rates ``lr``, one for each group; without them, of a reply."""
        scalars = max_lr or self.max_lr, lag, self.version, len(self._taking_part)
        return Contexts(member.counts, self.shared_counts, lr, *scalars)

    def _vectors(self, member: Member) -> dict[str, Tensor]:
        """Return the member's vectors, and the others that its rule asks for."""
        vectors = dict(member.vectors)
        if self.rule.needs_view:
            assert member.view is not None, "a rule that needs views sees every one that is sent"
            vectors["view"] = member.view
        if self.rule.gossips:
            others = [m for m in self._taking_part if m is not member] or [member]
            vectors["neighbour"] = random.Random(self.version).choice(others).vectors["local"]
        return vectors

    def squares(self, view: Tensor) -> Tensor:
        """Return ‖Δ‖² of each layer, f64[layers], for Δ = θ − ``view`` f32[P], the last view sent to a worker."""
        params, ahead = self.params, self.ahead() if self.ahead is not None and self._on_lookahead else None

        def deltas() -> Iterator[Tensor]:
            for start, stop in chunks(self.layout.size):
                delta = torch.sub(params[start:stop], view[start:stop], out=self._slice[: stop - start])
                yield delta if ahead is None else delta.add_(ahead[start:stop])

        return self.layers.squares(deltas())

    @property
    def gap_of(self) -> Literal["parameters", "lookahead"]:
        """Which vector the gap is measured in: θ, or Θ where only Θ is at hand."""
        return "lookahead" if self._on_lookahead and self.ahead is None else "parameters"

    @property
    def _on_lookahead(self) -> bool:
        return self.rule.worker_rule.gives_back

    @property
    def l2(self) -> float | None:
        """‖params‖₂; None if it is not finite."""
        norm = float(torch.linalg.vector_norm(self.params.double()))
        return norm if isfinite(norm) else None


def is_within(tensor: Tensor, largest: float) -> bool:
    """Return whether no element is NaN or has an absolute value above ``largest``."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)
    return -largest <= low.item() and high.item() <= largest


def exhaust(slices: Iterator[int]) -> None:
    """Apply all ``slices`` of an update."""
    for _ in slices:
        pass


@dataclass(frozen=True)
class Contexts:
    """The scalars of one update or reply for each slice: they depend on its parameter group and its counts."""

    own: Counts
    shared: Counts
    lr: tuple[float, ...] | None  # of the update, one for each group; in a reply, those beside the shared counts count
    max_lr: tuple[float, ...]
    lag: int
    version: int
    workers: int

    def of(self, group: int, spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, Context]]:
        """Yield (start, stop, context) of each piece of the ``spans`` of a group that has one context."""
        for begin, end in spans:
            for first, last, own_count, own_lr in self.own.runs(begin, end):
                for start, stop, shared_count, shared_lr in self.shared.runs(first, last):
                    lr = shared_lr if self.lr is None else self.lr[group]
                    scalars = lr, own_lr, self.max_lr[group], self.lag, self.version, own_count, self.workers, group
                    yield start, stop, Context(*scalars, shared_count)
