"""What a workload is, and the table of those that configs know by name."""

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
    """A model with the data it learns from. Whatever trains it needs no more than this.

    ``train`` and ``test`` are map-style data sets; give :func:`collate` to their DataLoader. ``loss(output, target)``
    is the mean over the samples of the batch, a scalar. ``classes`` is None where nothing is classified: no test error.
    """

    model: nn.Module
    train: Dataset[Any]
    test: Dataset[Any] | None
    loss: Callable[[Any, Any], Tensor]
    classes: int | None = None

    def with_data_on(self, device: torch.device) -> Workload:
        """The same with data sets on ``device`` that can be there: those that have a method ``to``."""

        def there(data: Any) -> Any:
            return data.to(device) if hasattr(data, "to") else data

        return replace(self, train=there(self.train), test=there(self.test))


Builder = Callable[[Config], Workload]
BUILDERS: dict[str, Builder] = {}


def workload(name: str) -> Callable[[Builder], Builder]:
    """Decorator: make ``workload: name`` in a config call this function."""

    def register(builder: Builder) -> Builder:
        BUILDERS[name] = builder
        return builder

    return register


def collate(batch: Any) -> Any:
    """``collate_fn`` for a DataLoader: a batch that ``__getitems__`` made passes, single samples are stacked."""
    return batch if isinstance(batch, tuple) else default_collate(batch)
