"""Memory that is used again: training frees and wants the same large tensors in every step."""

import ctypes
import sys
from contextlib import suppress

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed, for all of this process.

    Otherwise each large tensor is new pages from the system, which are cleared at first touch:
    on a virtual machine that took nine tenths of a training step.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library: it works as before
            library = ctypes.CDLL("libc.so.6")
            library.mallopt(_M_MMAP_MAX, 0)
            library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
