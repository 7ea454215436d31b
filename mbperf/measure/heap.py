"""Two states of glibc's heap: every large block fresh from the system, or every one recycled.

By default glibc moves between the two as blocks are freed, and which one a process ends in moves
F.cross_entropy fourfold. Pinned, each repeats. Source: mallopt(3); "Tunables" in the manual of glibc.
"""

import ctypes
import sys
from collections.abc import Iterable
from functools import cache

FRESH, RECYCLED = "fresh", "recycled"
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4
DEFAULT_THRESHOLD = 128 << 10  # bytes of both thresholds in a new process
LARGEST = (1 << 31) - 1  # mallopt takes an int
TOP_PAD = 256 << 20

# glibc's defaults, held: setting a threshold ends its adaptation. Blocks of 128 KiB and more are mapped and
# unmapped each time. Recycled: none is mapped by itself, and nothing is given back.
OPTIONS = {
    FRESH: {M_MMAP_THRESHOLD: DEFAULT_THRESHOLD, M_TRIM_THRESHOLD: DEFAULT_THRESHOLD},
    RECYCLED: {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: LARGEST, M_TOP_PAD: TOP_PAD},
}
TUNABLES = {
    FRESH: f"glibc.malloc.mmap_threshold={DEFAULT_THRESHOLD}:glibc.malloc.trim_threshold={DEFAULT_THRESHOLD}",
    RECYCLED: f"glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={LARGEST}:glibc.malloc.top_pad={TOP_PAD}",
}
# A block of 128 KiB has 32 pages; a call that allocates none takes fewer than 2 faults.
LEAST_FAULTS = 8


def set_state(state: str) -> bool:
    """Put the heap of this process in a state and return whether that could be done.

    Args:
        state: "fresh" or "recycled".

    Returns:
        False where the C library is not glibc, or refuses.
    """
    if not has_states():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    done = all(mallopt(option, value) == 1 for option, value in OPTIONS[state].items())
    global _recycles
    _recycles = done and state == RECYCLED
    return done


_recycles = False


def recycle_in_advance(size: int) -> None:
    """Leave `size` bytes that were touched and freed where a recycled heap finds them; elsewhere do nothing.

    A heap grows until the largest results of all contenders have found a place beside what was put between
    them: some call of the first rounds would meet fresh pages (25,130 of F.cross_entropy at 512x50257).
    """
    if _recycles:
        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
        libc.free.argtypes = [ctypes.c_void_p]
        if block := libc.malloc(size):
            libc.memset(block, 0, size)
            libc.free(block)


@cache
def has_states() -> bool:
    """Return whether this process allocates by glibc."""
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


def matters(page_faults: Iterable[float]) -> bool:
    """Return whether the heap's state can matter to calls that took so many page faults each in a fresh one.

    >>> matters([0.0, 1.5]), matters([0.0, 32.0])
    (False, True)
    """
    return has_states() and max(page_faults, default=0.0) >= LEAST_FAULTS
