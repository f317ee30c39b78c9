"""The definition of a workload, and the table of the workloads that configs know by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from danaz.run.config import Config


@dataclass(frozen=True)
class Workload:
    """A model with the data that it learns from. This is all that a training loop needs.

    ``train`` and ``test`` are map-style data sets; give :func:`collate` to their DataLoader. ``loss(output, target)``
    is a scalar, the mean over the samples of the batch. If ``classes`` is None, the model does not classify, and there
    is no test error.
    """

    model: nn.Module
    train: Dataset[Any]
    test: Dataset[Any] | None
    loss: Callable[[Any, Any], Tensor]
    classes: int | None = None

    def with_data_on(self, device: torch.device) -> Workload:
        """Return the same workload, with those data sets on ``device`` that have a method ``to``."""

        def there(data: Any) -> Any:
            return data.to(device) if hasattr(data, "to") else data

        return replace(self, train=there(self.train), test=there(self.test))


Builder = Callable[[Config], Workload]
BUILDERS: dict[str, Builder] = {}


def workload(name: str) -> Callable[[Builder], Builder]:
    """Decorator that makes ``workload: name`` in a config call this function."""

    def register(builder: Builder) -> Builder:
        BUILDERS[name] = builder
        return builder

    return register


def collate(batch: Any) -> Any:
    """``collate_fn`` for a DataLoader. It passes a batch that ``__getitems__`` made, and stacks single samples."""
    return batch if isinstance(batch, tuple) else default_collate(batch)
