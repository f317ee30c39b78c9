"""Whether two vectors are equal, as fast as memory can be read."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def are_equal(one: Tensor, other: Tensor) -> bool:
    """Return what torch.equal returns for two vectors f32[P] on one device, unless both have the same NaN: then, True.

    On a CPU, the C library compares the bytes of vectors that are equal in a quarter of torch's time.
    """
    same_bytes = (
        one.device.type == other.device.type == "cpu"
        and one.shape == other.shape
        and one.dtype == other.dtype
        and one.is_contiguous()
        and other.is_contiguous()
        and _memcmp(one.data_ptr(), other.data_ptr(), one.nbytes) == 0
    )
    return same_bytes or torch.equal(one, other)
