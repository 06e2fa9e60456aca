"""Allocator settings for training, which frees and allocates the same large tensors each step."""

import ctypes
import sys
from contextlib import suppress

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Make glibc keep freed memory in this process instead of returning it to the system.

    Otherwise every large tensor gets new pages, which the kernel clears at first access: on a
    virtual machine that took 90 % of a training step. Does nothing with another C library.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library, such as musl
            library = ctypes.CDLL("libc.so.6")
            library.mallopt(_M_MMAP_MAX, 0)
            library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
