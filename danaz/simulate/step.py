"""The simulator's mini-batch step, forward and backward.

Kernels are launched one by one; on a GPU they are captured once, as a CUDA graph, and replayed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from danaz.run.config import Config
from danaz.vectors.model import FlatModel
from danaz.workloads import Workload
from danaz.workloads.computing import batch_loss

WARM_UP = 3  # eager steps before the capture, in which libraries choose and load their kernels

Work = Callable[[], Tensor]


class EagerStep:
    """Compute the gradient of a batch into ``flat.grads`` f32[P] and return its mean loss f32[]."""

    def __init__(self, model: nn.Module, flat: FlatModel, workload: Workload, config: Config, device: torch.device):
        self.model = model
        self.flat = flat
        self.workload = workload
        self.config = config
        self.device = device

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.model.zero_grad()
        loss = batch_loss(self.model, self.workload, x, y, self.config, self.device)
        loss.backward()  # type: ignore[no-untyped-call]
        self.flat.gather_gradients(range(len(self.flat.trained)))
        return loss.detach()


class GraphedStep:
    """An EagerStep that is captured once and then replayed: one launch in place of hundreds.

    A graph has one batch shape and reads from fixed buffers. The shorter last batch of an epoch is therefore computed
    eagerly. So are the first WARM_UP batches, on a stream of their own, as torch.cuda.graph requires. Every batch is
    computed exactly once, which keeps batch-norm statistics equal to those of an eager run.
    """

    def __init__(self, eager: EagerStep, capture: Callable[[Work], Work], apart: Callable[[Work], Tensor]):
        """Replay what ``capture`` makes of the eager step; ``apart`` runs some work on a stream of its own."""
        self.eager = eager
        self._capture = capture
        self._apart = apart
        self._warm_up = WARM_UP
        self._replay: Work | None = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        if len(x) < self.eager.config.batch_size:
            return self.eager(x, y)
        if self._warm_up:
            self._warm_up -= 1
            return self._apart(lambda: self.eager(x, y))
        if self._replay is None:
            images = self.eager.config.channels_last and x.dim() == 4
            self._x = x.clone(memory_format=torch.channels_last if images else torch.contiguous_format)
            self._y = y.clone()
            self._replay = self._capture(lambda: self.eager(self._x, self._y))
        self._x.copy_(x)
        self._y.copy_(y)
        return self._replay()


def cuda_graph(work: Work) -> Work:
    """Capture ``work`` without running it. The result replays it, and returns the same tensor each time."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def on_a_stream_apart(work: Work) -> Tensor:
    """Run ``work`` on a stream of its own; the current stream continues after it."""
    current, apart = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    apart.wait_stream(current)
    with torch.cuda.stream(apart):
        result = work()
    current.wait_stream(apart)
    return result


def make_step(eager: EagerStep) -> EagerStep | GraphedStep:
    """Return the fastest form of ``eager`` on its device: a graph on a GPU, ``eager`` itself on a CPU."""
    return GraphedStep(eager, cuda_graph, on_a_stream_apart) if eager.device.type == "cuda" else eager
