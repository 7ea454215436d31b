"""Limits of this machine and needs of a loader: processors, shared memory, descriptors."""

import math
import resource
import shutil
from pathlib import Path

from mbperf import processors
from mbperf.loader.settings import Settings

SHARED_MEMORY = Path("/dev/shm")
# Queues, events and the sentinel of one worker hold about this many descriptors in the main process (counted:
# index queue 2, sentinel 1, and the ends that stay open until the worker's queue feeder is through).
DESCRIPTORS_PER_WORKER = 4
DESCRIPTORS_AT_REST = 40


def usable_cpus() -> float:
    """Return the processors this process can use: affinity, or the cgroup's quota if that is smaller."""
    quota = processors.quota()
    return float(processors.affinity()) if quota is None else min(float(processors.affinity()), quota)


def shared_memory_free() -> int | None:
    """Return the free bytes of /dev/shm, where workers put batches; None where there is no such thing."""
    try:
        return shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return None


def descriptor_limit() -> int:
    """Return how many descriptors one process may hold (RLIMIT_NOFILE, soft)."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft


def shared_memory_needed(settings: Settings, batch_bytes: int) -> int:
    """Return the shared memory a loader can hold: batch x prefetch x workers, and one being consumed."""
    return batch_bytes * (settings.prefetched_batches + 1) if settings.num_workers else 0


def descriptors_needed(settings: Settings, tensors_per_batch: int) -> int:
    """Return the descriptors of the main process: one per tensor in flight, and each worker's queues."""
    if not settings.num_workers:
        return DESCRIPTORS_AT_REST
    in_flight = tensors_per_batch * (settings.prefetched_batches + 1)
    return DESCRIPTORS_AT_REST + DESCRIPTORS_PER_WORKER * settings.num_workers + in_flight


def foreseen(settings: Settings, batch_bytes: int, tensors_per_batch: int, ranks: int = 1) -> dict[str, str]:
    """Return what this configuration would run out of in so many ranks, with the figures; else nothing."""
    warnings = {}
    needed, free = ranks * shared_memory_needed(settings, batch_bytes), shared_memory_free()
    factors = "batch x prefetch x workers" + (" x ranks" if ranks > 1 else "")
    if free is not None and needed > free:
        warnings["shared memory"] = (
            f"needs up to {needed / 1e6:,.0f} MB of shared memory ({factors}), "
            f"{SHARED_MEMORY} has {free / 1e6:,.0f} MB free"
        )
    left = processors.memory_left()
    if left is not None and needed > left:
        warnings["memory"] = (
            f"needs up to {needed / 1e6:,.0f} MB of shared memory ({factors}), "
            f"the control group leaves {left / 1e6:,.0f} MB of memory"
        )
    wanted, limit = descriptors_needed(settings, tensors_per_batch), descriptor_limit()
    if wanted > limit:
        warnings["descriptors"] = (
            f"needs up to {wanted} file descriptors (tensors x prefetch x workers), the limit is {limit} "
            f"(ulimit -n {1 << math.ceil(math.log2(wanted))} raises it)"
        )
    return warnings
