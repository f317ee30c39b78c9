"""Vectors of which only the size is known, and a check that all values of a vector are finite."""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor


def announced(size: int) -> Tensor:
    """A vector f32[size] of which only the size is known, and which takes no memory."""
    return torch.zeros(1).expand(size)


def is_announced(vector: Tensor) -> bool:
    """Whether only its size is known."""
    return vector.numel() > 1 and vector.stride() == (0,)


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite, in one pass without a temporary."""
    if tensor.numel() == 0 or is_announced(tensor):
        return True
    low, high = torch.aminmax(tensor)
    return isfinite(low.item()) and isfinite(high.item())
