"""Memory of a trial: footprint of this process and its workers, and the state of its heap.

PSS divides each shared page among those who map it, so the sum over processes counts every page once;
RSS would count the dataset once per worker. USS is what ends with the process.
"""

import ctypes
import os
import random
from dataclasses import dataclass
from pathlib import Path

import psutil

BLOCKS = 4000  # 2 MB; 3,000 were enough where importing torch and the profiler had left 1.2 MB of room


@dataclass
class Footprint:
    """Bytes and descriptors at one moment. `workers` lists each worker's PSS."""

    pss_bytes: int = 0
    uss_bytes: int = 0
    main_pss_bytes: int = 0
    workers_pss_bytes: list[int] | None = None
    shared_bytes: int = 0
    descriptors: int = 0


def footprint(shares_with: int | None = None) -> Footprint:
    """Return the footprint of this process and its living descendants.

    Args:
        shares_with: the process this one was forked from, whose part of the pages both map counts too:
            a training script would not have it beside itself.
    """
    me = psutil.Process()
    result = Footprint(workers_pss_bytes=[], descriptors=me.num_fds())
    for process in [me, *me.children(recursive=True)]:
        try:
            pss, uss, shared = _rollup(process.pid)
        except (OSError, psutil.Error):
            continue
        result.pss_bytes += pss
        result.uss_bytes += uss
        result.shared_bytes += shared
        if process.pid == os.getpid():
            result.main_pss_bytes = pss
        elif result.workers_pss_bytes is not None:
            result.workers_pss_bytes.append(pss)
    if shares_with is not None:
        pss, uss, _ = _rollup(shares_with)
        result.pss_bytes += pss - uss
        result.main_pss_bytes += pss - uss
    return result


def _rollup(pid: int) -> tuple[int, int, int]:
    """Return (PSS, USS, PSS in shared memory) in bytes; smaps_rollup costs a tenth of smaps."""
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split(":")
        fields[name] = int(value.split()[0]) * 1024
    unique = fields.get("Private_Clean", 0) + fields.get("Private_Dirty", 0)
    return fields["Pss"], unique, fields.get("Pss_Shmem", 0)


def fill_heap(seed: int = 0) -> None:
    """Fill the room that earlier frees left in the heap, and never give it back.

    Samples of megabytes are made and freed at the top of glibc's heap. Where nothing small lies above them,
    their pages go back to the kernel after each batch, and every batch faults them in again. Small objects
    lie there if the heap had no room below.

    One script iterating over batches of 100 MB had 25,600 page faults a batch; after 20 steps of an optimizer
    and a garbage collection 49,100, and needed half as long again; after this call, 25,600.
    """
    malloc = ctypes.CDLL(None).malloc
    malloc.argtypes, malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    sizes = random.Random(seed)
    for _ in range(BLOCKS):
        malloc(sizes.randrange(32, 1024))
