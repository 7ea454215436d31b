"""End processes for good, and remove the shared-memory files that only they had."""

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

import psutil

KILL_WAIT_S = 5.0
SHARED_MEMORY = Path("/dev/shm")
OURS_IN_SHM = ("sem.mp-", "torch_", "pym-", "psm_")
TORCH_NAME = re.compile(r"torch_(\d+)_")  # c10/util: torch_<pid of its maker>_<random>_<count>


def kill_tree(pid: int) -> None:
    """Kill a process and its descendants, and remove the shared-memory files that only they had mapped."""
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.Error:
        return
    mapped = set().union(*(mapped_shared_memory(process.pid) for process in family))
    mapped -= mapped_shared_memory(os.getpid())  # inherited by fork: the user's own
    for process in family:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(family[1:], timeout=KILL_WAIT_S)
    for name in mapped:
        with contextlib.suppress(OSError):
            os.unlink(name)
    remove_shared_memory_of(process.pid for process in family)


def remove_shared_memory_of(pids: Iterable[int]) -> None:
    """Remove the shared-memory files that dead processes made: a killed process could not unlink its own."""
    dead = {pid for pid in pids if not psutil.pid_exists(pid)}
    for path in SHARED_MEMORY.glob("torch_*") if dead else ():
        made_by = TORCH_NAME.match(path.name)
        if made_by and int(made_by[1]) in dead:
            path.unlink(missing_ok=True)


def mapped_shared_memory(pid: int) -> set[str]:
    """Return the files of /dev/shm that a process has mapped and that torch or multiprocessing named."""
    found = set()
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            name = line.partition("/dev/shm/")[2]
            if name.startswith(OURS_IN_SHM) and not name.endswith("(deleted)"):
                found.add("/dev/shm/" + name)
    return found


def oom_kills() -> int:
    """Return how many processes the kernel has killed for memory so far (the whole machine's count)."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
