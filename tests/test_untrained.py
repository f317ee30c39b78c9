"""What the optimizer does not hold is the same on all ranks of all workers, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from danaz.untrained import Untrained


class Mixed(nn.Module):
    """Frozen layers and buffers of several types, one of which no state dict holds."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.trained = nn.Linear(3, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.low = nn.Parameter(torch.randn(5).bfloat16(), requires_grad=False)
        self.norm = nn.BatchNorm1d(2)
        self.norm.num_batches_tracked.fill_(seed)
        self.register_buffer("mask", torch.randn(7) > 0)
        self.register_buffer("table", torch.randn(3).double(), persistent=False)
        self.register_buffer("none", torch.empty(0))
        self.register_buffer("odd", torch.tensor([float("nan"), -0.0]))


def bits(model: nn.Module) -> dict[str, bytes]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: t.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in named}


def test_another_model_becomes_the_same_but_for_what_is_trained() -> None:
    source, other = Mixed(1), Mixed(2)
    trained = [*other.trained.parameters(), *other.norm.parameters()]
    before = bits(other)
    packed = Untrained(source, [*source.trained.parameters(), *source.norm.parameters()]).packed()
    Untrained(other, trained).load(packed)
    after, expected = bits(other), bits(source)
    for name in after:
        is_trained = name.startswith("trained") or name in ("norm.weight", "norm.bias")
        assert after[name] == (before if is_trained else expected)[name], name


def test_a_model_of_another_shape() -> None:
    with pytest.raises(ValueError, match="all workers must make the same model"):
        Untrained(nn.BatchNorm1d(3), []).load(Untrained(nn.BatchNorm1d(4), []).packed())


def test_a_model_that_is_all_trained() -> None:
    model = nn.Linear(2, 2)
    everything = Untrained(model, list(model.parameters()))
    assert everything.size == 0
    everything.load(everything.packed())
