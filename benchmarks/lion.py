"""Lion under DANA: whether its views should look ahead. danaz does not carry Lion out; this is why.

    python benchmarks/lion.py configs/digits-adam.yaml --set optimizer=sgd --set momentum=0 --workers 8 16 32

Lion (Chen et al., Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675): s = −η sign(β₁m + (1 − β₁)g), then
m ← β₂m + (1 − β₂)g. The momentum alone would step by a = −η sign(m). Each worker has a state of its own, as under dana.
An error is the mean over the seeds, with the smallest and the largest in brackets.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accuracy import Row, make_parser, over_seeds, print_table
from torch import Tensor

from danaz.optimizers import Optimizer, Optimizers, Scalars, Vectors
from danaz.rules import Rule
from danaz.rules.asgd import Displace
from danaz.rules.local import LocalSteps
from danaz.simulate.simulator import simulate

BETA1, BETA2 = 0.9, 0.99


@dataclass(frozen=True)
class Lion(Optimizer):
    """``momentum`` is the share of a that views look ahead: 1, or 0."""

    momentum: float = 0.0

    name = "lion"

    def __post_init__(self) -> None:
        """A share of 1 is beyond the range of a momentum."""

    @property
    def state(self) -> tuple[str, ...]:
        return ("mean",)

    def step(self, params: Tensor, grad: Tensor, state: Vectors, at: Scalars, view: Tensor | None = None) -> None:
        mean = state["mean"]
        params.sub_(grad.lerp(mean, BETA1).sign_(), alpha=at.lr)
        mean.mul_(BETA2).add_(grad, alpha=1 - BETA2)

    def add_heading(self, out: Tensor, state: Vectors, at: Scalars, weight: float) -> None:
        if weight:
            out.add_(state["mean"].sign(), alpha=weight * at.lr)


def without_look_ahead() -> Rule:
    """A state for each worker, and views at θ."""
    return _dana(Lion(0.0))


def with_look_ahead() -> Rule:
    """The same with views at θ + Σⱼ aⱼ."""
    return _dana(Lion(1.0))


def _dana(lion: Lion) -> Rule:
    return Displace(LocalSteps(Optimizers([lion]), lr_correction=True, gives_back=True))


def rows(options: argparse.Namespace) -> Iterator[Row]:
    for lr in options.lr:
        for workers in options.workers:
            for way in (without_look_ahead, with_look_ahead):
                sets = [*options.overrides, f"algorithm=lion:{way.__name__}", f"lr={lr}", f"workers={workers}"]
                runs = over_seeds(simulate, options.config, sets, options.seeds)
                yield (f"{lr:g}", str(workers), way.__name__.replace("_", " ")), runs


def main() -> None:
    parser = make_parser(__doc__, seeds=3)
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-4, 1e-3], help="learning rates")
    torch.set_num_threads(1)
    print_table(("lr", "workers", "views"), rows(parser.parse_args()))


if __name__ == "__main__":
    main()
