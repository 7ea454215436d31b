"""The luck of the heap: whether large samples find their memory mapped, or fault it in with every batch.

Samples of megabytes are made and freed at the top of glibc's heap. Where nothing small lies above them, their
pages go back to the kernel after each batch. Small objects lie there if the heap had no room further down.
"""

import ctypes
import random

BLOCKS = 2000  # 1 MB; 1,000 were enough after importing torch, scipy and matplotlib


def fill_heap(seed: int = 0) -> None:
    """Take the room that earlier frees left in the heap; this process never gives it back.

    One script iterating over batches of 100 MB had 25,600 page faults a batch; after 20 steps of an optimizer
    and a garbage collection 49,100, and needed half as long again; after this call, 25,600.
    """
    malloc = ctypes.CDLL(None).malloc
    malloc.argtypes, malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    sizes = random.Random(seed)
    for _ in range(BLOCKS):
        malloc(sizes.randrange(32, 1024))
