"""This machine's memory: how much there is, and how the C library reuses it for ZeroMQ."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

# malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3

LARGEST_REUSED_BYTES = 32 << 20  # the largest threshold that glibc accepts
KEPT_BYTES = 256 << 20

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container, v2 and v1


def machine_bytes() -> int:
    """Return the memory of this machine, or of the container that this process runs in."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in map(Path, LIMITS):
        text = limit.read_text().strip() if limit.exists() else ""
        if text.isdigit():  # "max" means no limit
            found.append(int(text))
    return min(found)


def keep_freed_memory() -> bool:
    """Let this process reuse the memory that it frees. Returns whether the C library accepted the setting.

    By default glibc returns large blocks to the kernel, which clears each page before it hands it out again. For
    messages of a megabyte, that costs as much as sending them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_REUSED_BYTES)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))
