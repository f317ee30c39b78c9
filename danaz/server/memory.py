"""How the C library treats the memory that ZeroMQ allocates for what it receives and sends."""

from __future__ import annotations

import ctypes

# malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3

LARGEST_REUSED_BYTES = 32 << 20  # the most that glibc takes
KEPT_BYTES = 256 << 20


def keep_freed_memory() -> bool:
    """Let this process use again what it frees; returns whether the C library understands.

    By default glibc gives large blocks back to the kernel, which clears each page before it hands it out anew: for
    messages of a megabyte, that costs as much as sending them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_REUSED_BYTES)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))
