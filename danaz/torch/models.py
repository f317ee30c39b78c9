"""What danaz must know of a user's model before training begins."""

from __future__ import annotations

from torch import nn


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether the model has batch norm, so that a training step needs more than one sample on each rank."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
