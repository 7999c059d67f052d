"""What the C allocator does with the memory that tensors leave, where there is glibc."""

from __future__ import annotations

import ctypes
from typing import Any


def keep_freed_memory() -> bool:
    """Tell the C allocator to give nothing back to the system; False where it can't be told.

    Otherwise tensors of some megabytes come as fresh pages every time, or not, as what ran before
    happens to have left the allocator's thresholds: the system then spends up to as long on
    clearing pages as a kernel on filling them (a fifth of the time of training a linear model).
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of glibc's malloc.h
    mallopt = _allocator("mallopt")
    return bool(mallopt and mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_max, 0))


def give_back() -> bool:
    """Give back what is kept; whether there was any."""
    trim = _allocator("malloc_trim")
    return bool(trim and trim(0))


def _allocator(function: str) -> Any:
    try:
        return getattr(ctypes.CDLL(None), function)
    except (AttributeError, OSError, TypeError):
        return None
