"""What danaz must know of a user's model before training begins."""

from __future__ import annotations

from torch import nn

from danaz.torch.synchronized import is_synchronized


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether the model has batch norm that needs more than one sample on each rank in a training step."""
    norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return any(not is_synchronized(module) for module in norms)
