"""What this process may use, and what a loader needs: processors, shared memory, descriptors.

Processors are the smaller of the affinity mask and the cgroup's quota (cpu.max; cpu.cfs_* in version 1).
"""

import math
import os
import resource
import shutil
from pathlib import Path

from mbperf.loader.settings import Settings

CGROUP_ROOT = Path("/sys/fs/cgroup")
SHARED_MEMORY = Path("/dev/shm")
# Queues, events and the sentinel of one worker hold about this many descriptors in the main process (counted:
# index queue 2, sentinel 1, and the ends that stay open until the worker's queue feeder is through).
DESCRIPTORS_PER_WORKER = 4
DESCRIPTORS_AT_REST = 40


def cgroup_quota(root: Path = CGROUP_ROOT, membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return the processors this cgroup may use, or None where nothing limits it.

    Every ancestor's limit holds too, so the smallest on the way up counts.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            quotas += [_quota_v2(folder) for folder in _ancestors(root, path)]
        elif "cpu" in controllers.split(","):
            quotas += [_quota_v1(folder) for folder in _ancestors(root / "cpu", path)]
    known = [quota for quota in quotas if quota is not None]
    return min(known) if known else None


def _ancestors(root: Path, path: str) -> list[Path]:
    parts = [part for part in path.split("/") if part and part != ".."]
    return [root.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _quota_v1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return None if quota <= 0 or period <= 0 else quota / period


def usable_cpus() -> float:
    """Return the processors this process can use: affinity, or the cgroup's quota if that is smaller."""
    try:
        affinity = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS has no affinity
        affinity = os.cpu_count() or 1
    quota = cgroup_quota()
    return float(affinity) if quota is None else min(float(affinity), quota)


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


def foreseen(settings: Settings, batch_bytes: int, tensors_per_batch: int) -> dict[str, str]:
    """Return what this configuration would run out of, with the figures; empty when nothing."""
    warnings = {}
    needed, free = shared_memory_needed(settings, batch_bytes), shared_memory_free()
    if free is not None and needed > free:
        warnings["shared memory"] = (
            f"needs up to {needed / 1e6:,.0f} MB of shared memory (batch x prefetch x workers), "
            f"{SHARED_MEMORY} has {free / 1e6:,.0f} MB free"
        )
    wanted, limit = descriptors_needed(settings, tensors_per_batch), descriptor_limit()
    if wanted > limit:
        warnings["descriptors"] = (
            f"needs up to {wanted} file descriptors (tensors x prefetch x workers), the limit is {limit} "
            f"(ulimit -n {1 << math.ceil(math.log2(wanted))} raises it)"
        )
    return warnings
