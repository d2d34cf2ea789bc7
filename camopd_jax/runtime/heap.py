"""Returns freed memory to the system: glibc's allocator keeps it, and it counts as memory of this process."""

import ctypes
import os
import sys

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of malloc.h


def return_large_blocks_at_once() -> None:
    """Makes glibc return freed blocks of at least 1 MiB at once, and keep smaller blocks in one heap.

    By default it keeps blocks of up to 32 MiB, which on a CPU are arrays of every layer.
    """
    if libc := _glibc():
        libc.mallopt(_M_MMAP_THRESHOLD, 2**20)
        if (os.cpu_count() or 1) <= 4:  # with few threads, one heap causes no waiting
            libc.mallopt(_M_ARENA_MAX, 1)


def trim() -> None:
    """Returns the free parts of the heap now. This takes a few milliseconds."""
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    return libc if sys.platform == "linux" and hasattr(libc, "malloc_trim") else None
