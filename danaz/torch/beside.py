"""Samples of several data sets, of which a loader makes one batch each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import Dataset

Collate = Callable[[list[Any]], Any]  # a loader's collate_fn


class Together(Dataset[tuple[Any, ...]]):
    """Data sets, each with the collate_fn of its loader. An item is a batch of each of them, and so is its index."""

    def __init__(self, parts: Sequence[tuple[Any, Collate]]):
        self._parts = parts

    def __getitem__(self, samples: Sequence[list[Any]]) -> tuple[Any, ...]:
        each = zip(self._parts, samples, strict=True)
        return tuple(collate(_fetched(dataset, keys)) for (dataset, collate), keys in each)


def _fetched(dataset: Any, keys: list[Any]) -> list[Any]:
    if hasattr(dataset, "__getitems__"):
        items: list[Any] = dataset.__getitems__(keys)
        return items
    return [dataset[key] for key in keys]


def first_of(items: Sequence[Any]) -> Any:
    """Return the only item of a batch of one."""
    [item] = items
    return item
