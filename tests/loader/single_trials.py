"""Single trials for the profiler's tests, and the check that they leave nothing behind."""

import gc
import os
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from mbperf.loader.processes import cleanup
from mbperf.loader.processes.runner import TrialRunner
from mbperf.loader.settings import Settings
from mbperf.loader.source import Source


def descriptors():
    return {
        fd: os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if Path(f"/proc/self/fd/{fd}").exists()
    }


def new_shared_memory(before):
    """Return what torch or multiprocessing left.

    What a process elsewhere has mapped is not ours, and what others have just made is soon gone.
    """
    left = None
    for _ in range(5):
        found = {n for n in set(os.listdir("/dev/shm")) - before if n.startswith(("torch_", "sem.mp-"))}
        left = found if left is None else left & found
        if left:
            others = set(psutil.pids()) - {os.getpid()}
            left -= {Path(name).name for pid in others for name in cleanup.mapped_shared_memory(pid)}
        if not left:
            break
        time.sleep(0.1)
    return left


@pytest.fixture(autouse=True)
def nothing_left_behind(monkeypatch):
    """Compare processes, descriptors, shared memory and temporary files before and after."""
    gc.collect()  # what earlier tests left to the collector goes now, not in between
    folder = Path(tempfile.mkdtemp(prefix="t-"))
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    children = {p.pid for p in psutil.Process().children(recursive=True)}
    fds, shared = descriptors(), set(os.listdir("/dev/shm"))
    yield
    left = [p for p in psutil.Process().children(recursive=True) if p.pid not in children]
    assert left == []
    assert descriptors().items() <= fds.items()  # what earlier tests held may be collected in between
    assert new_shared_memory(shared) == set()
    assert list(folder.rglob("*")) == []
    folder.rmdir()


def born_here(dataset, **fixed):
    """Fork trials from this process: a twentieth of a second instead of seconds for importing torch."""
    return Source(live=dataset, fixed=fixed)


def trial(source, workers, limit_s=20.0, **knobs):
    settings = Settings(**({"batch_size": 16} | knobs)).with_workers(workers)
    with TrialRunner(source) as runner:
        return run(runner, settings, limit_s)


def run(runner, settings, limit_s=20.0):
    job = {"job": "trial", "settings": settings.as_dict(), "seconds": 0.1, "seed": 3}
    return runner.run(job, limit_s)


def probe(runner, limit_s):
    job = {"job": "probe", "settings": Settings().as_dict(), "seconds": 1.0, "seed": 0}
    return runner.run(job, limit_s)
