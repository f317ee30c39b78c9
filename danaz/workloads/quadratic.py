"""A quadratic function without noise. Whoever repeats a run's updates with NumPy must get the same figures."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from danaz.run.config import Config
from danaz.workloads.base import Workload, workload

DIMENSION = 1000
SAMPLES = 100  # the samples have no content; with batches of 1, an epoch has 100 updates


class Quadratic(nn.Module):
    """f(θ) = ½ Σ aⱼ(θⱼ − 1)². θ starts at zero; the aⱼ run from 0.01 to 1, evenly spaced in log aⱼ."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(DIMENSION))
        # This is a constant and not a buffer, because buffers are averaged over the workers.
        self.curvature = torch.logspace(-2, 0, DIMENSION, dtype=torch.float64).float()  # f32[d]

    def forward(self, _: Tensor) -> Tensor:
        """Return f(θ), f32[], whatever the input."""
        curvature = self.curvature.to(self.theta.device)
        return (curvature * (self.theta - 1).square()).sum() / 2


def value(output: Tensor, _: Tensor) -> Tensor:
    """Return the model's output, which is already the loss."""
    return output


@workload("quadratic")
def build_quadratic(config: Config) -> Workload:
    samples = TensorDataset(torch.zeros(SAMPLES, 1), torch.zeros(SAMPLES))
    return Workload(model=Quadratic(), train=samples, test=None, loss=value)
