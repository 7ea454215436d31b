"""How many processors this process may use: its affinity, and the quota of its control group.

Source: https://docs.kernel.org/admin-guide/cgroup-v2.html (cpu.max) and, for version 1, cpu.cfs_quota_us.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
CGROUP_FILE = Path("/proc/self/cgroup")


def affinity() -> int:
    """Return how many processors the scheduler may put this process on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def quota() -> float | None:
    """Return the processors' worth of time the control groups allow, or None where none limits it."""
    return min((limit for folder in groups() if (limit := group_quota(folder)) is not None), default=None)


def usable() -> int:
    """Return how many threads can run at once: the smaller of affinity and quota, at least 1."""
    limit = quota()
    return affinity() if limit is None else max(1, min(affinity(), math.ceil(limit)))


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
