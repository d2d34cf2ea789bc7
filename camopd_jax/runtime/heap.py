"""Gives freed memory back to the system: on a CPU, what glibc's allocator keeps of it counts as this process's."""

import ctypes
import os
import sys

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of malloc.h


def return_large_blocks_at_once() -> None:
    """Makes glibc return freed blocks of a megabyte and more at once, and keep the others in one heap.

    By default it keeps blocks of up to 32 MiB for later: on a CPU, a layer's worth of arrays for every layer.
    """
    if libc := _glibc():
        libc.mallopt(_M_MMAP_THRESHOLD, 2**20)
        if (os.cpu_count() or 1) <= 4:  # few threads do not wait for one another
            libc.mallopt(_M_ARENA_MAX, 1)


def trim() -> None:
    """Returns the free parts of the heap now, which takes some milliseconds."""
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    return libc if sys.platform == "linux" and hasattr(libc, "malloc_trim") else None
