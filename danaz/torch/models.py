"""What danaz asks of a user's model before training begins."""

from __future__ import annotations

from torch import nn


def check_model(model: nn.Module) -> None:
    """Raise ValueError, with the cure, for a model whose gradients danaz cannot sum."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            raise ValueError(
                f"the model's {name or type(module).__name__} is made with sparse=True, but danaz sums only dense "
                "gradients; make it with sparse=False, or set its .sparse = False"
            )


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether the model has batch norm, so that a training step needs more than one sample on each rank."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
