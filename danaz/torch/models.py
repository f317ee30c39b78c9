"""What of a user's model danaz cannot train, said before training begins."""

from __future__ import annotations

from torch import nn


def check_model(model: nn.Module) -> None:
    """Raises ValueError, with the cure, for a model whose gradients danaz cannot sum."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            raise ValueError(
                f"the model's {name or type(module).__name__} is made with sparse=True, and danaz sums dense gradients "
                "alone; make it with sparse=False, or set its .sparse = False"
            )


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a training step of the model needs more than one sample a rank."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
