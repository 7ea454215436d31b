"""How many processors this process may use, by affinity and control groups, and what memory those leave it.

Source: https://docs.kernel.org/admin-guide/cgroup-v2.html (cpu.max, memory.max) and, for version 1,
cpu.cfs_quota_us and memory.limit_in_bytes.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
CGROUP_FILE = Path("/proc/self/cgroup")
# Of version 2 and 1: the limit, what is used, and how much of that the kernel gives up before it kills.
MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def cores() -> frozenset[int]:
    """Return the processors that the scheduler may put this process on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def affinity() -> int:
    """Return how many processors the scheduler may put this process on."""
    return len(cores())


def quota() -> float | None:
    """Return the processors' worth of time the control groups allow, or None where none limits it."""
    return min((limit for folder in groups() if (limit := group_quota(folder)) is not None), default=None)


def usable() -> int:
    """Return how many threads can run at once: the smaller of affinity and quota, at least 1."""
    limit = quota()
    return affinity() if limit is None else max(1, min(affinity(), math.ceil(limit)))


def memory_left() -> int | None:
    """Return the bytes that the control groups still allow, or None where none limits them."""
    return min(
        (left for folder in groups("memory") if (left := group_memory_left(folder)) is not None), default=None
    )


def group_memory_left(folder: Path) -> int | None:
    """Return the bytes that one control group still allows, or None."""
    for limit_file, used_file, reclaimable in MEMORY_FILES:
        limit = read(folder / limit_file) or ""
        if limit[:1].isdigit():
            stat = dict(line.split() for line in (read(folder / "memory.stat") or "").splitlines())
            used = int(read(folder / used_file) or 0) - int(stat.get(reclaimable, 0))
            return max(0, int(limit) - max(0, used))
    return None


def groups(controller: str = "cpu") -> Iterator[Path]:
    """Yield the folders of this process's control group and its ancestors, for both versions.

    Version 1 has a hierarchy for each controller, version 2 one for all.

    Inside a container the group's own path may not be visible, while the limits stand at the root.
    """
    for line in (read(CGROUP_FILE) or "0::/").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUP_ROOT / controllers
        own = root / path.lstrip("/")
        yield own
        yield from (parent for parent in own.parents if parent.is_relative_to(root))


def group_quota(folder: Path) -> float | None:
    """Return the limit that one control group sets, in processors, or None."""
    text = read(folder / "cpu.max") or " ".join(
        read(folder / name) or "" for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    )
    match text.split():
        case [budget, period] if budget not in ("max", "-1"):
            return int(budget) / int(period)
    return None


def read(path: Path) -> str | None:
    """Return a file's text, or None where it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return None
