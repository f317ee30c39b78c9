"""Layer-wise adaptive rates, for batches so large that one rate no longer suits all layers.

You, Gitman, Ginsburg, Large Batch Training of Convolutional Networks, arXiv 1708.03888.
"""

from __future__ import annotations

from torch import Tensor
from torch.linalg import vector_norm

from danaz.optimizers import Vectors
from danaz.rules.base import Context, Rule, algorithm


class Lars(Rule):
    """ηₗ = η κ‖w‖ / (‖g‖ + β‖w‖) for each layer; v ← γv + ηₗ(g + βw); w ← w − v; everyone gets w.

    Workers push g + βw, which is averaged. All computed it on this same w, so subtracting βw gives g. A layer
    that is zero, as biases are at first, would stay so for ever: until it has moved, its rate is η itself.
    """

    barrier = True
    all_reduce = True
    scales_lr = True
    per_layer = True
    shared_state = ("velocity",)  # includes η, as in the paper

    def __init__(self, momentum: float, trust: float, weight_decay: tuple[float, ...]):
        self.momentum = momentum
        self.trust = trust  # κ
        self.weight_decay = weight_decay  # β of each parameter group; 0 if none is given

    def apply(self, params: Tensor, push: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        decay = self.weight_decay[ctx.group] if self.weight_decay else 0.0
        rate = ctx.lr * self._ratio(params, push, decay)
        velocity = shared["velocity"].mul_(self.momentum).add_(push, alpha=rate)
        params.sub_(velocity)

    def _ratio(self, params: Tensor, push: Tensor, decay: float) -> float:
        """κ‖w‖ / (‖g‖ + β‖w‖)."""
        size = vector_norm(params).item()
        slope = vector_norm(push.sub(params, alpha=decay)).item() + decay * size
        return self.trust * size / slope if size and slope else 1.0


@algorithm("ssgd-lars", paper="You et al., arXiv 1708.03888")
def ssgd_lars(momentum: float = 0.9, trust: float = 0.001, weight_decay: tuple[float, ...] = ()) -> Rule:
    """Synchronous SGD, N times the rate, each layer's step in proportion to the layer's size (LARS)."""
    return Lars(momentum, trust, weight_decay)
