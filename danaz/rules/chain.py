"""Composition: transformations that change the gradient before a rule sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from danaz.optimizers import Vectors
from danaz.rules.base import Context, Rule


class Transform:
    """Changes a gradient in place, before the rule that follows sees it."""

    needs_view: bool = False
    shared_state: tuple[str, ...] = ()

    def before(self, grad: Tensor, params: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        """Change ``grad`` f32[n] in place; the other vectors are those of the server before the update."""
        raise NotImplementedError

    def after(self, velocity: Callable[[], Tensor], shared: Vectors, ctx: Context) -> None:
        """See what the update did; ``velocity()`` f32[n] returns the velocity just applied."""


class scale_gradient(Transform):
    """Apply ``scale(grad, ctx)``, which works in place."""

    def __init__(self, scale: Callable[[Tensor, Context], object]):
        self.scale = scale

    def before(self, grad: Tensor, params: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        self.scale(grad, ctx)


class chain(Rule):
    """Apply the transformations in their order, then the last rule. The chain declares what its parts declare."""

    def __init__(self, *links: Transform | Rule):
        *transforms, rule = links
        if not isinstance(rule, Rule) or not all(isinstance(t, Transform) for t in transforms):
            raise TypeError("chain() takes transformations and, last, one rule")
        if rule.pushes != "gradient":
            raise ValueError(f"chain() transforms gradients, but its rule takes a {rule.pushes} from the worker")
        self.transforms = [t for t in transforms if isinstance(t, Transform)]
        self.rule = rule
        self.barrier = rule.barrier
        self.worker_rule = rule.worker_rule
        self.worker_state = rule.worker_state
        self.needs_view = rule.needs_view or any(t.needs_view for t in self.transforms)
        self.shared_state = rule.shared_state + tuple(name for t in self.transforms for name in t.shared_state)

    def apply(self, params: Tensor, push: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        for transform in self.transforms:
            transform.before(push, params, own, shared, ctx)
        self.rule.apply(params, push, own, shared, ctx)
        for transform in self.transforms:
            transform.after(lambda: self.rule.velocity(own, shared, ctx), shared, ctx)

    def view(self, out: Tensor, params: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        self.rule.view(out, params, own, shared, ctx)

    def enter(self, own: Vectors, params: Tensor) -> None:
        self.rule.enter(own, params)

    def resum(self, shared: Vectors, workers: Iterable[tuple[Vectors, Context]]) -> None:
        self.rule.resum(shared, workers)

    def velocity(self, own: Vectors, shared: Vectors, ctx: Context) -> Tensor:
        return self.rule.velocity(own, shared, ctx)
