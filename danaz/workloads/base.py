"""The definition of a workload, and the table of the workloads that configs know by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from danaz.run.config import Config


@dataclass(frozen=True)
class Workload:
    """A model with the data that it learns from. A training loop needs nothing else.

    ``train`` and ``test`` are map-style data sets; give :func:`collate` to their DataLoader. ``loss(output, target)``
    returns a scalar, the mean over the samples of the batch. If ``classes`` is None, the model does not classify, and
    there is no test error. Otherwise dimension 1 of its output has the scores of the classes.

    ``bits_per`` says of a cross entropy what it is the mean over, such as "character". The model is then judged by its
    test loss in bits per character, and not by its test error. ``facts`` are reported beside the figures of each run.
    """

    model: nn.Module
    train: Dataset[Any]
    test: Dataset[Any] | None
    loss: Callable[[Any, Any], Tensor]
    classes: int | None = None
    bits_per: str | None = None
    facts: Mapping[str, str | float] = field(default_factory=dict)

    def with_data_on(self, device: torch.device) -> Workload:
        """Return the same workload with its data sets on ``device``. A data set without a method ``to`` stays."""

        def there(data: Any) -> Any:
            return data.to(device) if hasattr(data, "to") else data

        return replace(self, train=there(self.train), test=there(self.test))


Builder = Callable[[Config], Workload]
BUILDERS: dict[str, Builder] = {}


def workload(name: str) -> Callable[[Builder], Builder]:
    """Return a decorator for the function that builds the workload of a config with ``workload: name``."""

    def register(builder: Builder) -> Builder:
        BUILDERS[name] = builder
        return builder

    return register


def collate(batch: Any) -> Any:
    """Stack single samples, or pass on the batch that ``__getitems__`` made; use it as a DataLoader's collate_fn."""
    return batch if isinstance(batch, tuple) else default_collate(batch)
